//! SetUpSandbox.

use cella_proto::agent::SetUpSandboxRequest;

use super::{Agent, lock};
use crate::container::namespaces::PidHolder;
use crate::container::{Shared, SharedNamespaces};
use crate::error::Error;

/// What SetUpSandbox leaves for the containers.
#[derive(Default)]
pub(super) struct State {
    set_up: bool,
    /// The namespaces that every container of the pod is in, unless its specification names another.
    pub(super) shared: SharedNamespaces,
    /// Keeps the pod's pid namespace alive.
    pids: Option<PidHolder>,
}

impl Agent {
    /// Sets the pod up, once. A set-up that failed may be tried again.
    pub(super) fn set_sandbox_up(&self, request: &SetUpSandboxRequest) -> Result<(), Error> {
        self.prepare()?;
        let mut state = lock(&self.sandbox);
        if state.set_up {
            return Err(Error::State {
                operation: "setting up",
                what: "the sandbox".to_owned(),
                state: "it is set up already",
            });
        }
        crate::sandbox::set_up(request)?;
        if !request.interfaces.is_empty() {
            crate::forward::start(&self.options.transport).map_err(|source| Error::System {
                what: format!("listening on port {}", crate::forward::PORT),
                source,
            })?;
        }
        if request.shared_pid_namespace && state.pids.is_none() {
            let holder = PidHolder::spawn().map_err(|source| Error::Container {
                what: "making the pod's pid namespace".to_owned(),
                source,
            })?;
            state.shared.pid = Shared::Fd(holder.namespace());
            state.pids = Some(holder);
        }
        state.set_up = true;
        Ok(())
    }
}
