//! The guest's own file systems, mounted when first needed: nothing of this stands between the kernel's start of
//! the agent and its call to the host.

use std::ffi::CStr;
use std::path::Path;

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags};

/// The cgroup hierarchy of the guest.
pub const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// A step of the preparation that failed.
#[derive(Debug, thiserror::Error)]
#[error("preparing the guest: {what} {path}")]
pub struct Error {
    what: &'static str,
    path: &'static str,
    source: Errno,
}

/// One of the guest's mounts.
struct Mount {
    target: &'static CStr,
    path: &'static str,
    fstype: &'static CStr,
    flags: MountFlags,
    data: Option<&'static CStr>,
    /// Whether the directory has to be made first.
    made: bool,
}

const fn mount(
    path: &'static str,
    target: &'static CStr,
    fstype: &'static CStr,
    flags: MountFlags,
) -> Mount {
    Mount {
        target,
        path,
        fstype,
        flags,
        data: None,
        made: false,
    }
}

const LOCKED: MountFlags = MountFlags::NOSUID
    .union(MountFlags::NODEV)
    .union(MountFlags::NOEXEC);

const MOUNTS: [Mount; 6] = [
    mount("/proc", c"/proc", c"proc", LOCKED),
    mount("/sys", c"/sys", c"sysfs", LOCKED),
    mount("/dev", c"/dev", c"devtmpfs", MountFlags::NOSUID),
    Mount {
        // Group 5 is tty in every distribution's image.
        data: Some(c"mode=0620,ptmxmode=0666,gid=5"),
        made: true,
        ..mount(
            "/dev/pts",
            c"/dev/pts",
            c"devpts",
            MountFlags::NOSUID.union(MountFlags::NOEXEC),
        )
    },
    Mount {
        made: true,
        ..mount("/dev/mqueue", c"/dev/mqueue", c"mqueue", LOCKED)
    },
    mount(CGROUP_ROOT, c"/sys/fs/cgroup", c"cgroup2", LOCKED),
];

/// Makes the guest fit for containers: a root that can be pivoted away, the kernel's file systems, the cgroup
/// controllers handed down.
///
/// # Errors
///
/// The first step that failed. A kernel without one of the file systems is not one for a guest.
pub fn prepare() -> Result<(), Error> {
    make_root_pivotable()?;
    for mount in &MOUNTS {
        if mount.made {
            make_directory(mount.path)?;
        }
        let mounted = rustix::mount::mount(
            mount.fstype,
            mount.target,
            mount.fstype,
            mount.flags,
            mount.data,
        );
        check("mounting", mount.path, mounted)?;
    }
    // The containers' mounts propagate as their specifications say; for that the guest's must be shared.
    let shared = MountPropagationFlags::SHARED | MountPropagationFlags::REC;
    check("sharing", "/", rustix::mount::mount_change("/", shared))?;
    hand_down_controllers(Path::new(CGROUP_ROOT));
    Ok(())
}

/// The kernel's first root cannot be moved away (it has no parent mount), so that pivot_root(2) refuses it: the agent
/// lives in a bind mount of it that lies on top of it.
fn make_root_pivotable() -> Result<(), Error> {
    check(
        "binding the root to",
        "/newroot",
        rustix::mount::mount_bind("/", "/newroot"),
    )?;
    check("entering", "/newroot", rustix::process::chdir("/newroot"))?;
    check("moving to", "/", rustix::mount::mount_move(".", "/"))?;
    check("taking for the root", ".", rustix::process::chroot("."))
}

fn make_directory(path: &'static str) -> Result<(), Error> {
    match rustix::fs::mkdir(path, Mode::from_raw_mode(0o755)) {
        Err(Errno::EXIST) => Ok(()),
        made => check("making", path, made),
    }
}

fn check(what: &'static str, path: &'static str, result: Result<(), Errno>) -> Result<(), Error> {
    result.map_err(|source| Error { what, path, source })
}

/// Lets the children of `root` have every controller that it has. One that refuses is missed when a container asks
/// for a limit of it, and said then.
pub fn hand_down_controllers(root: &Path) {
    let Ok(controllers) = std::fs::read_to_string(root.join("cgroup.controllers")) else {
        return;
    };
    let enable: String = controllers
        .split_whitespace()
        .flat_map(|controller| ["+", controller, " "])
        .collect();
    if enable.is_empty() {
        return;
    }
    let file = root.join("cgroup.subtree_control");
    // One write takes all of them or none.
    if std::fs::write(&file, enable.as_bytes()).is_err() {
        for controller in enable.split_whitespace() {
            let _ = std::fs::write(&file, controller.as_bytes());
        }
    }
}
