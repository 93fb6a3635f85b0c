//! What QEMU's process has resident, as the host's /proc has it.

use std::fs;

/// Resident memory in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Resident {
    /// Programs, heap, translated code.
    pub(super) own_kib: u64,
    /// Of the guest's memory.
    pub(super) guest_kib: u64,
}

/// Of the companion of the VMM with process id `vmm`, its only child; `None` if it has ended.
pub(super) fn of_companion(vmm: u32) -> Option<Resident> {
    let children = fs::read_to_string(format!("/proc/{vmm}/task/{vmm}/children")).ok()?;
    let child: u32 = children.split_whitespace().next()?.parse().ok()?;
    let smaps = fs::read_to_string(format!("/proc/{child}/smaps")).ok()?;
    Some(add_up(&smaps))
}

fn add_up(smaps: &str) -> Resident {
    let mut total = Resident::default();
    let mut of_guest = false;
    for line in smaps.lines() {
        if let Some(rss) = line.strip_prefix("Rss:") {
            let kib = rss.trim().trim_end_matches(" kB").parse().unwrap_or(0);
            let sum = match of_guest {
                true => &mut total.guest_kib,
                false => &mut total.own_kib,
            };
            *sum = sum.saturating_add(kib);
        } else if line
            .split(' ')
            .next()
            .is_some_and(|key| !key.ends_with(':'))
        {
            // A mapping's first line. The only memfd that QEMU has is the guest's memory.
            of_guest = line.contains(" /memfd:");
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_counted_apart() {
        let smaps = "\
55e0-55e1 r-xp 00000000 08:01 131                        /usr/bin/qemu-system-x86_64
Size:                132 kB
Rss:                 120 kB
7f00-7f08 rw-s 00000000 00:01 7                          /memfd:memory-backend-memfd (deleted)
Rss:               20480 kB
VmFlags: rd wr
7ffc-7ffd rw-p 00000000 00:00 0                          [stack]
Rss:                  16 kB
";
        let expected = Resident {
            own_kib: 136,
            guest_kib: 20480,
        };
        assert_eq!(add_up(smaps), expected);
        assert_eq!(add_up("nonsense"), Resident::default());
    }
}
