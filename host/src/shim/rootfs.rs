//! A container's root file system: the mounts that containerd's snapshotter names, made where virtiofs serves them.

use std::ffi::CString;
use std::fmt::Write as _;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

use containerd_shim_protos::types::mount::Mount;
use rustix::fs::{Mode, OFlags};
use rustix::mount::MountFlags;

use super::error::refuse;
use crate::error::ErrorKind;
use crate::sandbox::Error;
use crate::sandbox::volume::{self, Bound};

/// What mount(2) takes of options: a page with the zero byte at its end.
const MAX_OPTIONS: usize = 4095;
/// Host mounts of one root file system at most; a snapshotter gives one.
const MAX_MOUNTS: usize = 16;

/// Mounts the root file system at `target`, which is made. Without mounts, it is the directory `bundled`.
///
/// # Errors
/// `InvalidArgument`: a mount of a kind that there is not. Or the kernel's.
pub fn mount(mounts: &[Mount], bundled: &Path, target: &Path) -> Result<(), Error> {
    match mounts {
        [] => volume::bind(bundled, target, Bound::default()),
        [only] if only.type_ == "bind" || only.type_ == "rbind" => {
            let bound = Bound {
                read_only: only.options.iter().any(|option| option == "ro"),
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
            mounts.iter().try_for_each(|mount| mount_one(mount, target))
        }
    }
}

fn mount_one(mount: &Mount, target: &Path) -> Result<(), Error> {
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
        let options = ["index=off", "ro", "lowerdir=/a:/b"].map(str::to_owned);
        let (flags, data) = split(&options);
        assert_eq!(flags, MountFlags::RDONLY);
        assert_eq!(data, "index=off,lowerdir=/a:/b");
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
        let error = mount_one(&mount, Path::new("/nonexistent")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    }
}
