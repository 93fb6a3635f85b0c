//! CreateContainer, Delete of a container, Pause, Resume, Update, and what is known of containers.

use std::sync::Arc;

use cella_proto::agent as proto;
use oci_spec::runtime::{LinuxResources, Spec};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::Agent;
use super::process::{process_stdio, size};
use super::state::{Container, Exec};
use crate::container::{self, SharedNamespaces, Stdio};
use crate::error::Error;
use crate::events::Events;
use crate::streams::Streams;

/// Length of a container's id at most: it becomes a directory's name.
const MAX_ID: usize = 128;
const SIGKILL: i32 = libc::SIGKILL;

impl Agent {
    /// Makes a container whose init waits for Start. Returns the init's pid.
    pub(super) async fn make_container(
        &self,
        request: &proto::CreateContainerRequest,
    ) -> Result<u32, Error> {
        self.prepare()?;
        let id = checked_id("container id", &request.container_id)?;
        let spec: Spec = parse("the OCI specification", &request.spec)?;
        let reservation = self.containers.reserve(id)?;
        let what = || format!("container {id:?}");
        let stdio = request.stdio.get_or_default();
        let has_terminal = spec
            .process()
            .as_ref()
            .is_some_and(|process| process.terminal().unwrap_or(false));
        let streams = Streams::open(&self.options.transport, stdio, has_terminal)
            .await
            .map_err(|source| Error::Streams {
                what: what(),
                source,
            })?;
        // From here to the end there is no await: a caller that goes away leaves a whole container or none.
        let (stdio, pending) = process_stdio(streams, has_terminal, size(stdio)?, &what)?;
        let shared = self.shared_namespaces(request.pod_pid_namespace)?;
        let created = self.create(id, &spec, stdio, &shared)?;
        let pid = created.container.pid();
        let exited = self.prepare()?.reaper.watch(pid);
        let terminal = match pending.start(created.terminal) {
            Ok(terminal) => terminal,
            Err(source) => {
                // The terminal's end of the agent is gone, so that nobody could talk to the process. The library
                // reaps it.
                self.prepare()?.reaper.forget(pid);
                let _ = created.container.delete();
                return Err(Error::Streams {
                    what: what(),
                    source,
                });
            }
        };
        let container = Container::new(created.container, terminal);
        reservation.fill(container.clone());
        let events = self.events.clone();
        tokio::spawn(async move {
            if let Ok(status) = exited.await {
                container.init_ended(status, &events);
            }
        });
        Ok(pid)
    }

    fn create(
        &self,
        id: &str,
        spec: &Spec,
        stdio: Stdio,
        shared: &SharedNamespaces,
    ) -> Result<container::Created, Error> {
        self.prepare()?
            .runtime
            .create(id, spec, stdio, shared)
            .map_err(|source| Error::Container {
                what: format!("creating container {id:?}"),
                source,
            })
    }

    /// Forgets a container and removes what it had. One that was never started is killed first.
    pub(super) async fn delete_container(&self, id: &str) -> Result<Option<proto::Exit>, Error> {
        let container = self.containers.get(id)?;
        let unstarted = {
            let mut state = container.lock();
            let runtime = state.runtime(id)?;
            match runtime.status() {
                container::Status::Stopped => false,
                container::Status::Created => {
                    runtime.kill_all(SIGKILL).map_err(failed("killing", id))?;
                    true
                }
                container::Status::Running => return Err(not_deletable(id, "it is running")),
                container::Status::Paused => return Err(not_deletable(id, "it is paused")),
            }
        };
        if unstarted {
            container.ended().await;
        }
        let (runtime, exit) = {
            let mut state = container.lock();
            (state.runtime.take(), state.exit.clone())
        };
        // Somebody else has deleted it meanwhile.
        let runtime = runtime.ok_or_else(|| Error::NoContainer(id.to_owned()))?;
        match runtime.delete() {
            Ok(()) => {}
            // The container is gone all the same, as OCI has it for these hooks.
            Err((_, error @ container::Error::Hook { .. })) => {
                let error = failed("deleting", id)(error);
                crate::power::report(&format!("cella-agent: {}\n", error.message()));
            }
            Err((runtime, error)) => {
                // It stays, so that Delete can be tried again.
                container.lock().runtime = Some(runtime);
                return Err(failed("deleting", id)(error));
            }
        }
        self.containers.remove(id);
        Ok(exit)
    }

    pub(super) fn pause_container(&self, id: &str) -> Result<(), Error> {
        let container = self.containers.get(id)?;
        let mut state = container.lock();
        state.runtime(id)?.freeze().map_err(failed("pausing", id))
    }

    pub(super) fn resume_container(&self, id: &str) -> Result<(), Error> {
        let container = self.containers.get(id)?;
        let mut state = container.lock();
        state.runtime(id)?.thaw().map_err(failed("resuming", id))
    }

    pub(super) fn update_container(&self, request: &proto::UpdateRequest) -> Result<(), Error> {
        let id = &request.container_id;
        let container = self.containers.get(id)?;
        let resources: LinuxResources = parse("the OCI resources", &request.resources)?;
        let mut state = container.lock();
        state
            .runtime(id)?
            .update(&resources)
            .map_err(failed("updating", id))
    }

    pub(super) fn container_stats(&self, id: &str) -> Result<proto::StatsResponse, Error> {
        let container = self.containers.get(id)?;
        let mut stats = container
            .lock()
            .runtime(id)?
            .stats()
            .map_err(failed("reading the counters of", id))?;
        stats.interfaces = crate::network::statistics()?;
        Ok(stats)
    }

    /// The counters of every container that has some, for Watch.
    pub(super) fn all_stats(&self) -> proto::StatsEvent {
        let containers = self.containers.all();
        let stats = containers
            .iter()
            .filter_map(|container| self.container_stats(&container.id).ok());
        proto::StatsEvent {
            containers: stats.collect(),
            ..Default::default()
        }
    }

    /// The exits that nobody has fetched by Delete.
    pub(super) fn exits(&self) -> Vec<proto::Event> {
        let mut exits = Vec::new();
        for container in self.containers.all() {
            let state = container.lock();
            exits.extend(state.exit.clone());
            exits.extend(state.execs.values().filter_map(|exec| match exec {
                Exec::Ended(exit) => Some(exit.clone()),
                Exec::Created(_) | Exec::Running(_) => None,
            }));
        }
        exits.into_iter().map(super::state::exit_event).collect()
    }

    pub(super) fn container_infos(&self) -> Vec<proto::ContainerInfo> {
        let containers = self.containers.all();
        containers
            .iter()
            .filter_map(|container| {
                let state = container.lock();
                let runtime = state.runtime.as_ref()?;
                Some(proto::ContainerInfo {
                    container_id: container.id.clone(),
                    state: proto_state(runtime.status()).into(),
                    pid: runtime.pid(),
                    exit: state.exit.clone().into(),
                    ..Default::default()
                })
            })
            .collect()
    }

    /// Kills everything that runs, without waiting for its end.
    pub(super) fn kill_everything(&self) {
        for container in self.containers.all() {
            if let Some(runtime) = &container.lock().runtime {
                // The guest ends anyway.
                let _ = runtime.kill_all(SIGKILL);
            }
        }
    }
}

/// Reports the container's out-of-memory kills from now to its end. Without a memory controller there are none.
pub(super) fn watch_oom(container: Arc<Container>, events: Arc<Events>) {
    let watch = {
        let state = container.lock();
        state
            .runtime
            .as_ref()
            .and_then(|runtime| runtime.oom_watch().ok())
    };
    let Some(watch) = watch else { return };
    let Ok(descriptor) = rustix::io::fcntl_dupfd_cloexec(watch.as_fd(), 0) else {
        return;
    };
    let registered = crate::ready::register(descriptor, Interest::PRIORITY);
    let Ok(changed) = registered else { return };
    tokio::spawn(async move {
        tokio::select! {
            () = container.ended() => {}
            () = report_ooms(&watch, &changed, &container, &events) => {}
        }
    });
}

async fn report_ooms(
    watch: &container::OomWatch,
    changed: &AsyncFd<std::os::fd::OwnedFd>,
    container: &Container,
    events: &Events,
) {
    while let Ok(mut ready) = changed.ready(Interest::PRIORITY).await {
        ready.clear_ready();
        let Ok(kills) = watch.kills() else { return };
        container.report_oom(kills, &mut container.lock(), events);
    }
}

/// `bytes` as JSON of type `T`.
pub(super) fn parse<T: serde::de::DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(bytes).map_err(|error| Error::Invalid {
        what: what.to_owned(),
        why: error.to_string(),
    })
}

/// `id`, if it is fit for a file's name.
pub(super) fn checked_id<'a>(what: &str, id: &'a str) -> Result<&'a str, Error> {
    let plain = id
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || b"-_.+".contains(&byte));
    if id.is_empty() || id.len() > MAX_ID || !plain || id.starts_with('.') {
        return Err(Error::Invalid {
            what: format!("{what} {id:?}"),
            why: format!(
                "not 1 to {MAX_ID} letters, digits, `-`, `_`, `+` or `.`, without a dot first"
            ),
        });
    }
    Ok(id)
}

/// An error of the library about container `id`.
pub(super) fn failed(doing: &str, id: &str) -> impl FnOnce(container::Error) -> Error {
    let what = format!("{doing} container {id:?}");
    move |source| Error::Container { what, source }
}

fn not_deletable(id: &str, state: &'static str) -> Error {
    Error::State {
        operation: "deleting",
        what: format!("container {id:?}"),
        state,
    }
}

fn proto_state(status: container::Status) -> proto::State {
    match status {
        container::Status::Created => proto::State::STATE_CREATED,
        container::Status::Running => proto::State::STATE_RUNNING,
        container::Status::Paused => proto::State::STATE_PAUSED,
        container::Status::Stopped => proto::State::STATE_STOPPED,
    }
}
