//! PID 1's duty: every child that ends is waited for, those of the containers and the orphans that fall to it.
//!
//! Processes are made on the threads of [`crate::workers`] and reaped on the agent's own. One lock is held for the
//! fork and the note of its pid ([`Reaper::fork`]), and for each wait and the news of it, so that no child is reaped
//! before it is known, and no number that the kernel gives away again is taken for the one it was.

use std::collections::HashMap;
use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::process::{Pid, WaitOptions, WaitStatus};
use tokio::io::Interest;
use tokio::sync::oneshot;

/// Added to a signal's number for the exit status of a process that it killed, as OCI runtimes do.
const SIGNAL_BASE: u32 = 128;

/// Waits for every child of the agent.
#[derive(Debug, Default)]
pub struct Reaper {
    watched: Mutex<Watched>,
}

type Watched = HashMap<u32, oneshot::Sender<u32>>;

/// The exit status of a child, once it has ended: 0 to 255, or 128 + N for a death by signal N.
pub type Ending = oneshot::Receiver<u32>;

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

    /// Makes a child with `fork`, which returns its pid, and returns what will tell of its end. What `fork` does is to
    /// be short: no child is reaped meanwhile.
    ///
    /// # Errors
    ///
    /// Those of `fork`.
    pub fn fork<E>(&self, fork: impl FnOnce() -> Result<u32, E>) -> Result<Ending, E> {
        let mut watched = self.watched();
        let pid = fork()?;
        let (sender, receiver) = oneshot::channel();
        watched.insert(pid, sender);
        Ok(receiver)
    }

    /// Reaps `child`, if it has ended and is not reaped yet: when this returns, [`Ending`] has told of its end.
    pub fn reap_child(&self, child: u32) {
        let mut watched = self.watched();
        let pid = i32::try_from(child).ok().and_then(Pid::from_raw);
        if let Some(pid) = pid
            && let Ok(Some((_, status))) = rustix::process::waitpid(Some(pid), WaitOptions::NOHANG)
        {
            tell(&mut watched, pid, status);
        }
    }

    fn reap(&self) {
        loop {
            // Taken anew for each, so that a fork need not wait for all of them.
            let mut watched = self.watched();
            let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) else {
                return;
            };
            tell(&mut watched, pid, status);
        }
    }

    fn watched(&self) -> MutexGuard<'_, Watched> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells whoever waits for the end of `pid`.
fn tell(watched: &mut Watched, pid: Pid, status: WaitStatus) {
    let Some(status) = exit_status(status) else {
        return;
    };
    let pid = pid.as_raw_nonzero().get().unsigned_abs();
    if let Some(watcher) = watched.remove(&pid) {
        // Nobody waits any more for a process whose container's making failed.
        let _ = watcher.send(status);
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
