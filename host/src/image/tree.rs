//! Removal of directory trees of any depth.

use std::ffi::{CStr, OsStr};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{AtFlags, Dir, Mode, OFlags};
use rustix::io::Errno;

use super::error::{Context, Error, Result};

/// How often directories that are not empty yet are looked at again.
const RETRIES: u32 = 1000;

/// Removes the directory (or file) at `path` with all that is in it; none there is fine.
///
/// Unlike the standard library's, it holds two descriptors however deep the tree is, which an image or
/// a guest decides: each directory found is moved up beside `path` and then emptied in its turn. Links
/// are removed and never followed. What is mounted beneath is not touched, and is an error.
///
/// The parent must be a directory that nobody else makes names in that begin with the last component
/// of `path` and a dot.
pub fn remove_tree(path: &Path) -> Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Error::option(
            path.display().to_string(),
            "it cannot be removed",
        ));
    };
    let parent = if parent.as_os_str().is_empty() {
        Path::new(".")
    } else {
        parent
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let parent_fd = match rustix::fs::open(parent, flags, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(()),
        result => result.context("open the directory", parent)?,
    };
    remove_at(parent_fd.as_fd(), name).context("remove", path)
}

fn remove_at(parent: BorrowedFd<'_>, name: &OsStr) -> rustix::io::Result<()> {
    match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR) => {}
        Err(error) => return Err(error),
    }
    let mut moved = 0u64;
    let mut waiting = vec![name.as_bytes().to_vec()];
    let mut tries = 0;
    while let Some(dir) = waiting.pop() {
        empty(parent, &dir, |dir_fd, child| {
            loop {
                let mut place = name.as_bytes().to_vec();
                place.extend_from_slice(format!(".{moved}").as_bytes());
                moved = moved.wrapping_add(1);
                let flags = rustix::fs::RenameFlags::NOREPLACE;
                match rustix::fs::renameat_with(dir_fd, child, parent, place.as_slice(), flags) {
                    // Left by a removal that was interrupted.
                    Err(Errno::EXIST) => {}
                    result => {
                        result?;
                        waiting.push(place);
                        return Ok(());
                    }
                }
            }
        })?;
        match rustix::fs::unlinkat(parent, dir.as_slice(), AtFlags::REMOVEDIR) {
            // Some file systems leave names out of a listing that is unlinked from meanwhile.
            Err(Errno::NOTEMPTY) if tries < RETRIES => {
                tries = tries.saturating_add(1);
                waiting.push(dir);
            }
            result => result?,
        }
    }
    Ok(())
}

/// Unlinks all that is in `name` but directories, which `each_dir` takes out of it.
fn empty(
    parent: BorrowedFd<'_>,
    name: &[u8],
    mut each_dir: impl FnMut(BorrowedFd<'_>, &CStr) -> rustix::io::Result<()>,
) -> rustix::io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(parent, name, flags, Mode::empty())?;
    let mut dir = Dir::read_from(&fd)?;
    while let Some(entry) = dir.read() {
        let entry = entry?;
        let child = entry.file_name();
        if matches!(child.to_bytes(), b"." | b"..") {
            continue;
        }
        match rustix::fs::unlinkat(&fd, child, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(Errno::ISDIR) => each_dir(fd.as_fd(), child)?,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "tree_tests.rs"]
mod tests;
