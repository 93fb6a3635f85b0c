//! Mounts in the mount namespace of a VMM: the host's other processes have none of them, and need not undo any.
//!
//! Who removes a mount point from the host takes the mount away with it (rmdir(2), unlink(2): only a mount of the
//! caller's own namespace is busy), and the namespace ends with the VMM.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::CWD;
use rustix::mount::MoveMountFlags;
use rustix::thread::{ThreadNameSpaceType, UnshareFlags};

/// Where the VMM has the sandbox's shared directory: `vmm::jail::SHARE`.
const VMM_SHARE: &str = "/share";

/// A mount for a VMM alone.
#[derive(Debug)]
pub struct Mounted {
    /// The detached tree.
    pub tree: OwnedFd,
    /// Its mount point in the shared directory, which is there.
    pub place: PathBuf,
}

/// Mounts detached trees in the mount namespace of the VMM that `vmm`, a pidfd, is.
///
/// # Errors
/// The VMM is gone, or a place is not there.
pub fn attach(vmm: BorrowedFd<'_>, mounts: &[Mounted]) -> io::Result<()> {
    if mounts.is_empty() {
        return Ok(());
    }
    let attach_all = || {
        // SAFETY: no descriptors are unshared; the thread has opened no path yet.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }?;
        rustix::thread::move_into_thread_name_spaces(vmm, ThreadNameSpaceType::MOUNT)?;
        for Mounted { tree, place } in mounts {
            let place = Path::new(VMM_SHARE).join(place);
            let from_tree = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
            rustix::mount::move_mount(tree, c"", CWD, place, from_tree)?;
        }
        Ok(())
    };
    // Only who shares root and working directory with nobody can change its mount namespace: a thread, for this alone.
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("vmm-mounts".into());
        let attached = thread.spawn_scoped(scope, attach_all)?.join();
        attached.unwrap_or_else(|_| Err(io::Error::other("the thread has panicked")))
    })
}
