//! SetUpSandbox.

use cella_proto::agent::SetUpSandboxRequest;
use oci_spec::runtime::Spec;

use super::{Agent, lock};
use crate::container::SharedNamespaces;
use crate::container::namespaces::{IdMaps, PidHolder};
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
            let mut shared = state.shared.clone();
            state.share_pids(reaper, None, &mut shared)?;
            state.shared = shared;
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
    pub(super) fn shared_namespaces(
        &self,
        spec: &Spec,
        pod_pids: bool,
    ) -> Result<SharedNamespaces, Error> {
        let reaper = &self.prepare()?.reaper;
        let mut state = lock(&self.sandbox);
        let mut shared = state.shared.clone();
        if pod_pids {
            let maps = IdMaps::of(spec).map_err(making_pids)?;
            state.share_pids(reaper, maps, &mut shared)?;
        }
        Ok(shared)
    }
}

impl State {
    /// Adds the pod's pid namespace, made when it is first wanted: as whoever wants it first has ids.
    fn share_pids(
        &mut self,
        reaper: &Reaper,
        maps: Option<IdMaps>,
        with: &mut SharedNamespaces,
    ) -> Result<(), Error> {
        let holder = match self.pids.take() {
            Some(holder) => holder,
            None => PidHolder::spawn(reaper, maps.clone()).map_err(making_pids)?,
        };
        holder.share(maps.as_ref(), with);
        self.pids = Some(holder);
        Ok(())
    }
}

fn making_pids(source: crate::container::Error) -> Error {
    Error::Container {
        what: "making the pod's pid namespace".to_owned(),
        source,
    }
}
