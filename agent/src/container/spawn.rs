//! The one fork of a process: `clone3` with everything the kernel can do along with it.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use super::sys;
use super::{Error, Result};

/// A child of the agent's.
#[derive(Debug)]
pub(super) struct Child {
    pub pid: u32,
    pub pidfd: OwnedFd,
}

/// Makes a child in new namespaces `kinds` and, if given, in `cgroup`. `body` must make system calls only: the child
/// is a copy of the agent, whose locks other threads may have held. Signals caught by the agent have their default
/// action in it.
pub(super) fn clone(
    kinds: i32,
    cgroup: Option<BorrowedFd<'_>>,
    body: impl FnOnce(),
) -> Result<Child> {
    let mut pidfd: RawFd = -1;
    let mut flags = kinds as u64 | libc::CLONE_PIDFD as u64 | CLONE_CLEAR_SIGHAND;
    if cgroup.is_some() {
        flags |= CLONE_INTO_CGROUP;
    }
    // SAFETY: all zeroes is a valid clone_args.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = flags;
    args.pidfd = std::ptr::from_mut(&mut pidfd) as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    args.cgroup = cgroup.map_or(0, |fd| u64::from(fd.as_raw_fd().unsigned_abs()));
    // SAFETY: without CLONE_VM and with the caller's stack, it is a fork: the child has its own copy of everything.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw mut args,
            size_of::<libc::clone_args>(),
        )
    };
    match pid {
        0 => {
            body();
            sys::exit(1)
        }
        pid if pid > 0 => Ok(Child {
            pid: u32::try_from(pid).unwrap_or_default(),
            pidfd: sys::owned(pidfd),
        }),
        _ => Err(Error::Process {
            step: "making a new process".into(),
            source: std::io::Error::last_os_error(),
        }),
    }
}

const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Kills a child that shall not live, and reaps it.
pub(super) fn kill_and_reap(pidfd: &OwnedFd) {
    // It may have ended by itself, which is as good.
    let _ = rustix::process::pidfd_send_signal(pidfd, rustix::process::Signal::KILL);
    let _ = rustix::io::retry_on_intr(|| {
        rustix::process::waitid(
            rustix::process::WaitId::PidFd(pidfd.as_fd()),
            rustix::process::WaitIdOptions::EXITED,
        )
    });
}

/// Closes, in the child, all descriptors from 3 up but those of `keep`, which is sorted.
pub(super) fn close_others(keep: &[RawFd]) -> sys::SysResult {
    let mut next = 3u32;
    for fd in keep {
        let fd = fd.unsigned_abs();
        if fd > next {
            sys::close_range(next, fd.saturating_sub(1))?;
        }
        next = next.max(fd.saturating_add(1));
    }
    sys::close_range(next, u32::MAX)
}
