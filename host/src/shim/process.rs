//! A process as containerd knows it: a container's init, or one made by Exec.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use containerd_shim_protos::types::task::Status;
use tokio::sync::watch;

use super::error::refuse;
use super::io::{Io, Stdio};
use crate::error::ErrorKind;
use crate::sandbox::Error;

/// Where a process is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Made, not started.
    Created,
    /// Started.
    Running,
    /// Frozen with its container.
    Paused,
    /// Ended.
    Stopped,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exited {
    /// 0..255, 128+N for signal N.
    pub status: u32,
    /// Nanoseconds since the epoch.
    pub at: i64,
}

/// One process.
pub struct Process {
    /// Its exec id; empty for an init.
    pub exec: String,
    /// What containerd said of its streams.
    pub stdio: Stdio,
    state: Mutex<State>,
    exited: watch::Sender<Option<Exited>>,
}

struct State {
    phase: Phase,
    pid: u32,
    io: Option<Io>,
}

impl Process {
    /// One that is made and not started. `pid` is 0 where it is not known yet.
    pub fn new(exec: &str, stdio: Stdio, pid: u32, io: Io) -> Self {
        Self {
            exec: exec.to_owned(),
            stdio,
            state: Mutex::new(State {
                phase: Phase::Created,
                pid,
                io: Some(io),
            }),
            exited: watch::Sender::new(None),
        }
    }

    /// Where it is in its life.
    pub fn phase(&self) -> Phase {
        self.lock().phase
    }

    /// As containerd names it.
    pub fn status(&self) -> Status {
        match self.phase() {
            Phase::Created => Status::CREATED,
            Phase::Running => Status::RUNNING,
            Phase::Paused => Status::PAUSED,
            Phase::Stopped => Status::STOPPED,
        }
    }

    /// Its pid, as containerd sees it.
    pub fn pid(&self) -> u32 {
        self.lock().pid
    }

    /// It runs, as `pid`; 0 leaves the pid.
    pub fn set_running(&self, pid: u32) {
        let mut state = self.lock();
        if pid != 0 {
            state.pid = pid;
        }
        if state.phase != Phase::Stopped {
            state.phase = Phase::Running;
        }
    }

    /// It is frozen.
    pub fn set_paused(&self) {
        let mut state = self.lock();
        if state.phase == Phase::Running {
            state.phase = Phase::Paused;
        }
    }

    /// It has ended.
    pub fn set_exited(&self, exited: Exited) {
        self.lock().phase = Phase::Stopped;
        self.exited.send_replace(Some(exited));
    }

    /// How it ended, if it has.
    pub fn exited(&self) -> Option<Exited> {
        *self.exited.borrow()
    }

    /// Waits for its end.
    pub async fn wait(&self) -> Exited {
        let mut exited = self.exited.subscribe();
        loop {
            if let Some(exited) = *exited.borrow_and_update() {
                return exited;
            }
            // The sender is `self`'s, which outlives this.
            let _ = exited.changed().await;
        }
    }

    /// Opens its input.
    ///
    /// # Errors
    /// The FIFO is not there.
    pub fn open_stdin(&self) -> Result<(), Error> {
        match &mut self.lock().io {
            Some(io) => io.open_stdin(),
            None => Ok(()),
        }
    }

    /// Its input ends.
    pub fn close_stdin(&self) {
        if let Some(io) = &mut self.lock().io {
            io.close_stdin();
        }
    }

    /// Waits for the ends of its outputs, at most `limit`, and closes its streams.
    pub async fn finish_io(&self, limit: Duration) {
        let io = self.lock().io.take();
        if let Some(io) = io {
            io.finish(limit).await;
        }
    }

    /// # Errors
    /// `NotFound`: it has ended, as containerd wants to hear it.
    pub fn check_lives(&self) -> Result<(), Error> {
        match self.phase() {
            Phase::Stopped => Err(refuse(
                ErrorKind::NotFound,
                "the process has finished already",
            )),
            _ => Ok(()),
        }
    }

    /// # Errors
    /// `FailedPrecondition`: it runs.
    pub fn check_deletable(&self) -> Result<(), Error> {
        match self.phase() {
            Phase::Created | Phase::Stopped => Ok(()),
            Phase::Running | Phase::Paused => Err(refuse(
                ErrorKind::FailedPrecondition,
                "deleting a process: it is running",
            )),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
