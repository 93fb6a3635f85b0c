//! A container's life, as the server sees it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use cella_proto::agent::StatsResponse;
use oci_spec::runtime as oci;

use super::{Error, Result, SharedNamespaces};

/// Where the runtime keeps cgroups.
#[derive(Clone, Debug)]
pub struct RuntimeConfig {
    /// Mount point of the cgroup v2 hierarchy.
    pub cgroup_root: PathBuf,
    /// Below it, the cgroup of containers whose `cgroupsPath` is relative or missing.
    pub cgroup_parent: String,
}

impl Default for RuntimeConfig {
    fn default() -> Self {
        Self {
            cgroup_root: "/sys/fs/cgroup".into(),
            cgroup_parent: "cella".into(),
        }
    }
}

/// Makes containers.
#[derive(Debug)]
pub struct Runtime {
    _config: RuntimeConfig,
}

/// Standard streams of a process; what is `None` is /dev/null.
#[derive(Debug, Default)]
pub struct Stdio {
    /// Standard input.
    pub stdin: Option<OwnedFd>,
    /// Standard output.
    pub stdout: Option<OwnedFd>,
    /// Standard error.
    pub stderr: Option<OwnedFd>,
    /// Rows and columns of the terminal, if the process has one.
    pub size: Option<(u16, u16)>,
}

/// What [`Runtime::create`] made.
#[derive(Debug)]
pub struct Created {
    /// The container, waiting for its start.
    pub container: Container,
    /// The terminal's master, if the spec asks for a terminal.
    pub terminal: Option<OwnedFd>,
}

/// Where a container is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Its init waits for the start.
    Created,
    /// Its command runs.
    Running,
    /// Frozen.
    Paused,
    /// Its init has ended.
    Stopped,
}

impl Runtime {
    /// Prepares the runtime.
    pub fn new(config: RuntimeConfig) -> Result<Self> {
        Ok(Self { _config: config })
    }
    /// Makes a container up to, not including, the execution of its command.
    pub fn create(
        &self,
        _id: &str,
        _spec: &oci::Spec,
        _stdio: Stdio,
        _shared: &SharedNamespaces,
    ) -> Result<Created> {
        Err(Error::Died)
    }
}

/// A container.
#[derive(Debug)]
pub struct Container {
    id: String,
    pid: u32,
    pidfd: OwnedFd,
    status: Status,
}

impl Container {
    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }
    /// Its init, in the agent's pid namespace.
    pub fn pid(&self) -> u32 {
        self.pid
    }
    /// Readable once the init has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
    /// Where it is in its life.
    pub fn status(&self) -> Status {
        self.status
    }
    /// Lets the init execute its command; returns when it has.
    pub fn start(&mut self) -> Result<()> {
        Err(Error::Died)
    }
    /// To be called when the init has been reaped.
    pub fn set_stopped(&mut self) {
        self.status = Status::Stopped;
    }
    /// Runs a further process.
    pub fn exec(&self, _process: &oci::Process, _stdio: Stdio) -> Result<Process> {
        Err(Error::Died)
    }
    /// Signals the init.
    pub fn signal(&self, _signal: i32) -> Result<()> {
        Err(Error::Died)
    }
    /// Signals every process.
    pub fn kill_all(&self, _signal: i32) -> Result<()> {
        Err(Error::Died)
    }
    /// Freezes every process.
    pub fn freeze(&mut self) -> Result<()> {
        Err(Error::Died)
    }
    /// Thaws every process.
    pub fn thaw(&mut self) -> Result<()> {
        Err(Error::Died)
    }
    /// Changes resource limits.
    pub fn update(&mut self, _resources: &oci::LinuxResources) -> Result<()> {
        Err(Error::Died)
    }
    /// Reads the counters.
    pub fn stats(&self) -> Result<StatsResponse> {
        Err(Error::Died)
    }
    /// Lists the processes.
    pub fn pids(&self) -> Result<Vec<u32>> {
        Err(Error::Died)
    }
    /// Counts the processes killed for want of memory.
    pub fn oom_kills(&self) -> Result<u64> {
        Err(Error::Died)
    }
    /// Watches for them.
    pub fn oom_watch(&self) -> Result<OomWatch> {
        Err(Error::Died)
    }
    /// Removes what is left.
    pub fn delete(self) -> Result<()> {
        Err(Error::Died)
    }
}

/// Watches a container's `memory.events`.
#[derive(Debug)]
pub struct OomWatch {
    file: OwnedFd,
}

impl OomWatch {
    /// Poll it for POLLPRI.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
    /// Counts the processes killed for want of memory.
    pub fn kills(&self) -> Result<u64> {
        Err(Error::Died)
    }
}

/// A further process of a container.
#[derive(Debug)]
pub struct Process {
    /// In the agent's pid namespace.
    pub pid: u32,
    /// Readable once it has ended.
    pub pidfd: OwnedFd,
    /// The terminal's master, if it has a terminal.
    pub terminal: Option<OwnedFd>,
}

impl Process {
    /// Signals it.
    pub fn signal(&self, _signal: i32) -> Result<()> {
        Err(Error::Died)
    }
}
