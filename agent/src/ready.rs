//! Descriptors that the runtime waits on.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// `descriptor` with its readiness, on the current runtime.
///
/// # Errors
///
/// Those of epoll_ctl(2): EPERM for a file that is always ready.
pub fn register(descriptor: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd names one open descriptor, the same for as long as it lives, and closes it only when the
    // AsyncFd that owns it has ended its registration.
    let registered = unsafe { AsyncFd::register_with_interest(descriptor, interest) };
    Ok(registered?)
}
