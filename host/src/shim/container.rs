//! A container as containerd knows it.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cella_proto::agent::StatsResponse;
use tokio::sync::Notify;

use super::error::refuse;
use super::process::Process;
use crate::error::ErrorKind;
use crate::sandbox::Error;

/// One container and its processes.
pub struct Container {
    /// Its id.
    pub id: String,
    /// Where containerd has its bundle.
    pub bundle: PathBuf,
    /// Its first process.
    pub init: Arc<Process>,
    /// It stands for the pod's sandbox and has no process in the guest.
    pub is_sandbox: bool,
    /// It shares the pod's pid namespace: its processes outlive its init.
    pub shares_pids: bool,
    /// Tells a sandbox container to end, with this status.
    pub stopped_with: Mutex<Option<u32>>,
    /// ... and wakes who waits for it.
    pub stop: Notify,
    execs: Mutex<HashMap<String, Exec>>,
    last_stats: Mutex<Option<StatsResponse>>,
}

#[derive(Clone)]
enum Exec {
    /// Somebody makes a process of this id.
    Reserved,
    Made(Arc<Process>),
}

/// A process's place in its container while it is made. Dropping it gives the place up.
pub struct ExecPlace<'a> {
    container: &'a Container,
    id: &'a str,
}

impl Container {
    /// A container with its init.
    pub fn new(id: &str, bundle: PathBuf, init: Process) -> Self {
        Self {
            id: id.to_owned(),
            bundle,
            init: Arc::new(init),
            is_sandbox: false,
            shares_pids: false,
            stopped_with: Mutex::new(None),
            stop: Notify::new(),
            execs: Mutex::default(),
            last_stats: Mutex::default(),
        }
    }

    /// Its init (`exec` empty) or one of its other processes.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn process(&self, exec: &str) -> Result<Arc<Process>, Error> {
        if exec.is_empty() {
            return Ok(Arc::clone(&self.init));
        }
        match self.lock_execs().get(exec) {
            Some(Exec::Made(process)) => Ok(Arc::clone(process)),
            _ => Err(refuse(
                ErrorKind::NotFound,
                format!("container {} has no process {exec}", self.id),
            )),
        }
    }

    /// Takes an exec id.
    ///
    /// # Errors
    /// `AlreadyExists`.
    pub fn reserve<'a>(&'a self, exec: &'a str) -> Result<ExecPlace<'a>, Error> {
        let mut execs = self.lock_execs();
        if execs.contains_key(exec) {
            return Err(refuse(
                ErrorKind::AlreadyExists,
                format!("container {} has a process {exec} already", self.id),
            ));
        }
        execs.insert(exec.to_owned(), Exec::Reserved);
        Ok(ExecPlace {
            container: self,
            id: exec,
        })
    }

    /// Its processes beside the init.
    pub fn execs(&self) -> Vec<Arc<Process>> {
        let execs = self.lock_execs();
        let made = execs.values().filter_map(|exec| match exec {
            Exec::Made(process) => Some(Arc::clone(process)),
            Exec::Reserved => None,
        });
        made.collect()
    }

    /// Forgets a process.
    pub fn remove_exec(&self, exec: &str) {
        self.lock_execs().remove(exec);
    }

    /// Keeps counters for when there are no newer ones.
    pub fn keep_stats(&self, stats: StatsResponse) {
        *self
            .last_stats
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(stats);
    }

    /// The last counters that were kept.
    pub fn last_stats(&self) -> Option<StatsResponse> {
        let stats = self
            .last_stats
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        stats.clone()
    }

    /// # Errors
    /// `FailedPrecondition`: it stands for the sandbox, in which nothing can be run.
    pub fn check_has_processes(&self) -> Result<(), Error> {
        if self.is_sandbox {
            return Err(refuse(
                ErrorKind::FailedPrecondition,
                format!(
                    "container {} stands for its pod's sandbox: it has no process",
                    self.id
                ),
            ));
        }
        Ok(())
    }

    fn lock_execs(&self) -> MutexGuard<'_, HashMap<String, Exec>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ExecPlace<'_> {
    /// Puts the process in its place.
    pub fn fill(self, process: Arc<Process>) {
        let mut execs = self.container.lock_execs();
        execs.insert(self.id.to_owned(), Exec::Made(process));
    }
}

impl Drop for ExecPlace<'_> {
    fn drop(&mut self) {
        let mut execs = self.container.lock_execs();
        if matches!(execs.get(self.id), Some(Exec::Reserved)) {
            execs.remove(self.id);
        }
    }
}
