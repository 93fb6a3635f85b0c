//! The private root: a small read-only tmpfs with `/share`, `/vsock`, and of `/proc` only `/proc/self/fd` and
//! `/proc/self/mountinfo`.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, mkdirat, openat};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
    mount_change, move_mount, open_tree, unmount,
};

use super::companion::Program;
use super::error::Doing;
use super::{Jail, JailError};

/// Where the new root is assembled before the old one goes: a directory that every host has.
const ASSEMBLY: &str = "/proc";

/// What the file server may still read of /proc, once, before its thread is confined.
pub(super) const MOUNTINFO: &str = "/proc/self/mountinfo";

const HARMLESS: u64 = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;

/// Replaces the root, and returns `/proc/self/smaps`, which the new one does not have.
pub(super) fn build(jail: &Jail) -> Result<File, JailError> {
    keep_mounts_here()?;
    let share = tree(jail.share.as_deref(), HARMLESS, libc::MS_SLAVE)?;
    if let Some(share) = &share {
        // What lies in it is mounted there. Itself it is the host's, which trusts the names that it has made there.
        let flags = libc::AT_EMPTY_PATH;
        let read_only = libc::MOUNT_ATTR_RDONLY;
        set_attributes(share.as_fd(), c"", flags, read_only, 0)
            .doing("making the shared directory read-only")?;
    }
    let read_only = HARMLESS | libc::MOUNT_ATTR_RDONLY;
    let sockets = tree(jail.sockets.as_deref(), read_only, libc::MS_PRIVATE)?;
    let smaps = File::open("/proc/self/smaps").doing("opening /proc/self/smaps")?;
    // All of /proc that there is, and only for the file server: it reopens its own descriptors by their names, and
    // once reads what is mounted. They lead nowhere else: a mount's root is the directory or file itself.
    let proc_part = |path: &str| {
        let path = jail.share.is_some().then_some(Path::new(path));
        tree(path, read_only, libc::MS_PRIVATE)
    };
    let descriptors = proc_part("/proc/self/fd")?;
    let mounts = proc_part(MOUNTINFO)?;

    assemble()?;
    for (path, tree) in [
        ("share", share),
        ("vsock", sockets),
        ("proc/self/fd", descriptors),
    ] {
        if let Some(tree) = tree {
            make_directories(path).doing(format!("making /{path} in the private root"))?;
            attach(tree.as_fd(), path)?;
        }
    }
    if let Some(mounts) = mounts {
        let file = MOUNTINFO.trim_start_matches('/');
        let flags = OFlags::CREATE | OFlags::CLOEXEC;
        openat(CWD, file, flags, Mode::empty()).doing(format!("making /{file}"))?;
        attach(mounts.as_fd(), file)?;
    }
    change_root()?;
    Ok(smaps)
}

/// Where a companion finds its files.
const BOOT: &str = "boot";

/// Where programs and their libraries are: in one of these, or beside the program.
const SYSTEM: [&str; 9] = [
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/libx32",
    "/etc/ld.so.cache",
    "/etc/alternatives",
];

/// Replaces the root of a program that is to be executed: what the host has in [`SYSTEM`] and the program's own
/// directory, read-only, and its files: `boot`, which is not mounted yet. No devices, no /proc, nothing that can be
/// written.
pub(super) fn build_for(program: &Program, boot: OwnedFd) -> Result<(), JailError> {
    keep_mounts_here()?;
    let read_only = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_RDONLY;
    let own = program.path.parent().unwrap_or(Path::new("/"));
    let mut places: Vec<&Path> = SYSTEM.iter().map(Path::new).collect();
    if !places.iter().any(|place| own.starts_with(place)) {
        places.push(own);
    }
    let mut links = Vec::new();
    let mut trees = Vec::new();
    for place in places {
        let Ok(found) = std::fs::symlink_metadata(place) else {
            continue;
        };
        match std::fs::read_link(place) {
            Ok(target) => links.push((relative(place), target)),
            Err(_) => trees.push((
                relative(place),
                found.is_dir(),
                tree(Some(place), read_only, libc::MS_PRIVATE)?,
            )),
        }
    }
    assemble()?;
    mount_boot(boot)?;
    for (path, target) in links {
        make_directories(path.rsplit_once('/').map_or("", |(directory, _)| directory))
            .and_then(|()| rustix::fs::symlinkat(&target, CWD, &path))
            .doing(format!("linking /{path} in the private root"))?;
    }
    for (path, is_directory, tree) in trees {
        let Some(tree) = tree else { continue };
        make_place(&path, is_directory).doing(format!("making /{path} in the private root"))?;
        attach(tree.as_fd(), &path)?;
    }
    change_root()
}

/// Mounts the companion's files read-only. Their owner writes to them by another mount, which is no more to be found.
fn mount_boot(boot: OwnedFd) -> Result<(), JailError> {
    make_directories(BOOT).doing(format!("making /{BOOT} in the private root"))?;
    attach(boot.as_fd(), BOOT)?;
    let read_only = HARMLESS | libc::MOUNT_ATTR_RDONLY;
    let again = tree(Some(Path::new(BOOT)), read_only, libc::MS_PRIVATE)?;
    unmount(BOOT, UnmountFlags::DETACH).doing(format!("making /{BOOT} read-only"))?;
    match again {
        Some(again) => attach(again.as_fd(), BOOT),
        None => Ok(()),
    }
}

fn relative(path: &Path) -> String {
    let text = path.to_string_lossy();
    text.trim_start_matches('/').to_owned()
}

/// Makes what a tree is mounted on: a directory, or an empty file in its directory.
fn make_place(path: &str, is_directory: bool) -> rustix::io::Result<()> {
    if is_directory {
        return make_directories(path);
    }
    make_directories(path.rsplit_once('/').map_or("", |(directory, _)| directory))?;
    let flags = OFlags::CREATE | OFlags::CLOEXEC;
    openat(CWD, path, flags, Mode::empty()).map(drop)
}

/// Nothing that is mounted here reaches the host; what the host mounts beneath the shared directory still arrives.
fn keep_mounts_here() -> Result<(), JailError> {
    mount_change(
        "/",
        MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
    )
    .doing("making the mounts private")
}

/// Mounts an empty root, and enters it.
fn assemble() -> Result<(), JailError> {
    let root = tmpfs("16k").doing("making a tmpfs for the private root")?;
    attach(root.as_fd(), ASSEMBLY)?;
    rustix::process::chdir(ASSEMBLY).doing("entering the private root")
}

/// Makes what was assembled the root, for good.
fn change_root() -> Result<(), JailError> {
    rustix::process::pivot_root(".", ".").doing("changing to the private root")?;
    unmount(".", UnmountFlags::DETACH).doing("leaving the host's mounts")?;
    rustix::process::chdir("/").doing("entering the private root")?;
    set_attributes(CWD, c"/", 0, libc::MOUNT_ATTR_RDONLY, libc::MS_PRIVATE)
        .doing("making the private root read-only")
}

/// A detached copy of `path` and what is mounted beneath it, with `attributes` and `propagation` (`MS_*`) on all of it.
fn tree(
    path: Option<&Path>,
    attributes: u64,
    propagation: u64,
) -> Result<Option<OwnedFd>, JailError> {
    let Some(path) = path else { return Ok(None) };
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, path, flags | OpenTreeFlags::AT_RECURSIVE)
        .doing(format!("taking {} into the jail", path.display()))?;
    let recursive = libc::AT_EMPTY_PATH | libc::AT_RECURSIVE;
    set_attributes(tree.as_fd(), c"", recursive, attributes, propagation)
        .doing(format!("restricting the mount of {}", path.display()))?;
    Ok(Some(tree))
}

fn set_attributes(
    directory: BorrowedFd<'_>,
    path: &CStr,
    flags: libc::c_int,
    attributes: u64,
    propagation: u64,
) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: attributes,
        attr_clr: 0,
        propagation,
        userns_fd: 0,
    };
    // SAFETY: the path is terminated, and the attributes outlive the call and have the size that is given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            directory.as_raw_fd(),
            path.as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// A file system in memory, of at most `size`, that is not mounted yet.
pub(super) fn tmpfs(size: &str) -> rustix::io::Result<OwnedFd> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in [("size", size), ("nr_inodes", "64"), ("mode", "0555")] {
        fsconfig_set_string(context.as_fd(), key, value)?;
    }
    fsconfig_create(context.as_fd())?;
    fsmount(
        context.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC,
    )
}

fn attach(tree: BorrowedFd<'_>, at: &str) -> Result<(), JailError> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(tree, "", CWD, at, flags).doing(format!("mounting {at} of the private root"))
}

/// Makes each directory of a relative path; those that are there already are well.
fn make_directories(path: &str) -> rustix::io::Result<()> {
    for (end, _) in path.match_indices('/').chain([(path.len(), "")]) {
        let Some(part) = path.get(..end).filter(|part| !part.is_empty()) else {
            continue;
        };
        match mkdirat(CWD, part, Mode::from_raw_mode(0o555)) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
