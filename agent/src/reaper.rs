//! PID 1's duty: every child that ends is waited for, those of the containers and the orphans that fall to it.
//!
//! The agent has one thread, so that a fork and [`Reaper::watch`] of its pid have no reaping between them
//! unless there is an await between them. Whoever forks registers before it awaits, and no exit is lost.

use std::collections::HashMap;
use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::process::{Pid, WaitOptions, WaitStatus};
use tokio::io::Interest;
use tokio::sync::oneshot;

/// Added to a signal's number for the exit status of a process that it killed, as OCI runtimes do.
const SIGNAL_BASE: u32 = 128;

/// Waits for every child of the agent.
#[derive(Debug, Default)]
pub struct Reaper {
    watched: Mutex<HashMap<u32, oneshot::Sender<u32>>>,
}

impl Reaper {
    /// Starts reaping on the current runtime, for as long as it lives.
    ///
    /// # Errors
    ///
    /// Those of sigprocmask(2) and signalfd(2).
    pub fn start() -> io::Result<Arc<Self>> {
        let reaper = Arc::new(Self::default());
        let signals = crate::ready::register(child_signals()?, Interest::READABLE)?;
        let task = reaper.clone();
        tokio::spawn(async move {
            while let Ok(mut ready) = signals.readable().await {
                // What the signals say is not asked for: several deaths may have left one signal.
                let mut info = [0u8; size_of::<libc::signalfd_siginfo>()];
                match rustix::io::read(&signals, &mut info) {
                    Ok(_) => task.reap(),
                    Err(_) => ready.clear_ready(),
                }
            }
        });
        Ok(reaper)
    }

    /// The exit status of child `pid`, once it has ended: 0 to 255, or 128 + N for a death by signal N. Call this
    /// after the fork, with no await in between.
    pub fn watch(&self, pid: u32) -> oneshot::Receiver<u32> {
        let (sender, receiver) = oneshot::channel();
        let mut watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        watched.insert(pid, sender);
        receiver
    }

    /// Nobody waits for `pid` any more: whoever made it has reaped it. The kernel may give the number away again.
    pub fn forget(&self, pid: u32) {
        let mut watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        watched.remove(&pid);
    }

    fn reap(&self) {
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            self.ended(pid, status);
        }
    }

    fn ended(&self, pid: Pid, status: WaitStatus) {
        let Some(status) = exit_status(status) else {
            return;
        };
        let mut watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        let pid = pid.as_raw_nonzero().get().unsigned_abs();
        if let Some(watcher) = watched.remove(&pid) {
            // Nobody waits any more for a process whose container's making failed.
            let _ = watcher.send(status);
        }
    }
}

/// What OCI runtimes report for `status`; nothing for a process that has not ended.
fn exit_status(status: WaitStatus) -> Option<u32> {
    if let Some(signal) = status.terminating_signal() {
        return Some(SIGNAL_BASE.saturating_add(signal.unsigned_abs()));
    }
    status.exit_status().map(i32::unsigned_abs)
}

/// A descriptor that is readable when a child has ended. Blocks SIGCHLD, so that it waits there.
fn child_signals() -> io::Result<OwnedFd> {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set that the others read; all pointers are to this frame.
    let descriptor = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), libc::SIGCHLD);
        libc::sigprocmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
        libc::signalfd(-1, set.as_ptr(), libc::SFD_NONBLOCK | libc::SFD_CLOEXEC)
    };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: signalfd has just made this descriptor and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}
