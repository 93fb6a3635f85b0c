//! The kernel's command line: what the machine itself has to say, then the caller's words.

use std::fmt::Write;

use super::{BootError, layout};

/// What a guest kernel must leave alone where KVM runs its kernel mode in an instruction emulator: that guest
/// sees the real processor's CPUID whatever KVM was told, but the emulator knows only the older instructions.
///
/// BPF programs are interpreted there: translating one (a container's system call filter, its device filter) costs that
/// guest seconds, and running it a few times a second next to nothing.
///
/// A timer tick is some 7,000 emulated instructions: `tick_stretch=5` (a patched kernel's word) makes them 20 a second.
///
/// The time stamp counter is the host's there, whatever KVM is told: a guest that goes on from a snapshot would see all of
/// the time since then at once. kvm-clock goes on where it stood.
const NO_HARDWARE_KVM: &str = "syscall_by_fault tick_stretch=5 clocksource=kvm-clock sysctl.net.core.bpf_jit_enable=0 mitigations=off noxsaves noxsaveopt clearcpuid=smap,fsgsbase,rdrand,rdseed,popcnt,umip,smep,\
     pcid,invpcid,erms,fsrm,rdtscp,rdpid,cx16,clflushopt,clwb,xsavec,xsaves,xsaveopt";

/// What holds for every guest of this machine:
/// - `reboot=k`: the keyboard controller's reset line is the only way out that a machine without ACPI has.
/// - `noreplace-smp`: a guest of one processor would patch the lock prefixes out of its whole text.
/// - `rootfstype=ramfs`: the root is the initrd, unpacked; a tmpfs in its place costs time and gives nothing.
/// - `no_timer_check`: the interrupt controllers are KVM's and work; the kernel would wait ten ticks to see that.
/// - `lapic_khz`: KVM clocks every local APIC with 1 GHz; the kernel would wait to measure it (a patched kernel's word,
///   which others pass on to their init).
/// - `memhp_default_state`: memory that a clone of this guest gets in addition is in use as soon as it is there.
const ALWAYS: &str = "reboot=k noreplace-smp rootfstype=ramfs no_timer_check lapic_khz=1000000 memhp_default_state=online_kernel";

/// One serial port, so that the kernel does not probe for three more.
const CONSOLE: &str = "8250.nr_uarts=1 console=ttyS0";

/// Nobody reads the messages, and no port is there that the kernel should look for.
const NO_CONSOLE: &str = "quiet loglevel=0";

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
    /// So many CPUs are there, of more that the kernel is told of: it would wait ten seconds for each of the others.
    pub max_cpus: Option<u32>,
}

/// The whole command line; `extra` is the caller's and comes last, so that it can override.
///
/// # Errors
/// It is too long or `extra` holds bytes other than printable ASCII.
pub fn build(facts: &Facts, extra: &str) -> Result<String, BootError> {
    let mut line = String::from(ALWAYS);
    if let Some(khz) = facts.tsc_khz {
        // Writing to a String cannot fail.
        let _ = write!(line, " tsc_early_khz={khz}");
    }
    if facts.emulated {
        line.push(' ');
        line.push_str(NO_HARDWARE_KVM);
    }
    if let Some(cpus) = facts.max_cpus {
        let _ = write!(line, " maxcpus={cpus}");
    }
    line.push(' ');
    line.push_str(if facts.console { CONSOLE } else { NO_CONSOLE });
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
    fn a_machine_without_anything_says_what_always_holds() {
        assert_eq!(
            build(&Facts::default(), "").unwrap(),
            "reboot=k noreplace-smp rootfstype=ramfs no_timer_check lapic_khz=1000000 memhp_default_state=online_kernel \
             quiet loglevel=0"
        );
    }

    #[test]
    fn every_fact_has_its_words_and_the_caller_comes_last() {
        let facts = Facts {
            devices: vec![(0xd000_0000, 5), (0xd000_1000, 6)],
            emulated: true,
            tsc_khz: Some(2_400_000),
            console: true,
            max_cpus: Some(1),
        };
        let line = build(&facts, "debug init=/agent").unwrap();
        let start = format!("{ALWAYS} tsc_early_khz=2400000 syscall_by_fault ");
        assert!(line.starts_with(&start), "{line}");
        assert!(line.ends_with(
            ",xsaveopt maxcpus=1 8250.nr_uarts=1 console=ttyS0 virtio_mmio.device=4K@0xd0000000:5 \
             virtio_mmio.device=4K@0xd0001000:6 debug init=/agent"
        ));
        assert!(!line.contains("  "), "two spaces in {line:?}");
    }

    #[test]
    fn a_console_is_there_to_be_read() {
        let line = |console| {
            let facts = Facts {
                console,
                ..Facts::default()
            };
            build(&facts, "").unwrap()
        };
        assert!(!line(true).contains("quiet") && !line(true).contains("loglevel"));
        assert!(!line(false).contains("8250") && !line(false).contains("console"));
    }

    #[test]
    fn hardware_needs_none_of_the_words_for_the_emulator() {
        let line = build(&Facts::default(), "").unwrap();
        assert!(!line.contains("clearcpuid") && !line.contains("mitigations"));
        assert!(!line.contains("maxcpus"), "every processor is there");
    }

    #[test]
    fn the_longest_machine_leaves_room_for_the_caller() {
        let facts = Facts {
            devices: (0..19).map(|i| (0xd000_0000 + i * 0x1000, 5)).collect(),
            emulated: true,
            tsc_khz: Some(u32::MAX),
            console: true,
            max_cpus: Some(31),
        };
        let extra = "x".repeat(512);
        build(&facts, &extra).unwrap();
    }

    #[test]
    fn what_cannot_be_a_command_line_is_refused() {
        let before = build(&Facts::default(), "").unwrap().len() + 1;
        for (extra, byte, at) in [
            ("a\nb", b'\n', before + 1),
            ("\0", 0, before),
            ("ü", 0xc3, before),
            ("\x7f", 0x7f, before),
        ] {
            match build(&Facts::default(), extra) {
                Err(BootError::CmdlineByte { byte: b, at: a }) => assert_eq!((b, a), (byte, at)),
                other => panic!("{extra:?}: {other:?}"),
            }
        }
        let fits = "x".repeat(layout::CMDLINE_BYTES - 1 - before);
        assert_eq!(build(&Facts::default(), &fits).unwrap().len(), 2047);
        assert!(matches!(
            build(&Facts::default(), &(fits + "x")),
            Err(BootError::CmdlineLength { bytes: 2048 })
        ));
    }
}
