//! Exec, Start, Signal, Delete of a process, terminals, and the list of processes.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use cella_proto::agent as proto;
use oci_spec::runtime::Process;

use super::container::{checked_id, failed, parse, watch_oom};
use super::state::{Container, Exec, Prepared, Running};
use super::{Agent, OPERATIONS, on_thread};
use crate::container::{self, Birth, Kind, Stdio};
use crate::error::Error;
use crate::reaper::Ending;
use crate::streams::{self, Pipes, Streams, Terminal};

/// Exit statuses of a command that could not be executed, as shells and container runtimes have them.
const STATUS_NOT_FOUND: u32 = 127;
const STATUS_NOT_EXECUTABLE: u32 = 126;
const STATUS_FAILED: u32 = 255;
/// The highest signal of Linux.
const MAX_SIGNAL: u32 = 64;

/// Streams that move bytes once the process is there.
pub(super) enum Pending {
    Pipes(Pipes),
    Terminal(Streams),
}

impl Pending {
    /// The process has its ends of the pipes, or made the terminal behind `master`.
    pub(super) fn start(self, master: Option<OwnedFd>) -> Result<Option<Terminal>, streams::Error> {
        match (self, master) {
            (Pending::Terminal(streams), Some(master)) => streams.attach(master).map(Some),
            (Pending::Terminal(_), None) => Ok(None),
            (Pending::Pipes(pipes), _) => {
                pipes.run();
                Ok(None)
            }
        }
    }
}

/// What the library gives the process, and what is kept for [`Pending::start`].
pub(super) fn process_stdio(
    streams: Streams,
    terminal: bool,
    size: Option<(u16, u16)>,
    what: &impl Fn() -> String,
) -> Result<(Stdio, Pending), Error> {
    if terminal {
        let stdio = Stdio {
            size,
            ..Stdio::default()
        };
        return Ok((stdio, Pending::Terminal(streams)));
    }
    let (ends, pipes) = streams.pipes().map_err(|source| Error::Streams {
        what: what(),
        source,
    })?;
    let stdio = Stdio {
        stdin: ends.stdin,
        stdout: ends.stdout,
        stderr: ends.stderr,
        size: None,
    };
    Ok((stdio, Pending::Pipes(pipes)))
}

/// The terminal's size that the request gives; none if it gives none.
pub(super) fn size(stdio: &proto::Stdio) -> Result<Option<(u16, u16)>, Error> {
    match (stdio.rows, stdio.columns) {
        (0, 0) => Ok(None),
        (rows, columns) => terminal_size(rows, columns).map(Some),
    }
}

fn terminal_size(rows: u32, columns: u32) -> Result<(u16, u16), Error> {
    match (u16::try_from(rows), u16::try_from(columns)) {
        (Ok(rows), Ok(columns)) => Ok((rows, columns)),
        _ => Err(Error::Invalid {
            what: format!("terminal size {rows} by {columns}"),
            why: "more than a terminal can have".to_owned(),
        }),
    }
}

impl Agent {
    /// Makes a process known, for Start to start.
    pub(super) async fn make_exec(&self, request: &proto::ExecRequest) -> Result<(), Error> {
        let id = &request.container_id;
        let exec_id = checked_id("exec id", &request.exec_id)?;
        let container = self.containers.get(id)?;
        let process: Process = parse("the OCI process", &request.process)?;
        let stdio = request.stdio.get_or_default();
        let size = size(stdio)?;
        let exists = || Error::ProcessExists {
            container: id.clone(),
            exec: exec_id.to_owned(),
        };
        if container.lock().execs.contains_key(exec_id) {
            return Err(exists());
        }
        let terminal = process.terminal().unwrap_or(false);
        let streams = Streams::open(&self.options.transport, stdio, terminal)
            .await
            .map_err(|source| Error::Streams {
                what: format!("process {exec_id:?} of container {id:?}"),
                source,
            })?;
        let mut state = container.lock();
        if state.execs.contains_key(exec_id) {
            return Err(exists());
        }
        let prepared = Prepared {
            process,
            streams,
            size,
        };
        state
            .execs
            .insert(exec_id.to_owned(), Exec::Created(Box::new(prepared)));
        Ok(())
    }

    /// Starts a container's init, or a process made by Exec. Returns its pid.
    pub(super) async fn start_process(&self, id: &str, exec_id: &str) -> Result<u32, Error> {
        let container = self.containers.get(id)?;
        if exec_id.is_empty() {
            return self.start_init(container).await;
        }
        self.start_exec(container, exec_id).await
    }

    async fn start_init(&self, container: Arc<Container>) -> Result<u32, Error> {
        container.start_begins();
        let started = self
            .operate(&container, "starting", |runtime| runtime.start())
            .await;
        container.start_is_over(started.as_ref().err().and_then(verdict), &self.events);
        started?;
        watch_oom(container.clone(), self.events.clone());
        if container.runtime.has_poststart_hooks() {
            self.operate(&container, "starting", |runtime| {
                runtime.run_poststart_hooks()
            })
            .await?;
        }
        Ok(container.runtime.pid())
    }

    async fn start_exec(&self, container: Arc<Container>, exec_id: &str) -> Result<u32, Error> {
        let id = &container.id;
        let what = || format!("process {exec_id:?} of container {id:?}");
        let starting = || format!("starting {}", what());
        // Both before the process is anything but created: one that finds no place can be started again.
        let _permit = container.execs.acquire().await;
        let slot = self.slot(OPERATIONS, &starting)?;
        let birth = Arc::new(Birth::default());
        let prepared = container.lock().take_prepared(id, exec_id, &birth)?;
        let work = async {
            let spec = prepared.process;
            let terminal = spec.terminal().unwrap_or(false);
            let (stdio, pending) = process_stdio(prepared.streams, terminal, prepared.size, &what)?;
            let runtime = container.runtime.clone();
            let exec = move || runtime.exec(&spec, stdio, &birth);
            let executed = on_thread(slot, &starting, exec).await?;
            let process = executed.process;
            let terminal = pending.start(executed.terminal).map_err(|source| {
                // Nobody could talk to it; the reaper takes it.
                let _ = process.signal(libc::SIGKILL);
                Error::Streams {
                    what: what(),
                    source,
                }
            })?;
            Ok((Running { process, terminal }, executed.ending))
        };
        match work.await {
            Ok((running, ending)) => {
                let pid = running.process.pid();
                container.lock().set_running(exec_id, running);
                self.await_exec(container.clone(), exec_id, ending);
                Ok(pid)
            }
            Err(error) => {
                // It stays, ended, until Delete.
                let status = verdict(&error).unwrap_or(STATUS_FAILED);
                container.exec_ended(exec_id, status, &self.events);
                Err(error)
            }
        }
    }

    /// Waits for the end of a process that runs.
    fn await_exec(&self, container: Arc<Container>, exec_id: &str, ending: Ending) {
        let events = self.events.clone();
        let exec_id = exec_id.to_owned();
        tokio::spawn(async move {
            if let Ok(status) = ending.await {
                container.exec_ended(&exec_id, status, &events);
            }
        });
    }

    pub(super) fn signal_process(&self, request: &proto::SignalRequest) -> Result<(), Error> {
        let id = &request.container_id;
        let signal = match request.signal {
            signal @ 1..=MAX_SIGNAL => signal.cast_signed(),
            signal => {
                return Err(Error::Invalid {
                    what: format!("signal {signal}"),
                    why: format!("not from 1 to {MAX_SIGNAL}"),
                });
            }
        };
        let doing = format!("sending signal {signal} to");
        if let Some(birth) = self.containers.birth(id)
            && request.exec_id.is_empty()
        {
            let what = || format!("the init of container {id:?}");
            return signal_newborn(&birth, signal, &doing, &what);
        }
        let container = self.containers.get(id)?;
        if request.all {
            let runtime = &container.runtime;
            return runtime.kill_all(signal).map_err(failed(&doing, id));
        }
        let mut state = container.lock();
        if request.exec_id.is_empty() {
            if state.exit.is_some() {
                return Err(Error::Ended(format!("the init of container {id:?}")));
            }
            let runtime = &container.runtime;
            return runtime.signal(signal).map_err(failed(&doing, id));
        }
        let what = || format!("process {:?} of container {id:?}", request.exec_id);
        match state.exec(id, &request.exec_id)? {
            Exec::Running(running) => {
                let sent = running.process.signal(signal);
                sent.map_err(|source| Error::Container {
                    what: format!("{doing} {}", what()),
                    source,
                })
            }
            Exec::Starting(starting) => signal_newborn(&starting.birth, signal, &doing, &what),
            Exec::Ended(_) => Err(Error::Ended(what())),
            Exec::Created(_) => Err(Error::State {
                operation: "signalling",
                what: what(),
                state: "it is not started yet",
            }),
        }
    }

    /// Forgets a process made by Exec.
    pub(super) fn delete_exec(&self, id: &str, exec: &str) -> Result<Option<proto::Exit>, Error> {
        let container = self.containers.get(id)?;
        let mut state = container.lock();
        let state_now = match state.exec(id, exec)? {
            Exec::Starting(_) => Some("it is being started"),
            Exec::Running(_) => Some("it is running"),
            Exec::Created(_) | Exec::Ended(_) => None,
        };
        if let Some(state) = state_now {
            return Err(Error::State {
                operation: "deleting",
                what: format!("process {exec:?} of container {id:?}"),
                state,
            });
        }
        Ok(match state.execs.remove(exec) {
            Some(Exec::Ended(exit)) => Some(exit),
            _ => None,
        })
    }

    pub(super) fn resize(&self, request: &proto::ResizeTerminalRequest) -> Result<(), Error> {
        let (id, exec_id) = (&request.container_id, &request.exec_id);
        let container = self.containers.get(id)?;
        let (rows, columns) = terminal_size(request.rows, request.columns)?;
        let mut state = container.lock();
        let terminal = if exec_id.is_empty() {
            state.terminal.as_ref()
        } else {
            match state.exec(id, exec_id)? {
                Exec::Running(running) => running.terminal.as_ref(),
                Exec::Created(prepared) => {
                    prepared.size = Some((rows, columns));
                    return Ok(());
                }
                Exec::Starting(starting) => {
                    starting.size = Some((rows, columns));
                    return Ok(());
                }
                Exec::Ended(_) => None,
            }
        };
        let Some(terminal) = terminal else {
            return Err(Error::State {
                operation: "resizing the terminal of",
                what: format!("process {exec_id:?} of container {id:?}"),
                state: "it has none",
            });
        };
        terminal
            .resize(rows, columns)
            .map_err(|source| Error::System {
                what: format!("resizing the terminal of container {id:?}"),
                source,
            })
    }

    /// On a thread: the command line of a process that waits for a file is not to be had meanwhile.
    pub(super) async fn processes(&self, id: &str) -> Result<Vec<proto::ProcessInfo>, Error> {
        let container = self.containers.get(id)?;
        let list = |runtime: &container::Container| {
            let pids = runtime.pids()?;
            Ok(pids.into_iter().map(|pid| (pid, command(pid))).collect())
        };
        let listed: Vec<(u32, String)> = self
            .operate(&container, "listing the processes of", list)
            .await?;
        let state = container.lock();
        let exec_id = |pid: u32| {
            let mut execs = state.execs.iter();
            execs.find_map(|(exec_id, exec)| match exec {
                Exec::Running(running) if running.process.pid() == pid => Some(exec_id.clone()),
                _ => None,
            })
        };
        Ok(listed
            .into_iter()
            .map(|(pid, command)| proto::ProcessInfo {
                pid,
                exec_id: exec_id(pid).unwrap_or_default(),
                command,
                ..Default::default()
            })
            .collect())
    }
}

/// Signals a process that is being made, if there is one yet.
fn signal_newborn(
    birth: &Birth,
    signal: i32,
    doing: &str,
    what: &impl Fn() -> String,
) -> Result<(), Error> {
    match birth.signal(signal) {
        Ok(true) => Ok(()),
        Ok(false) => Err(Error::State {
            operation: "signalling",
            what: what(),
            state: "it is being made and is no process yet",
        }),
        Err(source) => Err(Error::Container {
            what: format!("{doing} {}", what()),
            source,
        }),
    }
}

/// The process's command line, or its name in brackets if it has none (a zombie, or a program that took it away).
fn command(pid: u32) -> String {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words: Vec<_> = line
        .split(|byte| *byte == 0)
        .filter(|word| !word.is_empty())
        .map(String::from_utf8_lossy)
        .collect();
    if !words.is_empty() {
        return words.join(" ");
    }
    match std::fs::read_to_string(format!("/proc/{pid}/comm")) {
        Ok(name) => format!("[{}]", name.trim_end()),
        Err(_) => String::new(),
    }
}

/// The exit status of a process that failed to start, if it is not what its end says.
fn verdict(error: &Error) -> Option<u32> {
    let Error::Container { source, .. } = error else {
        return None;
    };
    match source {
        // Somebody else started it, or killed it.
        container::Error::State { .. } | container::Error::Died => return None,
        _ => {}
    }
    Some(match source.kind() {
        Kind::NotFound => STATUS_NOT_FOUND,
        Kind::PermissionDenied => STATUS_NOT_EXECUTABLE,
        _ => STATUS_FAILED,
    })
}
