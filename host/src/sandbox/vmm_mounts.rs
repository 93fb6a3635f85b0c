//! Mounts in the mount namespace of a sandbox's VMM: the host's other processes have none of them, and need not undo any.
//!
//! Who removes a mount point from the host takes the mount away with it (rmdir(2), unlink(2): only a mount of the
//! caller's own namespace is busy), and the namespace ends with the VMM.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::CWD;
use rustix::mount::MoveMountFlags;
use rustix::thread::{ThreadNameSpaceType, UnshareFlags};

use super::state::ProcessId;

/// Where the VMM has the sandbox's shared directory: `vmm::jail::SHARE`.
const VMM_SHARE: &str = "/share";

/// Mounts detached trees, each at its place in the shared directory of the container `id`.
///
/// # Errors
/// The VMM is gone, or a place is not there.
pub(super) fn attach(vmm: ProcessId, id: &str, trees: Vec<(OwnedFd, PathBuf)>) -> io::Result<()> {
    let pidfd = vmm.pidfd()?;
    let share = Path::new(VMM_SHARE).join(id);
    // A thread can only change its mount namespace if nobody shares its root and working directory; what is left of
    // those then ends with it.
    let thread = std::thread::Builder::new().name("vmm-mounts".into());
    let attached = thread.spawn(move || {
        // SAFETY: no descriptors are unshared; the thread has opened no path yet.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }?;
        rustix::thread::move_into_thread_name_spaces(pidfd.as_fd(), ThreadNameSpaceType::MOUNT)?;
        for (tree, place) in trees {
            let from_tree = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
            rustix::mount::move_mount(&tree, c"", CWD, share.join(place), from_tree)?;
        }
        Ok(())
    })?;
    attached
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("the thread has panicked")))
}
