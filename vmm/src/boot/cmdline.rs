//! The kernel's command line: what the machine itself has to say, then the caller's words.

use std::fmt::Write;

use super::{BootError, layout};

/// What a guest kernel must leave alone where KVM runs its kernel mode in an instruction emulator: that guest
/// sees the real processor's CPUID whatever KVM was told, but the emulator knows only the older instructions.
const NO_HARDWARE_KVM: &str = "syscall_by_fault mitigations=off noxsavec noxsaves noxsaveopt clearcpuid=smap,fsgsbase,rdrand,rdseed,popcnt,umip,smep,\
     pcid,invpcid,erms,fsrm,rdtscp,rdpid,cx16,clflushopt,clwb,xsavec,xsaves,xsaveopt";

/// What the machine knows and the kernel must be told.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Address and interrupt line of each virtio-mmio device, in the order in which the guest shall find them.
    pub devices: Vec<(u64, u32)>,
    /// KVM has no hardware virtualization and emulates the guest's kernel mode.
    pub emulated: bool,
    /// Frequency of the guest's TSC; spares the guest its calibration.
    pub tsc_khz: Option<u32>,
    /// There is a serial port.
    pub console: bool,
}

/// The whole command line; `extra` is the caller's and comes last, so that it can override.
///
/// # Errors
/// It is too long or `extra` holds bytes other than printable ASCII.
pub fn build(facts: &Facts, extra: &str) -> Result<String, BootError> {
    // The keyboard controller's reset line is the only way out that a machine without ACPI has.
    let mut line = String::from("reboot=k");
    if let Some(khz) = facts.tsc_khz {
        // Writing to a String cannot fail.
        let _ = write!(line, " tsc_early_khz={khz}");
    }
    if facts.emulated {
        line.push(' ');
        line.push_str(NO_HARDWARE_KVM);
    }
    if facts.console {
        line.push_str(" 8250.nr_uarts=1 console=ttyS0");
    }
    for (base, gsi) in &facts.devices {
        let _ = write!(line, " virtio_mmio.device=4K@{base:#x}:{gsi}");
    }
    if !extra.is_empty() {
        line.push(' ');
        line.push_str(extra);
    }
    check(&line)?;
    Ok(line)
}

/// Checks length and content.
pub(super) fn check(line: &str) -> Result<(), BootError> {
    let bad = line.bytes().position(|byte| !(0x20..0x7f).contains(&byte));
    if let Some(at) = bad {
        let byte = line.as_bytes().get(at).copied().unwrap_or_default();
        return Err(BootError::CmdlineByte { byte, at });
    }
    // One more for the NUL that ends it.
    if line.len() >= layout::CMDLINE_BYTES {
        return Err(BootError::CmdlineLength { bytes: line.len() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_anything_says_little() {
        assert_eq!(build(&Facts::default(), "").unwrap(), "reboot=k");
    }

    #[test]
    fn every_fact_has_its_words_and_the_caller_comes_last() {
        let facts = Facts {
            devices: vec![(0xd000_0000, 5), (0xd000_1000, 6)],
            emulated: true,
            tsc_khz: Some(2_400_000),
            console: true,
        };
        let line = build(&facts, "quiet init=/agent").unwrap();
        assert!(line.starts_with(
            "reboot=k tsc_early_khz=2400000 noxsavec noxsaves noxsaveopt clearcpuid=smap,"
        ));
        assert!(line.ends_with(
            ",xsaveopt 8250.nr_uarts=1 console=ttyS0 virtio_mmio.device=4K@0xd0000000:5 \
             virtio_mmio.device=4K@0xd0001000:6 quiet init=/agent"
        ));
        assert!(!line.contains("  "), "two spaces in {line:?}");
    }

    #[test]
    fn what_cannot_be_a_command_line_is_refused() {
        for (extra, byte, at) in [
            ("a\nb", b'\n', 10),
            ("\0", 0, 9),
            ("ü", 0xc3, 9),
            ("\x7f", 0x7f, 9),
        ] {
            match build(&Facts::default(), extra) {
                Err(BootError::CmdlineByte { byte: b, at: a }) => assert_eq!((b, a), (byte, at)),
                other => panic!("{extra:?}: {other:?}"),
            }
        }
        let fits = "x".repeat(layout::CMDLINE_BYTES - 1 - "reboot=k ".len());
        assert_eq!(build(&Facts::default(), &fits).unwrap().len(), 2047);
        assert!(matches!(
            build(&Facts::default(), &(fits + "x")),
            Err(BootError::CmdlineLength { bytes: 2048 })
        ));
    }
}
