//! What a container sees of the host: directories and files, bound into the sandbox's shared directory, in the VMM's
//! mount namespace alone: a mount of the host's would keep the host's own tools from removing what lies below it.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Mount, Spec};
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags};

use super::GUEST_SHARE;
use super::dir::{SandboxDir, mounts_below};
use super::error::Error;
use super::idmap::IdMap;
use crate::error::ErrorKind;
use crate::hypervisor::mounts::{self, Mounted};
use crate::paths::canonical;

/// The most volumes of one container.
const MAX_VOLUMES: usize = 1024;

/// Makes a container's spec the guest's, as [`copies`] does, and mounts what it names. The sandbox's VMM lives.
///
/// # Errors
/// Those of [`copies`]; the VMM is gone.
pub fn share(
    dir: &SandboxDir,
    id: &str,
    spec: &mut Spec,
    guests_own: impl Fn(&Mount) -> Option<PathBuf>,
) -> Result<(), Error> {
    let volumes = copies(dir, id, spec, guests_own)?;
    if volumes.is_empty() {
        return Ok(());
    }
    let vmm = dir.read_state()?.vmm;
    vmm.pidfd()
        .and_then(|vmm| mounts::attach(vmm.as_fd(), &volumes))
        .map_err(|e| Error::host(format!("mounting the volumes of container {id}"), e))
}

/// Makes a container's spec the guest's: copies every host path that it names under the container's shared directory,
/// and puts the guest's path in its place. The root file system is at `rootfs` there already, or is to be mounted.
/// What the guest has itself, `guests_own` says: that path is bound instead.
///
/// # Errors
/// `InvalidArgument`: a source does not exist, or there are too many.
pub fn copies(
    dir: &SandboxDir,
    id: &str,
    spec: &mut Spec,
    guests_own: impl Fn(&Mount) -> Option<PathBuf>,
) -> Result<Vec<Mounted>, Error> {
    let on_host = dir.container_share(id);
    let in_guest = Path::new(GUEST_SHARE).join(id);
    if let Some(root) = spec.root_mut() {
        root.set_path(in_guest.join("rootfs"));
    }
    let mounts = spec
        .mounts_mut()
        .as_mut()
        .map_or(&mut [][..], Vec::as_mut_slice);
    let binds = mounts.iter_mut().filter(|mount| is_bind(mount));
    let mut copies = Vec::new();
    for (index, mount) in binds.enumerate() {
        if index >= MAX_VOLUMES {
            return Err(Error::state(
                ErrorKind::InvalidArgument,
                format!("container {id} has more than {MAX_VOLUMES} volumes"),
            ));
        }
        // virtiofs has files and directories; the guest's kernel needs the flag, not the type.
        mount.set_typ(Some("bind".into()));
        let mapped = IdMap::of_mount(mount)?;
        mount.set_uid_mappings(None).set_gid_mappings(None);
        if let Some(own) = guests_own(mount) {
            mount.set_source(Some(own));
            continue;
        }
        let place = Path::new("volumes").join(index.to_string());
        let source = mount.source().clone().unwrap_or_default();
        let namespace = mapped.map(|map| map.user_namespace()).transpose()?;
        let bound = Bound {
            read_only: has_option(mount, "ro") || has_option(mount, "rro"),
            recursive: has_option(mount, "rro"),
            follow: has_option(mount, "rslave") || has_option(mount, "slave"),
            mapped_by: namespace.as_ref().map(AsFd::as_fd),
        };
        copies.push(Mounted {
            tree: copy(&source, &on_host.join(&place), bound)?,
            place: Path::new(id).join(&place),
        });
        if bound.read_only && !bound.recursive {
            leave_read_only_to_host(mount, &source, bound.follow)?;
        }
        mount.set_source(Some(in_guest.join(&place)));
    }
    Ok(copies)
}

/// What is mounted below a read-only volume may be written to. The guest has one file system of it all, which it could make
/// read-only as a whole only: the host alone does it then.
fn leave_read_only_to_host(mount: &mut Mount, source: &Path, follow: bool) -> Result<(), Error> {
    let source = canonical(source);
    if !follow && mounts_below(&source)?.iter().all(|at| *at == source) {
        return Ok(());
    }
    let options = mount.options().clone().unwrap_or_default();
    let others = options.into_iter().filter(|option| option != "ro");
    mount.set_options(Some(others.collect()));
    Ok(())
}

/// The mount that `--volume SRC:DST[:ro]` stands for.
///
/// # Errors
/// `InvalidArgument`: it is not of that form, or a path is not absolute.
pub fn parse(volume: &str) -> Result<Mount, Error> {
    let wrong = |why: &str| {
        Error::state(
            ErrorKind::InvalidArgument,
            format!("volume '{volume}': {why}; it is SRC:DST[:ro]"),
        )
    };
    let mut parts = volume.split(':');
    let (Some(source), Some(destination)) = (parts.next(), parts.next()) else {
        return Err(wrong("there is no destination"));
    };
    let mode = match (parts.next(), parts.next()) {
        (None | Some("rw"), None) => "rw",
        (Some("ro"), None) => "rro",
        _ => return Err(wrong("its mode is neither ro nor rw")),
    };
    let source = fs::canonicalize(source).map_err(|e| wrong(&format!("source {source}: {e}")))?;
    if !destination.starts_with('/') {
        return Err(wrong("the destination is no absolute path"));
    }
    let mut mount = Mount::default();
    mount.set_source(Some(source));
    mount.set_destination(PathBuf::from(destination));
    mount.set_typ(Some("bind".into()));
    mount.set_options(Some(vec!["rbind".into(), "rprivate".into(), mode.into()]));
    Ok(mount)
}

fn is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind")
        || has_option(mount, "bind")
        || has_option(mount, "rbind")
}

/// Whether a mount has an option.
pub(crate) fn has_option(mount: &Mount, option: &str) -> bool {
    let options = mount.options().as_deref().unwrap_or_default();
    options.iter().any(|o| o == option)
}

/// How a host path is bound.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bound<'a> {
    /// Nothing can be written to it.
    pub read_only: bool,
    /// ... nor to what is mounted below it.
    pub recursive: bool,
    /// What the host mounts below it later is seen too.
    pub follow: bool,
    /// Its owners are seen through this user namespace's maps; not those of what is mounted below it.
    pub mapped_by: Option<BorrowedFd<'a>>,
}

/// Binds `source`, a directory or a file, at `target`, which is made, in the calling process's mount namespace.
///
/// # Errors
/// `InvalidArgument`: the source does not exist.
pub fn bind(source: &Path, target: &Path, how: Bound<'_>) -> Result<(), Error> {
    let tree = copy(source, target, how)?;
    let from_tree = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(&tree, c"", CWD, target, from_tree)
        .map_err(|e| Error::host(sharing(source), e))
}

fn sharing(source: &Path) -> String {
    format!("sharing {} with the guest", source.display())
}

/// A detached copy of the mounts at `source`, a directory or a file, for `target`, which is made. Read-only is enforced
/// here too: the guest is not trusted to keep it.
fn copy(source: &Path, target: &Path, how: Bound<'_>) -> Result<OwnedFd, Error> {
    let action = || sharing(source);
    let host = |e: std::io::Error| Error::host(action(), e);
    let meta = fs::metadata(source)
        .map_err(|e| Error::state(ErrorKind::InvalidArgument, format!("{}: {e}", action())))?;
    let parent = target.parent().unwrap_or(target);
    fs::create_dir_all(parent).map_err(host)?;
    if meta.is_dir() {
        fs::create_dir(target).map_err(host)?;
    } else {
        File::create_new(target).map_err(host)?;
    }
    // Complete before it is attached: a guest that sees a mount sees it as it is to be.
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::AT_RECURSIVE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = rustix::mount::open_tree(CWD, source, flags).map_err(|e| host(e.into()))?;
    let propagation = if how.follow {
        libc::MS_SLAVE
    } else {
        libc::MS_PRIVATE
    };
    let mut attributes = libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID;
    if how.read_only && how.recursive {
        attributes |= libc::MOUNT_ATTR_RDONLY;
    }
    let all = libc::mount_attr {
        attr_set: attributes,
        propagation,
        ..NOTHING
    };
    set_attributes(&tree, all, libc::AT_RECURSIVE).map_err(host)?;
    if how.read_only && !how.recursive {
        let top = libc::mount_attr {
            attr_set: libc::MOUNT_ATTR_RDONLY,
            ..NOTHING
        };
        set_attributes(&tree, top, 0).map_err(host)?;
    }
    if let Some(namespace) = how.mapped_by {
        map_ids(&tree, namespace).map_err(host)?;
    }
    Ok(tree)
}

/// Has the owners on the top mount of a detached tree seen through the maps of a user namespace.
///
/// # Errors
/// The file system cannot, or the mount has been mapped already.
pub fn map_ids(tree: &OwnedFd, namespace: BorrowedFd<'_>) -> io::Result<()> {
    let mapped = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        userns_fd: u64::from(namespace.as_raw_fd().unsigned_abs()),
        ..NOTHING
    };
    set_attributes(tree, mapped, 0)
}

/// A setting that changes nothing.
const NOTHING: libc::mount_attr = libc::mount_attr {
    attr_set: 0,
    attr_clr: 0,
    propagation: 0,
    userns_fd: 0,
};

/// Changes a detached tree's mounts: the top one or, with `AT_RECURSIVE`, each. See mount_setattr(2).
fn set_attributes(tree: &OwnedFd, setting: libc::mount_attr, recursive: i32) -> io::Result<()> {
    // SAFETY: the path is a C string, and `setting` is the structure whose size is given; both outlive the call.
    let status = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | recursive,
            &raw const setting,
            size_of_val(&setting),
        )
    };
    if status == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_are_parsed_and_nonsense_is_told() {
        let mount = parse("/tmp:/data:ro").unwrap();
        assert_eq!(mount.destination(), Path::new("/data"));
        assert!(has_option(&mount, "rro"));
        assert!(has_option(&parse("/tmp:/data").unwrap(), "rw"));
        for wrong in [
            "/tmp",
            "/tmp:data",
            "/nonexistent-x:/d",
            "/tmp:/d:rx",
            "/tmp:/d:ro:x",
            "",
        ] {
            let error = parse(wrong).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{wrong}");
        }
    }
}
