//! A VMM that was the keeper's counts where its claimer does from then on. What it has used before stays counted where it was.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Moves process `pid` to the cgroups of this process.
///
/// # Errors
/// The kernel refuses.
pub fn join(pid: u32) -> io::Result<()> {
    let own = fs::read_to_string("/proc/self/cgroup")?;
    let theirs = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    if own == theirs {
        return Ok(());
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    for line in own
        .lines()
        .filter(|line| !theirs.lines().any(|other| other == *line))
    {
        // A hierarchy that is mounted nowhere cannot be reached, by anybody.
        let Some(dir) = directory(line, &mounts) else {
            continue;
        };
        fs::write(dir.join("cgroup.procs"), pid.to_string())?;
    }
    Ok(())
}

/// Where the cgroup of one `line` of /proc/self/cgroup is (cgroups(7)), by the mounts of `mountinfo` (proc(5)).
fn directory(line: &str, mountinfo: &str) -> Option<PathBuf> {
    let mut fields = line.splitn(3, ':');
    let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
    mountinfo.lines().find_map(|mount| {
        let (place, kind) = mount.split_once(" - ")?;
        let mut kind = kind.split(' ');
        let (fstype, _, options) = (kind.next()?, kind.next()?, kind.next()?);
        let is_it = match controllers {
            "" => fstype == "cgroup2",
            _ => {
                fstype == "cgroup"
                    && controllers
                        .split(',')
                        .all(|one| options.split(',').any(|option| option == one))
            }
        };
        let mut place = place.split(' ').skip(3);
        let (root, point) = (place.next()?, place.next()?);
        let below = Path::new(path).strip_prefix(root).ok()?;
        is_it.then(|| Path::new(point).join(below))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
30 25 0:26 / /sys/fs/cgroup/unified rw,nosuid shared:9 - cgroup2 cgroup2 rw
31 25 0:27 / /sys/fs/cgroup/cpu,cpuacct rw shared:10 - cgroup cgroup rw,cpu,cpuacct
32 25 0:28 /box /sys/fs/cgroup/memory rw shared:11 - cgroup cgroup rw,memory
33 25 0:29 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
";

    #[test]
    fn each_hierarchy_has_its_place() {
        let dir = |line| directory(line, MOUNTS).map(|path| path.display().to_string());
        assert_eq!(dir("0::/a/b").unwrap(), "/sys/fs/cgroup/unified/a/b");
        assert_eq!(
            dir("4:cpu,cpuacct:/x").unwrap(),
            "/sys/fs/cgroup/cpu,cpuacct/x"
        );
        assert_eq!(dir("5:memory:/box/c").unwrap(), "/sys/fs/cgroup/memory/c");
        assert_eq!(dir("5:memory:/elsewhere"), None);
        assert_eq!(
            dir("1:name=systemd:/s").unwrap(),
            "/sys/fs/cgroup/systemd/s"
        );
        assert_eq!(dir("9:pids:/x"), None);
    }

    #[test]
    fn who_is_there_already_stays() {
        join(std::process::id()).unwrap();
    }
}
