//! What the agent knows of its containers and their processes. Each container has a lock of its own, held for the
//! time of a step and never across an await.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use cella_proto::agent::{Event, Exit};
use oci_spec::runtime::Process;
use rustix::time::ClockId;
use tokio::sync::{Semaphore, watch};

use super::lock;
use crate::container::{self, Birth};
use crate::error::Error;
use crate::events::Events;
use crate::streams::{Replacements, Streams, Terminal};

/// Execs of one container on their way to `execve` at once.
const EXECS: usize = 8;

/// The containers by their ids.
#[derive(Default)]
pub(super) struct Containers(Mutex<BTreeMap<String, Slot>>);

enum Slot {
    /// Somebody makes a container of this id; it may have an init already.
    Making(Arc<Birth>),
    Made(Arc<Container>),
}

/// One container.
pub(super) struct Container {
    pub(super) id: String,
    pub(super) runtime: Arc<container::Container>,
    /// Bounds the execs that are on their way to `execve`: a container that is slow to execute has so many of the
    /// agent's threads, and the next ones wait.
    pub(super) execs: Semaphore,
    /// For the streams of the init.
    pub(super) replacements: Replacements,
    state: Mutex<State>,
    /// Becomes true at the end of the init.
    ended: watch::Sender<bool>,
}

/// What a container's lock guards.
pub(super) struct State {
    pub(super) terminal: Option<Terminal>,
    /// Of the init, once it has ended.
    pub(super) exit: Option<Exit>,
    /// Calls of Start under way. Until the last is over, nobody knows what the init's end means.
    starts: usize,
    /// How the init ended meanwhile.
    ended_with: Option<u32>,
    /// The exit status that a failed start makes it.
    verdict: Option<u32>,
    pub(super) execs: BTreeMap<String, Exec>,
    /// Out-of-memory kills that were reported.
    pub(super) oom_kills: u64,
}

/// A process beside the init.
pub(super) enum Exec {
    /// Made by Exec and not started yet.
    Created(Box<Prepared>),
    /// On its way to `execve`.
    Starting(Starting),
    Running(Running),
    Ended(Exit),
}

/// What Start needs.
pub(super) struct Prepared {
    pub(super) process: Process,
    pub(super) streams: Streams,
    pub(super) size: Option<(u16, u16)>,
}

/// A process that is being started.
pub(super) struct Starting {
    pub(super) birth: Arc<Birth>,
    /// The size that its terminal was given meanwhile.
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
    /// Takes `id` for a new container, whose init will be `birth`'s.
    ///
    /// # Errors
    ///
    /// [`Error::ContainerExists`].
    pub(super) fn reserve(&self, id: &str, birth: Arc<Birth>) -> Result<Reservation<'_>, Error> {
        let mut map = lock(&self.0);
        if map.contains_key(id) {
            return Err(Error::ContainerExists(id.to_owned()));
        }
        map.insert(id.to_owned(), Slot::Making(birth));
        Ok(Reservation {
            containers: self,
            id: Some(id.to_owned()),
        })
    }

    /// # Errors
    ///
    /// [`Error::NoContainer`]; [`Error::State`] for one that is being made.
    pub(super) fn get(&self, id: &str) -> Result<Arc<Container>, Error> {
        match lock(&self.0).get(id) {
            Some(Slot::Made(container)) => Ok(container.clone()),
            Some(Slot::Making(_)) => Err(Error::State {
                operation: "using",
                what: format!("container {id:?}"),
                state: "it is being created",
            }),
            None => Err(Error::NoContainer(id.to_owned())),
        }
    }

    /// The init to be of a container that is being made.
    pub(super) fn birth(&self, id: &str) -> Option<Arc<Birth>> {
        match lock(&self.0).get(id) {
            Some(Slot::Making(birth)) => Some(birth.clone()),
            Some(Slot::Made(_)) | None => None,
        }
    }

    /// Those that are being made.
    pub(super) fn births(&self) -> Vec<Arc<Birth>> {
        let map = lock(&self.0);
        map.values()
            .filter_map(|slot| match slot {
                Slot::Making(birth) => Some(birth.clone()),
                Slot::Made(_) => None,
            })
            .collect()
    }

    pub(super) fn all(&self) -> Vec<Arc<Container>> {
        let map = lock(&self.0);
        map.values()
            .filter_map(|slot| match slot {
                Slot::Made(container) => Some(container.clone()),
                Slot::Making(_) => None,
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
    pub(super) fn new(
        runtime: Arc<container::Container>,
        terminal: Option<Terminal>,
        replacements: Replacements,
    ) -> Arc<Self> {
        Arc::new(Self {
            id: runtime.id().to_owned(),
            runtime,
            execs: Semaphore::new(EXECS),
            replacements,
            state: Mutex::new(State {
                terminal,
                exit: None,
                starts: 0,
                ended_with: None,
                verdict: None,
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

    /// A call of Start is under way.
    pub(super) fn start_begins(&self) {
        let mut state = self.lock();
        state.starts = state.starts.saturating_add(1);
    }

    /// A call of Start is over; one that failed with the init may have a `verdict` for its exit status.
    pub(super) fn start_is_over(&self, verdict: Option<u32>, events: &Events) {
        let ended = {
            let mut state = self.lock();
            state.starts = state.starts.saturating_sub(1);
            state.verdict = verdict.or(state.verdict);
            match state.starts {
                0 => state.ended_with.take(),
                _ => None,
            }
        };
        if let Some(status) = ended {
            self.init_ended(status, events);
        }
    }

    /// The init has ended with `status`.
    pub(super) fn init_ended(&self, status: u32, events: &Events) {
        self.runtime.set_stopped();
        let exit = {
            let mut state = self.lock();
            if state.starts > 0 {
                state.ended_with = Some(status);
                return;
            }
            let status = state.verdict.unwrap_or(status);
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
        let kills = self.runtime.oom_kills().unwrap_or(0);
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
    /// What Start needs of a process that was made by Exec: for one of several callers.
    ///
    /// # Errors
    ///
    /// [`Error::NoProcess`]; [`Error::State`] when it was started already.
    pub(super) fn take_prepared(
        &mut self,
        container: &str,
        exec_id: &str,
        birth: &Arc<Birth>,
    ) -> Result<Prepared, Error> {
        let exec = self.exec(container, exec_id)?;
        let starting = Exec::Starting(Starting {
            birth: birth.clone(),
            size: None,
        });
        match std::mem::replace(exec, starting) {
            Exec::Created(prepared) => Ok(*prepared),
            other => {
                *exec = other;
                Err(Error::State {
                    operation: "starting",
                    what: format!("process {exec_id:?} of container {container:?}"),
                    state: "it was started already",
                })
            }
        }
    }

    /// A process that was being started runs.
    pub(super) fn set_running(&mut self, exec_id: &str, running: Running) {
        let was = self.execs.get(exec_id);
        if let (Some(Exec::Starting(Starting { size, .. })), Some(terminal)) =
            (was, &running.terminal)
            && let Some((rows, columns)) = *size
        {
            // As a late resize of one that has ended.
            let _ = terminal.resize(rows, columns);
        }
        self.execs
            .insert(exec_id.to_owned(), Exec::Running(running));
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
