//! CreateContainer, Delete of a container, Pause, Resume, Update, and what is known of containers.

use std::sync::Arc;

use cella_proto::agent as proto;
use oci_spec::runtime::{LinuxResources, Spec};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::Agent;
use super::process::{process_stdio, size};
use super::state::{Container, Exec};
use super::{CREATIONS, OPERATIONS, on_thread};
use crate::container::{self, Birth};
use crate::error::Error;
use crate::events::Events;
use crate::streams::Streams;

/// Length of a container's id at most: it becomes a directory's name.
const MAX_ID: usize = 128;
const SIGKILL: i32 = libc::SIGKILL;

/// The container that a template's guest makes before it is saved, up to its command, which there is not: every clone
/// finds what that needed the first time.
const REHEARSAL: &str = "rehearsal";

impl Agent {
    /// Makes a container whose init waits for Start. Returns the init's pid.
    pub(super) async fn make_container(
        &self,
        request: &proto::CreateContainerRequest,
    ) -> Result<u32, Error> {
        let id = checked_id("container id", &request.container_id)?;
        if id != REHEARSAL {
            self.refuse_without_identity("creating a container in")?;
        }
        let spec: Spec = parse("the OCI specification", &request.spec)?;
        let birth = Arc::new(Birth::default());
        let reservation = self.containers.reserve(id, birth.clone())?;
        let creating = || format!("creating container {id:?}");
        let slot = self.slot(CREATIONS, &creating)?;
        let what = || format!("container {id:?}");
        let stdio = request.stdio.get_or_default();
        let has_terminal = spec
            .process()
            .as_ref()
            .is_some_and(|process| process.terminal().unwrap_or(false));
        let mut streams = Streams::open(&self.options.transport, stdio, has_terminal)
            .await
            .map_err(|source| Error::Streams {
                what: what(),
                source,
            })?;
        let replacements = streams.replacements();
        let (stdio, pending) = process_stdio(streams, has_terminal, size(stdio)?, &what)?;
        let shared = self.shared_namespaces(&spec, request.pod_pid_namespace)?;
        let runtime = self.prepare()?.runtime.clone();
        let name = id.to_owned();
        let created = on_thread(slot, &creating, move || {
            runtime.create(&name, &spec, stdio, &shared, &birth)
        })
        .await?;
        let runtime = Arc::new(created.container);
        let pid = runtime.pid();
        let terminal = match pending.start(created.terminal) {
            Ok(terminal) => terminal,
            Err(source) => {
                // The terminal's end of the agent is gone, so that nobody could talk to the process.
                let slot = self.slot(usize::MAX, &creating)?;
                let _ = slot.run(move || runtime.delete()).await;
                return Err(Error::Streams {
                    what: what(),
                    source,
                });
            }
        };
        let container = Container::new(runtime, terminal, replacements);
        reservation.fill(container.clone());
        let events = self.events.clone();
        tokio::spawn(async move {
            if let Ok(status) = created.ending.await {
                container.init_ended(status, &events);
            }
        });
        Ok(pid)
    }

    /// Gives the streams of a container's init other connections.
    pub(super) async fn attach(&self, request: &proto::AttachRequest) -> Result<(), Error> {
        let id = &request.container_id;
        let container = self.containers.get(id)?;
        let terminal = container.lock().terminal.is_some();
        let stdio = request.stdio.get_or_default();
        let streams = Streams::open(&self.options.transport, stdio, terminal)
            .await
            .map_err(|source| Error::Streams {
                what: format!("container {id:?}"),
                source,
            })?;
        streams.take_over(&container.replacements).await;
        Ok(())
    }

    /// Forgets a container and removes what it had. One that was never started is killed first.
    pub(super) async fn delete_container(&self, id: &str) -> Result<Option<proto::Exit>, Error> {
        let container = self.containers.get(id)?;
        let deleted = self
            .operate(&container, "deleting", |runtime| runtime.delete())
            .await;
        match deleted {
            Ok(()) => {}
            // The container is gone all the same, as OCI has it for these hooks.
            Err(
                error @ Error::Container {
                    source: container::Error::Hook { .. },
                    ..
                },
            ) => crate::power::report(&format!("cella-agent: {}\n", error.message())),
            // It stays, so that Delete can be tried again.
            Err(error) => return Err(error),
        }
        container.ended().await;
        self.containers.remove(id);
        let exit = container.lock().exit.clone();
        Ok(exit)
    }

    pub(super) async fn pause_container(&self, id: &str) -> Result<(), Error> {
        let container = self.containers.get(id)?;
        self.operate(&container, "pausing", |runtime| runtime.freeze())
            .await
    }

    pub(super) async fn resume_container(&self, id: &str) -> Result<(), Error> {
        let container = self.containers.get(id)?;
        self.operate(&container, "resuming", |runtime| runtime.thaw())
            .await
    }

    pub(super) async fn update_container(
        &self,
        request: &proto::UpdateRequest,
    ) -> Result<(), Error> {
        let container = self.containers.get(&request.container_id)?;
        let resources: LinuxResources = parse("the OCI resources", &request.resources)?;
        self.operate(&container, "updating", move |runtime| {
            runtime.update(&resources)
        })
        .await
    }

    /// Something of the library's that may take long, on a thread.
    pub(super) async fn operate<T: Send + 'static>(
        &self,
        container: &Container,
        doing: &str,
        work: impl FnOnce(&container::Container) -> container::Result<T> + Send + 'static,
    ) -> Result<T, Error> {
        let what = || format!("{doing} container {:?}", container.id);
        let slot = self.slot(OPERATIONS, &what)?;
        let runtime = container.runtime.clone();
        on_thread(slot, &what, move || work(&runtime)).await
    }

    pub(super) fn container_stats(&self, id: &str) -> Result<proto::StatsResponse, Error> {
        let container = self.containers.get(id)?;
        let stats = container.runtime.stats();
        let mut stats = stats.map_err(failed("reading the counters of", id))?;
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
                Exec::Created(_) | Exec::Starting(_) | Exec::Running(_) => None,
            }));
        }
        exits.into_iter().map(super::state::exit_event).collect()
    }

    pub(super) fn container_infos(&self) -> Vec<proto::ContainerInfo> {
        let containers = self.containers.all();
        containers
            .iter()
            .map(|container| proto::ContainerInfo {
                container_id: container.id.clone(),
                state: proto_state(container.runtime.status()).into(),
                pid: container.runtime.pid(),
                exit: container.lock().exit.clone().into(),
                ..Default::default()
            })
            .collect()
    }

    /// Kills everything that runs, without waiting for its end.
    pub(super) fn kill_everything(&self) {
        // The guest ends anyway.
        for birth in self.containers.births() {
            let _ = birth.signal(SIGKILL);
        }
        for container in self.containers.all() {
            let _ = container.runtime.kill_all(SIGKILL);
        }
    }
}

/// Reports the container's out-of-memory kills from now to its end. Without a memory controller there are none.
pub(super) fn watch_oom(container: Arc<Container>, events: Arc<Events>) {
    let Ok(watch) = container.runtime.oom_watch() else {
        return;
    };
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

/// What others see of a container while something is under way: what it was, until it is something else.
fn proto_state(status: container::Status) -> proto::State {
    use container::Status;
    match status {
        Status::Created | Status::Starting => proto::State::STATE_CREATED,
        Status::Running | Status::Pausing => proto::State::STATE_RUNNING,
        Status::Paused | Status::Resuming => proto::State::STATE_PAUSED,
        Status::Stopped | Status::Deleting => proto::State::STATE_STOPPED,
    }
}
