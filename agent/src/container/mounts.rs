//! The spec's mounts, made ready in the agent: options parsed, sources opened as detached trees, so that what remains
//! for the child is to find each destination and attach.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use oci_spec::runtime as oci;

use super::command::c_string;
use super::options::{self, MountOptions};
use super::sys::{self, Errno, MountAttr};
use super::{Error, Result};

/// How a mount comes to be.
#[derive(Debug)]
pub(super) enum MountKind {
    /// A detached tree with its attributes set: attached.
    Tree(OwnedFd),
    /// A file system that only the child, being in the namespaces it belongs to, can make.
    New {
        source: CString,
        fstype: CString,
        flags: u64,
        data: CString,
    },
}

/// One mount.
#[derive(Debug)]
pub(super) struct MountPlan {
    /// `mounts[].source`, for errors.
    pub source: String,
    /// Absolute, in the container.
    pub destination: CString,
    /// Whether the mount point is a directory.
    pub directory: bool,
    pub kind: MountKind,
    /// For `New`: mount(2)'s flags of a second call, if the spec asks for a propagation.
    pub propagation: Option<u64>,
}

impl MountPlan {
    /// The destination as a path, for errors.
    pub(super) fn destination(&self) -> PathBuf {
        PathBuf::from(std::ffi::OsStr::from_bytes(self.destination.as_bytes()))
    }
}

/// What decides how some file systems can be mounted.
#[derive(Clone, Copy, Debug)]
pub(super) struct MountContext<'a> {
    /// The container has a user namespace that does not own the network namespace: no sysfs of its own.
    pub foreign_network: bool,
    /// ...nor the IPC namespace: no mqueue of its own.
    pub foreign_ipc: bool,
    /// The container has a cgroup namespace.
    pub cgroup_namespace: bool,
    /// The container's cgroup.
    pub cgroup: BorrowedFd<'a>,
}

/// Prepares all mounts of the spec.
pub(super) fn plan(mounts: &[oci::Mount], context: MountContext<'_>) -> Result<Vec<MountPlan>> {
    mounts
        .iter()
        .map(|mount| plan_one(mount, context))
        .collect()
}

fn plan_one(mount: &oci::Mount, context: MountContext<'_>) -> Result<MountPlan> {
    let destination = check_destination(mount.destination())?;
    if mount.uid_mappings().is_some() || mount.gid_mappings().is_some() {
        return Err(Error::unsupported(
            "mounts[].uidMappings",
            "id-mapped mounts are not",
        ));
    }
    let options = options::parse(mount.options().as_deref().unwrap_or_default())?;
    let source = mount
        .source()
        .as_ref()
        .map_or("", |s| s.to_str().unwrap_or(""))
        .to_owned();
    let fstype = mount
        .typ()
        .as_deref()
        .unwrap_or(if options.bind { "bind" } else { "" });
    let fail = |step: &'static str, errno: Errno| Error::Mount {
        mount_source: source.clone(),
        destination: mount.destination().clone(),
        step,
        source: errno.into(),
    };
    let (kind, directory) = mount_kind(mount, fstype, &source, &options, context, &fail)?;
    let propagation = match &kind {
        MountKind::New { .. } => options.propagation.map(|p| p.mount_flags()),
        MountKind::Tree(_) => None,
    };
    Ok(MountPlan {
        source: source.clone(),
        destination,
        directory,
        kind,
        propagation,
    })
}

/// How the mount comes to be, and whether its mount point is a directory.
fn mount_kind(
    mount: &oci::Mount,
    fstype: &str,
    source: &str,
    options: &MountOptions,
    context: MountContext<'_>,
    fail: &impl Fn(&'static str, Errno) -> Error,
) -> Result<(MountKind, bool)> {
    if options.bind || fstype == "bind" {
        let path = mount.source().as_deref().unwrap_or(Path::new(""));
        if !path.is_absolute() {
            return Err(fail(
                "the source of a bind mount must be absolute",
                Errno(libc::EINVAL),
            ));
        }
        return bind(Some(path), libc::AT_FDCWD, options, fail);
    }
    match fstype {
        "" => Err(Error::invalid("mounts[].type", "is missing")),
        "sysfs" if context.foreign_network => bind(
            Some(Path::new("/sys")),
            libc::AT_FDCWD,
            &options.recursively(),
            fail,
        ),
        "mqueue" if context.foreign_ipc => bind(
            Some(Path::new("/dev/mqueue")),
            libc::AT_FDCWD,
            options,
            fail,
        ),
        "cgroup" | "cgroup2" if !context.cgroup_namespace => {
            bind(None, context.cgroup.as_raw_fd(), options, fail)
        }
        _ => Ok((new(fstype, source, options)?, true)),
    }
}

/// A file system for the child to mount. What the spec calls "cgroup" is version 2 here, and takes no data.
fn new(fstype: &str, source: &str, options: &MountOptions) -> Result<MountKind> {
    if !options.recursive.is_empty() {
        return Err(Error::unsupported(
            "mounts[].options",
            "recursive attributes are for bind mounts",
        ));
    }
    let (fstype, data) = match fstype {
        "cgroup" | "cgroup2" => ("cgroup2", ""),
        other => (other, options.data.as_str()),
    };
    Ok(MountKind::New {
        source: c_string("mounts[].source", source.as_bytes())?,
        fstype: c_string("mounts[].type", fstype.as_bytes())?,
        flags: options.flags,
        data: c_string("mounts[].options", data.as_bytes())?,
    })
}

/// A detached copy of `path` (or of what `dir` is, without a path) with its attributes, and whether it is a
/// directory.
fn bind(
    path: Option<&Path>,
    dir: RawFd,
    options: &MountOptions,
    fail: &impl Fn(&'static str, Errno) -> Error,
) -> Result<(MountKind, bool)> {
    if !options.data.is_empty() {
        return Err(Error::invalid(
            "mounts[].options",
            format!("{:?} means nothing to a bind mount", options.data),
        ));
    }
    let path = match path {
        Some(path) => c_string("mounts[].source", path.as_os_str().as_bytes())?,
        None => CString::default(),
    };
    let tree = sys::clone_tree(dir, &path, options.recursive_bind)
        .map(sys::owned)
        .map_err(|e| fail("opening the source", e))?;
    let stat = sys::stat_at(tree.as_raw_fd(), c"", libc::AT_EMPTY_PATH)
        .map_err(|e| fail("examining the source", e))?;
    let directory = stat.st_mode & libc::S_IFMT == libc::S_IFDIR;
    for (attr, recursive) in options.bind_attributes() {
        sys::mount_setattr(tree.as_raw_fd(), &attr, recursive)
            .map_err(|e| fail("setting the mount's options", e))?;
    }
    Ok((MountKind::Tree(tree), directory))
}

/// The destination for `openat2`: absolute, not the root, without `..` (which no tool writes and which would only
/// serve to confuse).
fn check_destination(path: &Path) -> Result<CString> {
    let field = "mounts[].destination";
    if !path.is_absolute() {
        return Err(Error::invalid(
            field,
            format!("{} is not absolute", path.display()),
        ));
    }
    let mut clean = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                return Err(Error::invalid(
                    field,
                    format!("{} has '..'", path.display()),
                ));
            }
            _ => {}
        }
    }
    if clean == Path::new("/") {
        return Err(Error::unsupported(
            field,
            "a mount over the root: it is root.path's place",
        ));
    }
    c_string(field, clean.as_os_str().as_bytes())
}

/// The root filesystem as a detached, private tree.
pub(super) fn open_root(path: &Path) -> Result<OwnedFd> {
    let fail = |step, errno: Errno| Error::Rootfs {
        step,
        path: path.into(),
        source: errno.into(),
    };
    if !path.is_absolute() {
        return Err(Error::invalid(
            "root.path",
            format!("{} is not absolute", path.display()),
        ));
    }
    let c_path = c_string("root.path", path.as_os_str().as_bytes())?;
    let tree = sys::clone_tree(libc::AT_FDCWD, &c_path, true)
        .map(sys::owned)
        .map_err(|e| fail("opening", e))?;
    let stat = sys::stat_at(tree.as_fd().as_raw_fd(), c"", libc::AT_EMPTY_PATH)
        .map_err(|e| fail("examining", e))?;
    if stat.st_mode & libc::S_IFMT != libc::S_IFDIR {
        return Err(fail("entering", Errno(libc::ENOTDIR)));
    }
    let private = MountAttr {
        propagation: libc::MS_PRIVATE,
        ..MountAttr::default()
    };
    sys::mount_setattr(tree.as_raw_fd(), &private, true).map_err(|e| fail("making private", e))?;
    Ok(tree)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_are_cleaned_or_refused() {
        let check = |path: &str| check_destination(Path::new(path));
        assert_eq!(check("//proc/./sys//").unwrap().as_c_str(), c"/proc/sys");
        for bad in ["proc", "", "/", "/.", "/a/../b", "/a\0b"] {
            assert!(check(bad).is_err(), "{bad:?}");
        }
    }
}
