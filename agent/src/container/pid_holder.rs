//! The init of a pod's shared pid namespace.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use oci_spec::runtime::LinuxNamespaceType as Type;

use super::namespaces::open;
use super::{Error, Result, spawn, sys};
use crate::reaper::Reaper;

/// The init of a pod's shared pid namespace: it holds the namespace and reaps its orphans, and does nothing else.
#[derive(Debug)]
pub struct PidHolder {
    child: Arc<spawn::Child>,
    namespace: Arc<OwnedFd>,
}

impl PidHolder {
    /// Makes the namespace and its init: one fork.
    pub fn spawn(reaper: &Reaper) -> Result<Self> {
        let (child, _) = spawn::clone(reaper, libc::CLONE_NEWPID, None, || hold())?;
        let path = format!("/proc/{}/ns/pid", child.pid);
        match open(std::path::Path::new(&path), Type::Pid) {
            Ok(namespace) => Ok(Self {
                child,
                namespace: Arc::new(namespace),
            }),
            Err(error) => {
                child.kill_and_reap(reaper);
                Err(error)
            }
        }
    }

    /// Its pid in the agent's namespace.
    pub fn pid(&self) -> u32 {
        self.child.pid
    }

    /// Readable once it has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.child.pidfd.as_fd()
    }

    /// For [`SharedNamespaces::pid`].
    pub fn namespace(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.namespace)
    }

    /// Ends it, and every process of the namespace with it. The caller reaps it, after those of the processes that
    /// are the agent's children: it ends only when they are gone.
    pub fn kill(&self) -> Result<()> {
        rustix::process::pidfd_send_signal(&self.child.pidfd, rustix::process::Signal::KILL)
            .map_err(|e| Error::Process {
                step: "ending the pod's pid namespace".into(),
                source: e.into(),
            })
    }
}

/// The holder's life. It keeps all capabilities and is not dumpable, so that no container may look into it: it still
/// has the guest's root directory.
fn hold() -> ! {
    let _ = sys::prctl(libc::PR_SET_DUMPABLE, 0, 0);
    // SAFETY: a C string with a NUL, which prctl copies.
    unsafe { libc::prctl(libc::PR_SET_NAME, c"pause".as_ptr()) };
    let _ = sys::setsid();
    let _ = sys::close_range(0, u32::MAX);
    // SAFETY: an all-zero set is valid; SIGCHLD is blocked so that sigwait sees each.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is a valid set.
    unsafe {
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut());
    }
    loop {
        // SAFETY: reaps whatever has ended; no status is wanted.
        while unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) } > 0 {}
        // SAFETY: waits for a signal of a valid set; no information is wanted.
        unsafe { libc::sigwaitinfo(&raw const set, std::ptr::null_mut()) };
    }
}
