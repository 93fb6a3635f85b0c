//! The init of a pod's shared pid namespace.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use oci_spec::runtime::LinuxNamespaceType as Type;

use super::namespaces::{IdMaps, Shared, SharedNamespaces, open};
use super::{Error, Result, spawn, sys};
use crate::reaper::Reaper;

/// The init of a pod's shared pid namespace: it holds the namespace and reaps its orphans, and does nothing else.
#[derive(Debug)]
pub struct PidHolder {
    child: Arc<spawn::Child>,
    namespace: Arc<OwnedFd>,
    /// The user namespace that the pids belong to, if that is not the guest's own.
    user: Option<(IdMaps, Arc<OwnedFd>)>,
}

impl PidHolder {
    /// Makes the namespace and its init: one fork. With `maps`, in a user namespace of these.
    pub fn spawn(reaper: &Reaper, maps: Option<IdMaps>) -> Result<Self> {
        let user = if maps.is_some() {
            libc::CLONE_NEWUSER
        } else {
            0
        };
        let kinds = libc::CLONE_NEWPID | user;
        let (child, _) = spawn::clone(reaper, kinds, None, || hold())?;
        let opened = |name: &str, typ| {
            let path = format!("/proc/{}/ns/{name}", child.pid);
            open(std::path::Path::new(&path), typ).map(Arc::new)
        };
        let made = (|| {
            let user = match maps {
                Some(maps) => {
                    maps.write(child.pid)?;
                    Some((maps, opened("user", Type::User)?))
                }
                None => None,
            };
            Ok((opened("pid", Type::Pid)?, user))
        })();
        match made {
            Ok((namespace, user)) => Ok(Self {
                child,
                namespace,
                user,
            }),
            Err(error) => {
                child.kill_and_reap(reaper);
                Err(error)
            }
        }
    }

    /// Puts a container whose own user namespace would have `maps` into the pod's pids, and into the user namespace that
    /// they belong to if that is the same.
    pub fn share(&self, maps: Option<&IdMaps>, with: &mut SharedNamespaces) {
        with.pid = Shared::Fd(self.namespace());
        if let Some((own, user)) = &self.user
            && maps == Some(own)
        {
            with.user = Shared::Fd(Arc::clone(user));
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
