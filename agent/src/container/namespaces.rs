//! Namespaces.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use super::Result;

/// What a namespace of the spec without a path means in this pod.
#[derive(Clone, Debug, Default)]
pub enum Shared {
    /// The container gets a new one.
    #[default]
    None,
    /// The agent's own, that is the guest's.
    Guest,
    /// This one is joined.
    Fd(Arc<OwnedFd>),
}

/// The namespaces that the containers of a pod share.
#[derive(Clone, Debug)]
pub struct SharedNamespaces {
    /// Network: never new; `None` counts as `Guest`.
    pub network: Shared,
    /// System V IPC and POSIX queues.
    pub ipc: Shared,
    /// Host name.
    pub uts: Shared,
    /// Process ids.
    pub pid: Shared,
}

impl Default for SharedNamespaces {
    fn default() -> Self {
        Self {
            network: Shared::Guest,
            ipc: Shared::Guest,
            uts: Shared::Guest,
            pid: Shared::None,
        }
    }
}

/// The init of a pod's shared pid namespace.
#[derive(Debug)]
pub struct PidHolder {
    pid: u32,
    pidfd: OwnedFd,
    namespace: Arc<OwnedFd>,
}

impl PidHolder {
    /// Makes the namespace and its init.
    pub fn spawn() -> Result<Self> {
        Err(super::Error::Died)
    }
    /// Its pid in the agent's namespace.
    pub fn pid(&self) -> u32 {
        self.pid
    }
    /// Readable once it has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
    /// For [`SharedNamespaces::pid`].
    pub fn namespace(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.namespace)
    }
    /// Ends it, and every process of the namespace with it. The caller reaps it.
    pub fn kill(&self) -> Result<()> {
        Err(super::Error::Died)
    }
}
