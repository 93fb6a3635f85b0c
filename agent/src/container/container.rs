//! A container, from its creation to its removal.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use cella_proto::agent::StatsResponse;
use oci_spec::runtime as oci;

use super::cgroup::{Cgroup, OomWatch};
use super::device_filter::DeviceFilter;
use super::exec::ExecPlan;
use super::hooks::{self, HookState, Place};
use super::init::InitPlan;
use super::process::ProcessPlan;
use super::report::Message;
use super::runtime::{
    Common, Newborn, attach_filter, go_on, in_pid_namespace, receive, socket_pair,
};
use super::seccomp::SeccompPlan;
use super::spawn::{self, Child};
use super::{Error, Result, Stdio, translate, validate};

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

impl Status {
    /// The OCI word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

/// A container. It must be deleted, not dropped: dropping leaves its processes and its cgroup.
#[derive(Debug)]
pub struct Container {
    parts: Parts,
    status: Status,
}

/// What [`super::Runtime::create`] makes a container of.
#[derive(Debug)]
pub(super) struct Parts {
    pub id: String,
    pub common: Arc<Common>,
    pub child: Child,
    /// To the init, until it is started.
    pub socket: OwnedFd,
    pub cgroup: Cgroup,
    /// The attached device program.
    pub filter: Option<OwnedFd>,
    pub plan: InitPlan,
    pub seccomp: Option<SeccompPlan>,
    pub personality: Option<u64>,
    pub hooks: oci::Hooks,
    pub annotations: Option<HashMap<String, String>>,
    pub bundle: PathBuf,
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
    /// Signals it; one that has ended needs none.
    pub fn signal(&self, signal: i32) -> Result<()> {
        send_signal(self.pidfd.as_fd(), self.pid, signal)
    }
}

impl Container {
    pub(super) fn new(mut parts: Parts) -> Self {
        // Trees, streams and the like are the init's now; the container keeps what its errors and execs need.
        parts.plan.release();
        Self {
            parts,
            status: Status::Created,
        }
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.parts.id
    }

    /// Its init, in the agent's pid namespace.
    pub fn pid(&self) -> u32 {
        self.parts.child.pid
    }

    /// Readable once the init has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.parts.child.pidfd.as_fd()
    }

    /// Where it is in its life, as far as the agent has noticed.
    pub fn status(&self) -> Status {
        self.status
    }

    /// To be called when the init has been reaped. The container is stopped then, even if other processes of its pid
    /// namespace are still dying.
    pub fn set_stopped(&mut self) {
        self.status = Status::Stopped;
    }

    fn require(&self, action: &'static str, allowed: &[Status]) -> Result<()> {
        if allowed.contains(&self.status) {
            return Ok(());
        }
        Err(Error::State {
            id: self.id().into(),
            action,
            state: self.status.as_str(),
        })
    }

    fn hook_state<'a>(&'a self, status: &'a str) -> HookState<'a> {
        HookState {
            id: self.id(),
            status,
            pid: if self.status == Status::Stopped {
                0
            } else {
                self.pid()
            },
            bundle: &self.parts.bundle,
            annotations: self.parts.annotations.as_ref(),
        }
    }

    /// Lets the init execute its command; returns when it has. If it cannot, or a startContainer hook fails, the
    /// init is killed and reaped and the container is stopped. A poststart hook that fails is reported, with the
    /// container killed but yet to be reaped by the caller.
    pub fn start(&mut self) -> Result<()> {
        self.require("start", &[Status::Created])?;
        let result = self
            .run_start_hooks()
            .and_then(|()| go_on(&self.parts.socket))
            .and_then(|()| receive(&self.parts.socket));
        match result {
            Ok((Message::Closed, _)) => {
                self.status = Status::Running;
                let poststart = self.parts.hooks.poststart().as_ref();
                let state = self.hook_state("running");
                hooks::run("poststart", poststart, Place::Runtime, state)
                    .inspect_err(|_| drop(self.parts.cgroup.kill()))
            }
            other => {
                spawn::kill_and_reap(&self.parts.child.pidfd);
                self.status = Status::Stopped;
                Err(match other {
                    Ok((Message::Failed(failure), _)) => {
                        translate::init_failure(&self.parts.plan, failure)
                    }
                    Ok(_) => Error::Died,
                    Err(error) => error,
                })
            }
        }
    }

    fn run_start_hooks(&self) -> Result<()> {
        let hooks = self.parts.hooks.start_container().as_ref();
        if !hooks::any(hooks) {
            return Ok(());
        }
        let own = self.parts.plan.namespaces.own;
        let place = Place::of(self.pid(), self.pidfd(), own)?;
        hooks::run("startContainer", hooks, place, self.hook_state("created"))
    }

    /// Runs a further process; returns when it has executed its command, or why it could not.
    pub fn exec(&self, process: &oci::Process, stdio: Stdio) -> Result<Process> {
        self.require("exec in it", &[Status::Created, Status::Running])?;
        validate::process(process)?;
        let parts = &self.parts;
        let own = parts.plan.namespaces.own;
        let plan = ProcessPlan::new(
            process,
            parts.seccomp.clone(),
            parts.personality,
            parts.common.own_binary,
            stdio,
        )?;
        let (socket, child_socket) = socket_pair()?;
        let pidfd = parts.child.pidfd.as_raw_fd();
        let mut keep = vec![pidfd, child_socket.as_raw_fd()];
        plan.keep(&mut keep);
        keep.sort_unstable();
        let plan = ExecPlan {
            process: plan,
            pidfd,
            namespaces: own & !libc::CLONE_NEWPID,
            keep,
        };
        let number = child_socket.as_raw_fd();
        let pid_namespace = (own & libc::CLONE_NEWPID != 0).then(|| self.pidfd());
        let child = in_pid_namespace(pid_namespace, &parts.common, || {
            match spawn::clone(0, Some(parts.cgroup.dir()), || plan.run(number)) {
                // The container has made cgroups of its own in its cgroup: join the one its init is in.
                Err(Error::Process { source, .. })
                    if source.raw_os_error() == Some(libc::EBUSY) =>
                {
                    let cgroup = parts.cgroup.of_process(self.pid())?;
                    spawn::clone(0, Some(cgroup.as_fd()), || plan.run(number))
                }
                other => other,
            }
        })?;
        drop(child_socket);
        supervise(
            Newborn {
                child,
                socket,
                terminal: None,
            },
            &plan.process,
        )
    }

    /// Signals the init; one that has ended needs none.
    pub fn signal(&self, signal: i32) -> Result<()> {
        send_signal(self.pidfd(), self.pid(), signal)
    }

    /// Signals every process.
    pub fn kill_all(&self, signal: i32) -> Result<()> {
        if signal == libc::SIGKILL {
            self.parts.cgroup.kill()
        } else {
            check_signal(signal)?;
            self.parts.cgroup.signal(signal)
        }
    }

    /// Freezes every process; returns when they are.
    pub fn freeze(&mut self) -> Result<()> {
        self.require("pause", &[Status::Running])?;
        self.parts.cgroup.set_frozen(self.id(), true)?;
        self.status = Status::Paused;
        Ok(())
    }

    /// Thaws every process.
    pub fn thaw(&mut self) -> Result<()> {
        self.require("resume", &[Status::Paused])?;
        self.parts.cgroup.set_frozen(self.id(), false)?;
        self.status = Status::Running;
        Ok(())
    }

    /// Changes the limits that `resources` names; device rules, if there are any, replace the former ones.
    pub fn update(&mut self, resources: &oci::LinuxResources) -> Result<()> {
        self.require(
            "update",
            &[Status::Created, Status::Running, Status::Paused],
        )?;
        let filter = match resources.devices() {
            Some(rules) if !rules.is_empty() => Some(DeviceFilter::new(rules)?),
            _ => None,
        };
        self.parts.cgroup.set_resources(resources)?;
        if let Some(filter) = filter {
            let attached = attach_filter(&self.parts.cgroup, &filter, self.parts.filter.as_ref())?;
            if attached.is_some() {
                self.parts.filter = attached;
            }
        }
        Ok(())
    }

    /// The counters of its cgroup. Those of network interfaces are not here: they are the pod's.
    pub fn stats(&self) -> Result<StatsResponse> {
        self.parts.cgroup.stats(self.id())
    }

    /// Its processes, in the agent's pid namespace.
    pub fn pids(&self) -> Result<Vec<u32>> {
        self.parts.cgroup.processes()
    }

    /// Processes killed for want of memory, so far.
    pub fn oom_kills(&self) -> Result<u64> {
        self.parts.cgroup.oom_kills()
    }

    /// Watches for them.
    pub fn oom_watch(&self) -> Result<OomWatch> {
        self.parts.cgroup.oom_watch()
    }

    /// Removes what is left: processes, cgroup. Then runs the poststop hooks, all of them, and returns the first
    /// one's failure. The container comes back with an error: to be deleted again, unless it is [`Error::Hook`],
    /// which leaves nothing to do. Refused while the container runs; a created one is killed, and reaped here.
    #[allow(clippy::result_large_err, reason = "the container is given back")]
    pub fn delete(mut self) -> std::result::Result<(), (Self, Error)> {
        if let Err(error) = self.require("delete", &[Status::Created, Status::Stopped]) {
            return Err((self, error));
        }
        if self.status == Status::Created {
            spawn::kill_and_reap(&self.parts.child.pidfd);
            self.status = Status::Stopped;
        }
        if let Err(error) = self.parts.cgroup.remove() {
            return Err((self, error));
        }
        let mut result = Ok(());
        for hook in self.parts.hooks.poststop().iter().flatten() {
            let hook = vec![hook.clone()];
            let state = self.hook_state("stopped");
            let ran = hooks::run("poststop", Some(&hook), Place::Runtime, state);
            result = result.and(ran);
        }
        result.map_err(|error| (self, error))
    }
}

/// Listens to a process until it has executed its command. On failure it is reaped.
fn supervise(mut born: Newborn, plan: &ProcessPlan) -> Result<Process> {
    let error = loop {
        match receive(&born.socket) {
            Ok((Message::Terminal, fd)) => born.terminal = fd,
            Ok((Message::Closed, _)) => {
                let Newborn {
                    child: Child { pid, pidfd },
                    terminal,
                    ..
                } = born;
                return Ok(Process {
                    pid,
                    pidfd,
                    terminal,
                });
            }
            Ok((Message::Failed(failure), _)) => break translate::process_failure(plan, failure),
            Ok(_) => break Error::Died,
            Err(error) => break error,
        }
    };
    spawn::kill_and_reap(&born.child.pidfd);
    Err(error)
}

fn check_signal(signal: i32) -> Result<()> {
    // SIGRTMAX is 64 to the kernel; 0 only asks whether there is a process.
    if (1..=64).contains(&signal) {
        return Ok(());
    }
    Err(Error::invalid("signal", format!("{signal} is no signal")))
}

/// `pidfd_send_signal`; one that has ended needs no signal.
fn send_signal(pidfd: BorrowedFd<'_>, pid: u32, signal: i32) -> Result<()> {
    check_signal(signal)?;
    // SAFETY: plain numbers and a null siginfo.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<u8>(),
            0u32,
        )
    };
    let error = std::io::Error::last_os_error();
    if result < 0 && error.raw_os_error() != Some(libc::ESRCH) {
        let step = format!("sending signal {signal} to process {pid}");
        return Err(Error::Process {
            step,
            source: error,
        });
    }
    Ok(())
}
