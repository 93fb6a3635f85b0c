//! What the agent knows of its containers and their processes. Each container has a lock of its own, held for the
//! time of a step and never across an await.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use cella_proto::agent::{Event, Exit};
use oci_spec::runtime::Process;
use rustix::time::ClockId;
use tokio::sync::watch;

use super::lock;
use crate::container;
use crate::error::Error;
use crate::events::Events;
use crate::streams::{Streams, Terminal};

/// The containers by their ids.
#[derive(Default)]
pub(super) struct Containers(Mutex<BTreeMap<String, Slot>>);

enum Slot {
    /// Somebody makes a container of this id.
    Reserved,
    Made(Arc<Container>),
}

/// One container.
pub(super) struct Container {
    pub(super) id: String,
    state: Mutex<State>,
    /// Becomes true at the end of the init.
    ended: watch::Sender<bool>,
}

/// What a container's lock guards.
pub(super) struct State {
    /// Taken by Delete.
    pub(super) runtime: Option<container::Container>,
    pub(super) terminal: Option<Terminal>,
    /// Of the init, once it has ended.
    pub(super) exit: Option<Exit>,
    pub(super) execs: BTreeMap<String, Exec>,
    /// Out-of-memory kills that were reported.
    pub(super) oom_kills: u64,
}

/// A process beside the init.
pub(super) enum Exec {
    /// Made by Exec and not started yet.
    Created(Box<Prepared>),
    Running(Running),
    Ended(Exit),
}

/// What Start needs.
pub(super) struct Prepared {
    pub(super) process: Process,
    pub(super) streams: Streams,
    pub(super) size: Option<(u16, u16)>,
}

/// A process that runs.
pub(super) struct Running {
    pub(super) process: container::Process,
    pub(super) terminal: Option<Terminal>,
}

/// An id that is taken until the container is there, or this is dropped.
pub(super) struct Reservation<'a> {
    containers: &'a Containers,
    id: Option<String>,
}

impl Containers {
    /// Takes `id` for a new container.
    ///
    /// # Errors
    ///
    /// [`Error::ContainerExists`].
    pub(super) fn reserve(&self, id: &str) -> Result<Reservation<'_>, Error> {
        let mut map = lock(&self.0);
        if map.contains_key(id) {
            return Err(Error::ContainerExists(id.to_owned()));
        }
        map.insert(id.to_owned(), Slot::Reserved);
        Ok(Reservation {
            containers: self,
            id: Some(id.to_owned()),
        })
    }

    /// # Errors
    ///
    /// [`Error::NoContainer`].
    pub(super) fn get(&self, id: &str) -> Result<Arc<Container>, Error> {
        match lock(&self.0).get(id) {
            Some(Slot::Made(container)) => Ok(container.clone()),
            // One that is being made cannot be asked for anything yet.
            Some(Slot::Reserved) | None => Err(Error::NoContainer(id.to_owned())),
        }
    }

    pub(super) fn all(&self) -> Vec<Arc<Container>> {
        let map = lock(&self.0);
        map.values()
            .filter_map(|slot| match slot {
                Slot::Made(container) => Some(container.clone()),
                Slot::Reserved => None,
            })
            .collect()
    }

    pub(super) fn remove(&self, id: &str) {
        lock(&self.0).remove(id);
    }
}

impl Reservation<'_> {
    /// The container is there.
    pub(super) fn fill(mut self, container: Arc<Container>) {
        if let Some(id) = self.id.take() {
            lock(&self.containers.0).insert(id, Slot::Made(container));
        }
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        if let Some(id) = &self.id {
            self.containers.remove(id);
        }
    }
}

impl Container {
    pub(super) fn new(runtime: container::Container, terminal: Option<Terminal>) -> Arc<Self> {
        Arc::new(Self {
            id: runtime.id().to_owned(),
            state: Mutex::new(State {
                runtime: Some(runtime),
                terminal,
                exit: None,
                execs: BTreeMap::new(),
                oom_kills: 0,
            }),
            ended: watch::Sender::new(false),
        })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Until the init has ended.
    pub(super) async fn ended(&self) {
        // The sender lives as long as self does.
        let _ = self.ended.subscribe().wait_for(|ended| *ended).await;
    }

    /// The init has ended with `status`.
    pub(super) fn init_ended(&self, status: u32, events: &Events) {
        let exit = {
            let mut state = self.lock();
            if let Some(runtime) = &mut state.runtime {
                runtime.set_stopped();
            }
            let exit = self.exit("", status, &mut state, events);
            state.exit = Some(exit.clone());
            exit
        };
        let _ = self.ended.send_replace(true);
        events.publish(&exit_event(exit));
    }

    /// Process `exec_id` has ended with `status`.
    pub(super) fn exec_ended(&self, exec_id: &str, status: u32, events: &Events) {
        let exit = {
            let mut state = self.lock();
            let exit = self.exit(exec_id, status, &mut state, events);
            if let Some(exec) = state.execs.get_mut(exec_id) {
                *exec = Exec::Ended(exit.clone());
            }
            exit
        };
        events.publish(&exit_event(exit));
    }

    /// An exit of this container just now. An out-of-memory kill that nobody knows of yet is told first.
    fn exit(&self, exec_id: &str, status: u32, state: &mut State, events: &Events) -> Exit {
        // A guest without the memory controller has no such kills to count.
        let kills = state
            .runtime
            .as_ref()
            .and_then(|runtime| runtime.oom_kills().ok());
        let kills = kills.unwrap_or(0);
        self.report_oom(kills, state, events);
        Exit {
            container_id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            exit_status: status,
            exited_at_ns: wall_clock(),
            oom_killed: kills > 0,
            ..Default::default()
        }
    }

    /// Publishes an Oom event if there are more kills than were reported.
    pub(super) fn report_oom(&self, kills: u64, state: &mut State, events: &Events) {
        if kills > state.oom_kills {
            state.oom_kills = kills;
            let mut event = Event::new();
            event.mut_oom().container_id.clone_from(&self.id);
            events.publish(&event);
        }
    }
}

impl State {
    /// The library's container.
    ///
    /// # Errors
    ///
    /// [`Error::NoContainer`] when Delete has taken it.
    pub(super) fn runtime(&mut self, id: &str) -> Result<&mut container::Container, Error> {
        self.runtime
            .as_mut()
            .ok_or_else(|| Error::NoContainer(id.to_owned()))
    }

    /// # Errors
    ///
    /// [`Error::NoProcess`].
    pub(super) fn exec(&mut self, container: &str, exec: &str) -> Result<&mut Exec, Error> {
        self.execs.get_mut(exec).ok_or_else(|| Error::NoProcess {
            container: container.to_owned(),
            exec: exec.to_owned(),
        })
    }
}

/// `exit` as Watch tells it.
pub(super) fn exit_event(exit: Exit) -> Event {
    let mut event = Event::new();
    event.set_exit(exit);
    event
}

/// Nanoseconds since the epoch.
fn wall_clock() -> i64 {
    let now = rustix::time::clock_gettime(ClockId::Realtime);
    now.tv_sec
        .saturating_mul(1_000_000_000)
        .saturating_add(now.tv_nsec)
}
