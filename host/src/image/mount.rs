//! Root file systems of containers: overlay mounts over an image's layers or directory.

use std::ffi::CString;
use std::fmt::Write as _;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

use super::error::{Context, Error, Result};
use super::tree::remove_tree;

/// How many mounts [`release`] takes off one mount point before it gives up.
const STACKED_MOUNTS: usize = 64;
/// What the mount table shows as the source of these mounts.
const SOURCE: &str = "cella";

/// A mounted root file system. Dropping it unmounts it and removes what was written to it; see
/// [`keep`](Self::keep).
#[derive(Debug)]
#[must_use = "dropping it unmounts the root file system"]
pub struct RootfsMount {
    target: PathBuf,
    scratch: PathBuf,
    kept: bool,
}

/// Where overlayfs keeps what is written, in a mount's `scratch`.
pub fn upper(scratch: &Path) -> PathBuf {
    scratch.join("upper")
}

impl RootfsMount {
    /// Mounts the directories `lower`, the topmost last, at `target` by overlayfs. What is written goes
    /// to `upper` and `work` in `scratch`, which must be empty or not exist, on a file system that can
    /// be overlayfs's upper one (not another overlay, not NFS).
    pub(super) fn overlay(lower: &[&Path], target: &Path, scratch: &Path) -> Result<Self> {
        make_dir(scratch, 0o700)?;
        make_dir(target, 0o755)?;
        // From here on, whatever was made is taken back if a later step fails.
        let mount = Self {
            target: target.to_path_buf(),
            scratch: scratch.to_path_buf(),
            kept: false,
        };
        let (upper, work) = (upper(scratch), scratch.join("work"));
        make_dir(&upper, 0o755)?;
        make_dir(&work, 0o700)?;
        let lower = visible(lower)?;
        let mut dirs = Vec::with_capacity(lower.len().saturating_add(2));
        let mut options = String::from("index=off,metacopy=off,redirect_dir=nofollow,lowerdir=");
        if lower.is_empty() {
            // Overlayfs wants one lower directory at least.
            let empty = scratch.join("empty");
            make_dir(&empty, 0o755)?;
            add_dir(&mut options, &mut dirs, &empty, "")?;
        }
        for (index, dir) in lower.iter().rev().enumerate() {
            add_dir(
                &mut options,
                &mut dirs,
                dir,
                if index == 0 { "" } else { ":" },
            )?;
        }
        copy_root_attributes(lower.last().copied(), &upper)?;
        add_dir(&mut options, &mut dirs, &upper, ",upperdir=")?;
        add_dir(&mut options, &mut dirs, &work, ",workdir=")?;
        let options = CString::new(options).map_err(std::io::Error::other);
        let options = options.context("mount the root file system at", target)?;
        // The host itself never opens an image's devices or runs its set-id programs; within the guest
        // these flags mean nothing.
        let flags = MountFlags::NODEV | MountFlags::NOSUID;
        rustix::mount::mount(SOURCE, target, "overlay", flags, options.as_c_str())
            .context("mount the root file system at", target)?;
        Ok(mount)
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.target
    }

    /// Unmounts it, and removes the mount point and what was written.
    pub fn unmount(mut self) -> Result<()> {
        self.kept = true;
        release(&self.target, &self.scratch)
    }

    /// Leaves it mounted when this is dropped: it then belongs to whoever calls [`release`] with the
    /// same paths, which may be another process.
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for RootfsMount {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        if let Err(error) = release(&self.target, &self.scratch) {
            tracing::warn!(error = %error.chain(), "a root file system could not be removed");
        }
    }
}

/// Takes all mounts off `target`, and removes it and the directory `scratch`. What of this is done
/// already, or was never made, is passed over: so this cleans up after a process that died at any point.
pub fn release(target: &Path, scratch: &Path) -> Result<()> {
    for _ in 0..STACKED_MOUNTS {
        // A lazy unmount: the virtual machine that still has a file open must not keep the name.
        match rustix::mount::unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            // Not a mount point (any more), or not there at all.
            Err(Errno::INVAL | Errno::NOENT) => break,
            Err(error) => return Err(error).context("unmount", target),
        }
    }
    // Never recursive: if anything were still mounted here, it would be what is in it.
    match rustix::fs::rmdir(target) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(error) => return Err(error).context("remove the mount point", target),
    }
    remove_tree(scratch)
}

fn make_dir(path: &Path, mode: u32) -> Result<()> {
    match std::fs::DirBuilder::new().mode(mode).create(path) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        result => result.context("make the directory", path),
    }
}

/// The layers that show: each directory once, where it is topmost (a layer that repeats has nothing to
/// add below, and overlayfs refuses it), and none below a layer whose root is opaque, since overlayfs
/// does not look for that mark on roots.
fn visible<'a>(lower: &[&'a Path]) -> Result<Vec<&'a Path>> {
    let mut visible: Vec<&Path> = Vec::with_capacity(lower.len());
    for dir in lower.iter().rev() {
        if visible.contains(dir) {
            continue;
        }
        visible.push(dir);
        let mut value = [0; 8];
        match rustix::fs::lgetxattr(*dir, "trusted.overlay.opaque", &mut value) {
            Ok(_) => break,
            Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::RANGE) => {}
            Err(error) => return Err(error).context("look at the layer", dir),
        }
    }
    visible.reverse();
    Ok(visible)
}

/// The mount's root shows the owner and mode of the upper directory.
fn copy_root_attributes(top: Option<&Path>, upper: &Path) -> Result<()> {
    let Some(top) = top else { return Ok(()) };
    let stat = rustix::fs::stat(top).context("look at the layer", top)?;
    let (uid, gid) = (
        rustix::fs::Uid::from_raw(stat.st_uid),
        rustix::fs::Gid::from_raw(stat.st_gid),
    );
    rustix::fs::chown(upper, Some(uid), Some(gid)).context("set the owner of", upper)?;
    let mode = Mode::from_raw_mode(stat.st_mode);
    rustix::fs::chmod(upper, mode).context("set the mode of", upper)
}

/// Adds a directory to the mount's options, by the name of an open descriptor: mount(2) takes one page
/// of options, which the paths of some dozen layers would overflow, and paths may have colons and
/// commas in them. The descriptors need to be open only until the mount is made.
fn add_dir(
    options: &mut String,
    dirs: &mut Vec<OwnedFd>,
    path: &Path,
    separator: &str,
) -> Result<()> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = rustix::fs::open(path, flags, Mode::empty()).context("open the directory", path)?;
    write!(options, "{separator}/proc/self/fd/{}", fd.as_raw_fd())
        .map_err(|_| Error::limit("the mount's options", "a page"))?;
    dirs.push(fd);
    Ok(())
}

#[cfg(test)]
#[path = "mount_tests.rs"]
mod tests;
