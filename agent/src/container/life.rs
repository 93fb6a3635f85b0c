//! A container's life as a state machine: what may be done when, and by one caller at a time.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::{Error, Result};

/// How long a pause waits for processes that are being made in the container.
const PATIENCE: Duration = Duration::from_secs(10);

/// Where a container is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Its init waits for the start.
    Created,
    /// Hooks run, and the init executes its command.
    Starting,
    /// Its command runs.
    Running,
    /// It is being frozen.
    Pausing,
    /// Frozen.
    Paused,
    /// It is being thawed.
    Resuming,
    /// Its init has ended.
    Stopped,
    /// What is left of it is being removed.
    Deleting,
}

impl Status {
    /// In a sentence: "it is ...".
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Starting => "being started",
            Self::Running => "running",
            Self::Pausing => "being paused",
            Self::Paused => "paused",
            Self::Resuming => "being resumed",
            Self::Stopped => "stopped",
            Self::Deleting => "being deleted",
        }
    }
}

/// The status, which changes under a lock of its own: that of a step, never of a system call.
#[derive(Debug)]
pub(super) struct Life {
    state: Mutex<State>,
    /// No process is being made any more.
    unborn: Condvar,
}

#[derive(Debug)]
struct State {
    status: Status,
    /// Processes on their way to `execve`.
    births: usize,
}

/// While it lives, a process is being made in the container.
#[derive(Debug)]
pub(super) struct Pregnancy<'a>(&'a Life);

impl Drop for Pregnancy<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.births = state.births.saturating_sub(1);
        if state.births == 0 {
            self.0.unborn.notify_all();
        }
    }
}

impl Life {
    /// Of a container that was just created.
    pub(super) fn new() -> Self {
        let state = State {
            status: Status::Created,
            births: 0,
        };
        Self {
            state: Mutex::new(state),
            unborn: Condvar::new(),
        }
    }

    pub(super) fn status(&self) -> Status {
        self.state().status
    }

    /// Refuses `action` unless the status is one of `allowed`.
    pub(super) fn require(&self, id: &str, action: &'static str, allowed: &[Status]) -> Result<()> {
        permit(&self.state(), id, action, allowed)
    }

    /// Begins `action`, which takes one of `allowed` and is `during`: for one of several callers. Returns what the
    /// status was.
    pub(super) fn begin(
        &self,
        id: &str,
        action: &'static str,
        allowed: &[Status],
        during: Status,
    ) -> Result<Status> {
        let mut state = self.state();
        permit(&state, id, action, allowed)?;
        Ok(std::mem::replace(&mut state.status, during))
    }

    /// Ends the action that is `during`. False if the init has ended meanwhile, which counts for more.
    pub(super) fn finish(&self, during: Status, next: Status) -> bool {
        let mut state = self.state();
        let still = state.status == during;
        if still {
            state.status = next;
        }
        still
    }

    /// The init has ended.
    pub(super) fn stop(&self) {
        let mut state = self.state();
        if state.status != Status::Deleting {
            state.status = Status::Stopped;
        }
    }

    /// A process is about to be made.
    pub(super) fn conceive(
        &self,
        id: &str,
        action: &'static str,
        allowed: &[Status],
    ) -> Result<Pregnancy<'_>> {
        let mut state = self.state();
        permit(&state, id, action, allowed)?;
        state.births = state.births.saturating_add(1);
        Ok(Pregnancy(self))
    }

    /// Waits until no process is being made: one that is frozen before it has closed the descriptors it was born with
    /// would hold the streams of other containers.
    pub(super) fn wait_for_births(&self, id: &str) -> Result<()> {
        let waited = self
            .unborn
            .wait_timeout_while(self.state(), PATIENCE, |state| state.births > 0);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if state.births == 0 {
            return Ok(());
        }
        Err(Error::Timeout {
            id: id.into(),
            action: "waiting for a process that is being started",
            limit_ms: PATIENCE.as_millis().try_into().unwrap_or(u64::MAX),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn permit(state: &State, id: &str, action: &'static str, allowed: &[Status]) -> Result<()> {
    if allowed.contains(&state.status) {
        return Ok(());
    }
    Err(Error::State {
        id: id.into(),
        action,
        state: state.status.as_str(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_two_callers_begins() {
        let life = Life::new();
        let begin = || life.begin("a", "start", &[Status::Created], Status::Starting);
        assert_eq!(begin().unwrap(), Status::Created);
        let error = begin().unwrap_err();
        assert_eq!(
            error.to_string(),
            "container a: cannot start: it is being started"
        );
        assert!(life.finish(Status::Starting, Status::Running));
        assert_eq!(life.status(), Status::Running);
    }

    #[test]
    fn the_end_of_the_init_counts_for_more_than_what_goes_on() {
        let life = Life::new();
        let allowed = [Status::Created, Status::Stopped];
        life.begin("a", "start", &allowed, Status::Starting)
            .unwrap();
        life.stop();
        assert!(!life.finish(Status::Starting, Status::Running));
        assert_eq!(life.status(), Status::Stopped);
        life.begin("a", "delete", &allowed, Status::Deleting)
            .unwrap();
        life.stop();
        assert_eq!(life.status(), Status::Deleting);
    }

    #[test]
    fn a_birth_is_waited_for() {
        let life = Life::new();
        let allowed = [Status::Created];
        let first = life.conceive("a", "exec in it", &allowed).unwrap();
        let second = life.conceive("a", "exec in it", &allowed).unwrap();
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| life.wait_for_births("a"));
            drop(first);
            drop(second);
            waiter.join().unwrap().unwrap();
        });
        life.stop();
        assert!(life.conceive("a", "exec in it", &allowed).is_err());
    }
}
