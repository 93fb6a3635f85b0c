//! The one fork of a process: `clone3` with everything the kernel can do along with it.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::{Arc, OnceLock};

use super::sys;
use super::{Error, Result};
use crate::reaper::{Ending, Reaper};

/// A child of the agent's.
#[derive(Debug)]
pub(super) struct Child {
    pub pid: u32,
    pub pidfd: OwnedFd,
}

/// The process that is being made for a caller, from the moment there is one: a slow one can be signalled.
#[derive(Debug, Default)]
pub struct Birth(OnceLock<Arc<Child>>);

impl Birth {
    /// There is a process now.
    pub(super) fn set(&self, child: &Arc<Child>) {
        // Each process has a Birth of its own.
        let _ = self.0.set(Arc::clone(child));
    }

    /// Signals the process; false if there is none yet. One that has ended needs no signal.
    pub fn signal(&self, signal: i32) -> Result<bool> {
        match self.0.get() {
            Some(child) => child.signal(signal).map(|()| true),
            None => Ok(false),
        }
    }
}

impl Child {
    /// `pidfd_send_signal`; one that has ended needs no signal.
    pub(super) fn signal(&self, signal: i32) -> Result<()> {
        check_signal(signal)?;
        // SAFETY: plain numbers and a null siginfo.
        let result = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.pidfd.as_raw_fd(),
                signal,
                std::ptr::null::<u8>(),
                0u32,
            )
        };
        let error = std::io::Error::last_os_error();
        if result < 0 && error.raw_os_error() != Some(libc::ESRCH) {
            let step = format!("sending signal {signal} to process {}", self.pid);
            return Err(Error::Process {
                step,
                source: error,
            });
        }
        Ok(())
    }

    /// Kills one that shall not live and reaps it, or sees to it that the reaper has: its [`Ending`] has been told.
    pub(super) fn kill_and_reap(&self, reaper: &Reaper) {
        // It may have ended by itself, which is as good.
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, rustix::process::Signal::KILL);
        self.reap(reaper);
    }

    /// Waits for its end and reaps it, unless the reaper has.
    pub(super) fn reap(&self, reaper: &Reaper) {
        // Fails once the reaper has it, which is as good.
        let _ = rustix::io::retry_on_intr(|| {
            rustix::process::waitid(
                rustix::process::WaitId::PidFd(self.pidfd.as_fd()),
                rustix::process::WaitIdOptions::EXITED | rustix::process::WaitIdOptions::NOWAIT,
            )
        });
        reaper.reap_child(self.pid);
    }
}

/// Refuses what is no signal.
pub(super) fn check_signal(signal: i32) -> Result<()> {
    // SIGRTMAX is 64 to the kernel; 0 only asks whether there is a process.
    if (1..=64).contains(&signal) {
        return Ok(());
    }
    Err(Error::invalid("signal", format!("{signal} is no signal")))
}

/// Makes a child in new namespaces `kinds` and, if given, in `cgroup`. `body` must make system calls only: the child
/// is a copy of the agent's memory with one of its threads, and whatever lock another thread held stays held in it,
/// the allocator's too. Signals caught by the agent have their default action in it.
pub(super) fn clone(
    reaper: &Reaper,
    kinds: i32,
    cgroup: Option<BorrowedFd<'_>>,
    body: impl FnOnce(),
) -> Result<(Arc<Child>, Ending)> {
    let mut pidfd: RawFd = -1;
    let mut flags = kinds as u64 | libc::CLONE_PIDFD as u64 | CLONE_CLEAR_SIGHAND;
    if cgroup.is_some() {
        flags |= CLONE_INTO_CGROUP;
    }
    // SAFETY: all zeroes is a valid clone_args.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = flags;
    args.pidfd = (&raw mut pidfd) as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    args.cgroup = cgroup.map_or(0, |fd| u64::from(fd.as_raw_fd().unsigned_abs()));
    let mut pid = 0;
    let ending = reaper.fork(|| {
        // SAFETY: without CLONE_VM and with the caller's stack, it is a fork: the child has its own copy of everything.
        let result = unsafe {
            libc::syscall(
                libc::SYS_clone3,
                &raw mut args,
                size_of::<libc::clone_args>(),
            )
        };
        match result {
            0 => {
                body();
                sys::exit(1)
            }
            result if result > 0 => {
                pid = u32::try_from(result).unwrap_or_default();
                Ok(pid)
            }
            _ => Err(Error::Process {
                step: "making a new process".into(),
                source: std::io::Error::last_os_error(),
            }),
        }
    })?;
    let pidfd = sys::owned(pidfd);
    Ok((Arc::new(Child { pid, pidfd }), ending))
}

const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

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
