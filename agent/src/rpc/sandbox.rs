//! SetUpSandbox.

use cella_proto::agent::SetUpSandboxRequest;

use super::{Agent, lock};
use crate::container::namespaces::PidHolder;
use crate::container::{Shared, SharedNamespaces};
use crate::error::Error;
use crate::reaper::Reaper;

/// What SetUpSandbox leaves for the containers.
#[derive(Default)]
pub(super) struct State {
    set_up: bool,
    /// The guest is a template's, or was: what needs no identity is done.
    pub(super) prepared: bool,
    /// The namespaces that every container of the pod is in, unless its specification names another.
    pub(super) shared: SharedNamespaces,
    /// Keeps the pod's pid namespace alive.
    pids: Option<PidHolder>,
}

impl Agent {
    /// Sets the pod up, once. A set-up that failed may be tried again.
    pub(super) fn set_sandbox_up(&self, request: &SetUpSandboxRequest) -> Result<(), Error> {
        let reaper = &self.prepare()?.reaper;
        let mut state = lock(&self.sandbox);
        if state.set_up {
            return Err(Error::State {
                operation: "setting up",
                what: "the sandbox".to_owned(),
                state: "it is set up already",
            });
        }
        crate::sandbox::set_up(request, state.prepared)?;
        if !request.interfaces.is_empty() {
            crate::forward::start(&self.options.transport).map_err(|source| Error::System {
                what: format!("listening on port {}", crate::forward::PORT),
                source,
            })?;
        }
        if request.shared_pid_namespace {
            state.shared.pid = state.pod_pids(reaper)?;
        }
        state.set_up = true;
        Ok(())
    }

    /// Refuses what a guest must not do that every clone of it would find done: to begin with containers, or to draw
    /// what its kernel draws once.
    pub(super) fn refuse_without_identity(&self, operation: &'static str) -> Result<(), Error> {
        if !self.options.template || lock(&self.sandbox).set_up {
            return Ok(());
        }
        Err(Error::State {
            operation,
            what: "the sandbox".to_owned(),
            state: "it is a template's, and was not set up",
        })
    }

    /// The namespaces that a container shares with its pod; with `pod_pids`, the pod's pids are among them.
    pub(super) fn shared_namespaces(&self, pod_pids: bool) -> Result<SharedNamespaces, Error> {
        let reaper = &self.prepare()?.reaper;
        let mut state = lock(&self.sandbox);
        let mut shared = state.shared.clone();
        if pod_pids {
            shared.pid = state.pod_pids(reaper)?;
        }
        Ok(shared)
    }
}

impl State {
    /// The pod's pid namespace, made when it is first wanted.
    fn pod_pids(&mut self, reaper: &Reaper) -> Result<Shared, Error> {
        let holder = match self.pids.take() {
            Some(holder) => holder,
            None => PidHolder::spawn(reaper).map_err(|source| Error::Container {
                what: "making the pod's pid namespace".to_owned(),
                source,
            })?,
        };
        let namespace = holder.namespace();
        self.pids = Some(holder);
        Ok(Shared::Fd(namespace))
    }
}
