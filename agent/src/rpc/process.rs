//! Exec, Start, Signal, Delete of a process, terminals, and the list of processes.

use std::os::fd::OwnedFd;

use cella_proto::agent as proto;
use oci_spec::runtime::Process;

use super::Agent;
use super::container::{checked_id, failed, parse, watch_oom};
use super::state::{Container, Exec, Prepared, Running};
use crate::container::{self, Kind, Stdio};
use crate::error::Error;
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
    pub(super) fn start_process(&self, id: &str, exec_id: &str) -> Result<u32, Error> {
        let container = self.containers.get(id)?;
        if exec_id.is_empty() {
            return self.start_init(container);
        }
        self.start_exec(container, exec_id)
    }

    fn start_init(&self, container: std::sync::Arc<Container>) -> Result<u32, Error> {
        let id = container.id.clone();
        let (pid, started) = {
            let mut state = container.lock();
            let runtime = state.runtime(&id)?;
            if runtime.status() != container::Status::Created {
                return Err(Error::State {
                    operation: "starting",
                    what: format!("container {id:?}"),
                    state: "it was started already",
                });
            }
            (runtime.pid(), runtime.start())
        };
        if let Err(source) = started {
            let stopped = container.lock().runtime(&id)?.status() == container::Status::Stopped;
            if stopped {
                // The library has reaped it.
                self.prepare()?.reaper.forget(pid);
                container.init_ended(failed_status(&source), &self.events);
            }
            // Else a poststart hook failed: the init is killed, and its end comes by the reaper.
            return Err(failed("starting", &id)(source));
        }
        watch_oom(container, self.events.clone());
        Ok(pid)
    }

    fn start_exec(
        &self,
        container: std::sync::Arc<Container>,
        exec_id: &str,
    ) -> Result<u32, Error> {
        let id = container.id.clone();
        let what = || format!("process {exec_id:?} of container {id:?}");
        let mut state = container.lock();
        let exec = state.exec(&id, exec_id)?;
        if !matches!(exec, Exec::Created(_)) {
            return Err(Error::State {
                operation: "starting",
                what: what(),
                state: "it was started already",
            });
        }
        let Some(Exec::Created(prepared)) = state.execs.remove(exec_id) else {
            return Err(Error::NoProcess {
                container: id.clone(),
                exec: exec_id.to_owned(),
            });
        };
        let spec = prepared.process;
        let terminal = spec.terminal().unwrap_or(false);
        let (stdio, pending) = process_stdio(prepared.streams, terminal, prepared.size, &what)?;
        let mut process = match state.runtime(&id)?.exec(&spec, stdio) {
            Ok(process) => process,
            Err(source) => {
                // It stays, ended, until Delete.
                state
                    .execs
                    .insert(exec_id.to_owned(), Exec::Ended(proto::Exit::new()));
                drop(state);
                container.exec_ended(exec_id, failed_status(&source), &self.events);
                return Err(Error::Container {
                    what: format!("starting {}", what()),
                    source,
                });
            }
        };
        let pid = process.pid;
        let exited = self.prepare()?.reaper.watch(pid);
        let terminal = pending.start(process.terminal.take()).map_err(|source| {
            // Nobody could talk to it; the reaper takes it.
            let _ = process.signal(libc::SIGKILL);
            Error::Streams {
                what: what(),
                source,
            }
        })?;
        state.execs.insert(
            exec_id.to_owned(),
            Exec::Running(Running { process, terminal }),
        );
        drop(state);
        let events = self.events.clone();
        let exec_id = exec_id.to_owned();
        tokio::spawn(async move {
            if let Ok(status) = exited.await {
                container.exec_ended(&exec_id, status, &events);
            }
        });
        Ok(pid)
    }

    pub(super) fn signal_process(&self, request: &proto::SignalRequest) -> Result<(), Error> {
        let id = &request.container_id;
        let container = self.containers.get(id)?;
        let signal = match request.signal {
            signal @ 1..=MAX_SIGNAL => signal.cast_signed(),
            signal => {
                return Err(Error::Invalid {
                    what: format!("signal {signal}"),
                    why: format!("not from 1 to {MAX_SIGNAL}"),
                });
            }
        };
        let mut state = container.lock();
        let doing = format!("sending signal {signal} to");
        if request.all {
            let runtime = state.runtime(id)?;
            return runtime.kill_all(signal).map_err(failed(&doing, id));
        }
        if request.exec_id.is_empty() {
            if state.exit.is_some() {
                return Err(Error::Ended(format!("the init of container {id:?}")));
            }
            let runtime = state.runtime(id)?;
            return runtime.signal(signal).map_err(failed(&doing, id));
        }
        let what = || format!("process {:?} of container {id:?}", request.exec_id);
        match state.exec(id, &request.exec_id)? {
            Exec::Running(running) => {
                running
                    .process
                    .signal(signal)
                    .map_err(|source| Error::Container {
                        what: format!("{doing} {}", what()),
                        source,
                    })
            }
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
        if let Exec::Running(_) = state.exec(id, exec)? {
            return Err(Error::State {
                operation: "deleting",
                what: format!("process {exec:?} of container {id:?}"),
                state: "it is running",
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

    pub(super) fn processes(&self, id: &str) -> Result<Vec<proto::ProcessInfo>, Error> {
        let container = self.containers.get(id)?;
        let mut state = container.lock();
        let pids = state
            .runtime(id)?
            .pids()
            .map_err(failed("listing the processes of", id))?;
        let exec_id = |pid: u32| {
            let mut execs = state.execs.iter();
            execs.find_map(|(exec_id, exec)| match exec {
                Exec::Running(running) if running.process.pid == pid => Some(exec_id.clone()),
                _ => None,
            })
        };
        Ok(pids
            .into_iter()
            .map(|pid| proto::ProcessInfo {
                pid,
                exec_id: exec_id(pid).unwrap_or_default(),
                command: command(pid),
                ..Default::default()
            })
            .collect())
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

fn failed_status(error: &container::Error) -> u32 {
    match error.kind() {
        Kind::NotFound => STATUS_NOT_FOUND,
        Kind::PermissionDenied => STATUS_NOT_EXECUTABLE,
        _ => STATUS_FAILED,
    }
}
