//! Process ids as containerd sees them. A guest's pid names some other process on the host, if any; so it is moved beyond
//! every pid that a host can have. A sandbox itself is its VMM's process.

use std::path::Path;

/// Above Linux's PID_MAX_LIMIT (2^22), and within what an i32 holds.
const GUEST: u32 = 1 << 30;

/// A pid of the guest's, for containerd.
pub fn on_host(pid: u32) -> u32 {
    GUEST.saturating_add(pid)
}

/// The guest's pid in a `/proc/PID/...` path that containerd made of [`on_host`]'s.
pub fn in_guest(path: &Path) -> Option<u32> {
    let pid = path.strip_prefix("/proc").ok()?.iter().next()?;
    pid.to_str()?.parse::<u32>().ok()?.checked_sub(GUEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_pids_come_back_and_the_hosts_do_not() {
        let path = format!("/proc/{}/ns/pid", on_host(77));
        assert_eq!(in_guest(Path::new(&path)), Some(77));
        assert!(i32::try_from(on_host(1 << 22)).is_ok());
        for other in [
            "/proc/77/ns/pid",
            "/proc/self/ns/pid",
            "/run/netns/x",
            "/proc",
        ] {
            assert_eq!(in_guest(Path::new(other)), None, "{other}");
        }
    }
}
