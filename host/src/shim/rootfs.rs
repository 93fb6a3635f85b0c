//! A container's root file system: the mounts that containerd's snapshotter names, made where virtiofs serves them.

use std::ffi::CString;
use std::fmt::Write as _;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use containerd_shim_protos::types::mount::Mount;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags};

use super::error::refuse;
use crate::error::ErrorKind;
use crate::sandbox::Error;
use crate::sandbox::idmap::IdMap;
use crate::sandbox::volume::{self, Bound};

/// What mount(2) takes of options: a page with the zero byte at its end.
const MAX_OPTIONS: usize = 4095;
/// Host mounts of one root file system at most; a snapshotter gives one.
const MAX_MOUNTS: usize = 16;

/// Options that say by which ids a user namespace's container sees its layers: containerd's, not the kernel's.
const UID_MAP: &str = "uidmap=";
const GID_MAP: &str = "gidmap=";

/// Mounts the root file system at `target`, which is made. Without mounts, it is the directory `bundled`. `scratch` is for
/// the time of the call, and of no other.
///
/// # Errors
/// `InvalidArgument`: a mount of a kind that there is not. Or the kernel's.
pub fn mount(mounts: &[Mount], bundled: &Path, target: &Path, scratch: &Path) -> Result<(), Error> {
    match mounts {
        [] => volume::bind(bundled, target, Bound::default()),
        [only] if only.type_ == "bind" || only.type_ == "rbind" => {
            let namespace = mapping(&only.options)?;
            let bound = Bound {
                read_only: only.options.iter().any(|option| option == "ro"),
                mapped_by: namespace.as_ref().map(AsFd::as_fd),
                ..Bound::default()
            };
            volume::bind(Path::new(&only.source), target, bound)
        }
        _ if mounts.len() > MAX_MOUNTS => Err(refuse(
            ErrorKind::InvalidArgument,
            format!("a root file system of more than {MAX_MOUNTS} mounts"),
        )),
        _ => {
            std::fs::create_dir_all(target)
                .map_err(|e| Error::host(format!("making {}", target.display()), e))?;
            let mut mounts = mounts.iter();
            mounts.try_for_each(|mount| mount_one(mount, target, scratch))
        }
    }
}

fn mount_one(mount: &Mount, target: &Path, scratch: &Path) -> Result<(), Error> {
    let target = match mount.target.trim_start_matches('/') {
        "" => target.to_path_buf(),
        below if below.split('/').any(|part| part == "..") => {
            return Err(refuse(
                ErrorKind::InvalidArgument,
                format!("mount target {} leaves the root file system", mount.target),
            ));
        }
        below => target.join(below),
    };
    let action = || {
        format!(
            "mounting {} ({}) at {}",
            mount.source,
            mount.type_,
            target.display()
        )
    };
    let (flags, data) = split(&mount.options);
    // Held until the mount is made.
    let mut layers = Vec::new();
    let mapped = match mapping(&mount.options)? {
        Some(namespace) => Some(MappedLayers::mount(&data, &namespace, scratch)?),
        None => None,
    };
    let data = mapped.as_ref().map_or(data, |mapped| mapped.data.clone());
    let data = match mount.type_.as_str() {
        "overlay" if data.len() > MAX_OPTIONS => shorten(&data, &mut layers)?,
        _ => data,
    };
    let data = CString::new(data).map_err(|e| Error::host(action(), e))?;
    rustix::mount::mount(
        mount.source.as_str(),
        &target,
        mount.type_.as_str(),
        // The host itself never opens an image's devices or runs its set-id programs; in the guest these flags mean
        // nothing.
        flags | MountFlags::NODEV | MountFlags::NOSUID,
        data.as_c_str(),
    )
    .map_err(|e| Error::host(action(), e))
}

/// The user namespace whose maps a mount's options ask for.
fn mapping(options: &[String]) -> Result<Option<OwnedFd>, Error> {
    let value = |key: &str| options.iter().find_map(|option| option.strip_prefix(key));
    match (value(UID_MAP), value(GID_MAP)) {
        (None, None) => Ok(None),
        (uids, gids) => {
            let map = IdMap::parse(uids.unwrap_or_default(), gids.unwrap_or_default())?;
            map.user_namespace().map(Some)
        }
    }
}

/// The lower layers of an overlay, id-mapped: the overlay itself cannot be. The directory that has them all is mounted
/// until this is dropped; the overlay keeps what it has of it.
struct MappedLayers {
    /// The overlay's options, with the layers' paths there.
    data: String,
    place: PathBuf,
}

impl MappedLayers {
    fn mount(data: &str, namespace: &OwnedFd, scratch: &Path) -> Result<Self, Error> {
        let layers = data
            .split(',')
            .find_map(|option| option.strip_prefix("lowerdir="));
        let common = layers.and_then(common_parent).ok_or_else(|| {
            refuse(
                ErrorKind::InvalidArgument,
                format!("id-mapped layers without a directory that has them all: '{data}'"),
            )
        })?;
        let action = || format!("mapping the ids of layers in {}", common.display());
        std::fs::create_dir(scratch).map_err(|e| Error::host(action(), e))?;
        let place = Self {
            data: relocate(data, &common, scratch),
            place: scratch.to_path_buf(),
        };
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let tree =
            rustix::mount::open_tree(CWD, &common, flags).map_err(|e| Error::host(action(), e))?;
        volume::map_ids(&tree, namespace.as_fd()).map_err(|e| Error::host(action(), e))?;
        let from_tree = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        rustix::mount::move_mount(&tree, c"", CWD, scratch, from_tree)
            .map_err(|e| Error::host(action(), e))?;
        Ok(place)
    }
}

impl Drop for MappedLayers {
    fn drop(&mut self) {
        let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
        // Not mounted, if making it failed.
        let _ = rustix::mount::unmount(&self.place, flags);
        if let Err(error) = std::fs::remove_dir(&self.place) {
            tracing::warn!("removing {}: {error}", self.place.display());
        }
    }
}

/// The deepest directory above every path of a colon-separated list.
fn common_parent(layers: &str) -> Option<PathBuf> {
    let mut layers = layers.split(':').map(Path::new);
    let mut common = layers.next()?.parent()?;
    for layer in layers {
        while !layer.starts_with(common) || layer == common {
            common = common.parent()?;
        }
    }
    (common.is_absolute() && common != Path::new("/")).then(|| common.to_path_buf())
}

/// An overlay's options with the lower layers' paths below `to` instead of `from`.
fn relocate(data: &str, from: &Path, to: &Path) -> String {
    let options = data.split(',').map(|option| {
        let Some(layers) = option.strip_prefix("lowerdir=") else {
            return option.to_owned();
        };
        let layers = layers.split(':').map(|layer| {
            let below = Path::new(layer)
                .strip_prefix(from)
                .unwrap_or(Path::new(layer));
            to.join(below).display().to_string()
        });
        format!("lowerdir={}", layers.collect::<Vec<_>>().join(":"))
    });
    options.collect::<Vec<_>>().join(",")
}

/// mount(2)'s flags among the options, and the rest, which is the file system's.
fn split(options: &[String]) -> (MountFlags, String) {
    let mut flags = MountFlags::empty();
    let mut data: Vec<&str> = Vec::new();
    for option in options {
        match option.as_str() {
            "ro" => flags |= MountFlags::RDONLY,
            "rw" | "defaults" => flags -= MountFlags::RDONLY,
            "noatime" => flags |= MountFlags::NOATIME,
            "nodiratime" => flags |= MountFlags::NODIRATIME,
            "relatime" => flags |= MountFlags::RELATIME,
            "sync" => flags |= MountFlags::SYNCHRONOUS,
            "nosuid" | "nodev" | "noexec" => {}
            other if other.starts_with(UID_MAP) || other.starts_with(GID_MAP) => {}
            other => data.push(other),
        }
    }
    (flags, data.join(","))
}

/// Replaces the paths of lower layers by names of open descriptors: the paths of some dozen layers pass a page.
fn shorten(data: &str, layers: &mut Vec<File>) -> Result<String, Error> {
    let mut short = String::new();
    for option in data.split(',') {
        if !short.is_empty() {
            short.push(',');
        }
        let Some(lower) = option.strip_prefix("lowerdir=") else {
            short.push_str(option);
            continue;
        };
        short.push_str("lowerdir=");
        for (index, layer) in lower.split(':').enumerate() {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let dir = rustix::fs::open(layer, flags, Mode::empty())
                .map_err(|e| Error::host(format!("opening layer {layer}"), e))?;
            let separator = if index == 0 { "" } else { ":" };
            // Writing to a String cannot fail.
            let _ = write!(short, "{separator}/proc/self/fd/{}", dir.as_raw_fd());
            layers.push(dir.into());
        }
    }
    Ok(short)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_flags_and_data() {
        let options = ["index=off", "ro", "lowerdir=/a:/b", "uidmap=0:1:2"].map(str::to_owned);
        let (flags, data) = split(&options);
        assert_eq!(flags, MountFlags::RDONLY);
        assert_eq!(data, "index=off,lowerdir=/a:/b");
    }

    #[test]
    fn mapped_layers_are_below_one_directory() {
        let common = |layers| common_parent(layers);
        assert_eq!(common("/s/2/fs:/s/1/fs"), Some("/s".into()));
        assert_eq!(common("/s/12/fs:/s/1/fs"), Some("/s".into()));
        assert_eq!(common("/s/1/fs"), Some("/s/1".into()));
        assert_eq!(common("/s/1:/s"), None);
        assert_eq!(common("/a/fs:/b/fs"), None);
        assert_eq!(common("a/fs"), None);
        let data = "workdir=/s/w,lowerdir=/s/2/fs:/s/1/fs";
        assert_eq!(
            relocate(data, Path::new("/s"), Path::new("/t")),
            "workdir=/s/w,lowerdir=/t/2/fs:/t/1/fs"
        );
    }

    #[test]
    fn many_layers_fit_into_a_page() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("d".repeat(200));
        std::fs::create_dir(&deep).unwrap();
        let lower = vec![deep.to_str().unwrap(); 100].join(":");
        let data = format!("workdir=/w,lowerdir={lower},upperdir=/u");
        let mut layers = Vec::new();
        let short = shorten(&data, &mut layers).unwrap();
        assert!(short.len() < MAX_OPTIONS, "{}", short.len());
        assert!(
            short.starts_with("workdir=/w,lowerdir=/proc/self/fd/")
                && short.ends_with(",upperdir=/u")
        );
        assert_eq!(layers.len(), 100);
    }

    #[test]
    fn mounts_stay_in_their_place() {
        let mount = Mount {
            type_: "tmpfs".into(),
            target: "/../../etc".into(),
            ..Default::default()
        };
        let nowhere = Path::new("/nonexistent");
        let error = mount_one(&mount, nowhere, nowhere).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    }
}
