//! A container, from its creation to its removal.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use cella_proto::agent::StatsResponse;
use oci_spec::runtime as oci;

use super::cgroup::{Cgroup, OomWatch};
use super::device_filter::{DeviceFilter, Program};
use super::exec::ExecPlan;
use super::hooks::{self, HookRun, HookState, Place};
use super::init::InitPlan;
use super::life::{Life, Status};
use super::process::ProcessPlan;
use super::report::Message;
use super::runtime::{
    Common, Newborn, attach_filter, go_on, in_pid_namespace, receive, socket_pair,
};
use super::seccomp::SeccompPlan;
use super::spawn::{self, Birth, Child, check_signal};
use super::{Error, Result, Stdio, translate, validate};
use crate::reaper::{Ending, Reaper};

/// The OCI word of a container whose init has ended.
const STOPPED: &str = "stopped";

/// A container. It must be deleted, not dropped: dropping leaves its processes and its cgroup.
#[derive(Debug)]
pub struct Container {
    parts: Parts,
    life: Life,
    /// The attached device program. Its lock is an update's, and so for all of it.
    filter: Mutex<Option<Program>>,
}

/// What [`super::Runtime::create`] makes a container of.
#[derive(Debug)]
pub(super) struct Parts {
    pub id: String,
    pub common: Arc<Common>,
    pub child: Arc<Child>,
    /// To the init, until it is started.
    pub socket: OwnedFd,
    pub cgroup: Cgroup,
    /// The attached device program.
    pub filter: Option<Program>,
    pub plan: InitPlan,
    pub seccomp: Option<Arc<SeccompPlan>>,
    pub personality: Option<u64>,
    pub hooks: oci::Hooks,
    pub annotations: Option<HashMap<String, String>>,
    pub bundle: PathBuf,
}

/// A further process of a container.
#[derive(Debug)]
pub struct Process(Arc<Child>);

/// What [`Container::exec`] made.
#[derive(Debug)]
pub struct Executed {
    /// The process, which has executed its command.
    pub process: Process,
    /// Tells of its end.
    pub ending: Ending,
    /// The terminal's master, if it has a terminal.
    pub terminal: Option<OwnedFd>,
}

impl Process {
    /// In the agent's pid namespace.
    pub fn pid(&self) -> u32 {
        self.0.pid
    }

    /// Readable once it has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.0.pidfd.as_fd()
    }

    /// Signals it; one that has ended needs none.
    pub fn signal(&self, signal: i32) -> Result<()> {
        self.0.signal(signal)
    }
}

impl Container {
    pub(super) fn new(mut parts: Parts) -> Self {
        // Trees, streams and the like are the init's now; the container keeps what its errors and execs need.
        parts.plan.release();
        Self {
            filter: Mutex::new(parts.filter.take()),
            parts,
            life: Life::new(),
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
        self.life.status()
    }

    /// To be called when the init has been reaped. The container is stopped then, even if other processes of its pid
    /// namespace are still dying.
    pub fn set_stopped(&self) {
        self.life.stop();
    }

    /// Hooks of this container, while `init` lives if it is given.
    fn hook_run<'a>(&'a self, init: Option<&'a Child>, status: &'a str) -> HookRun<'a> {
        HookRun {
            reaper: &self.parts.common.reaper,
            init,
            state: HookState {
                id: self.id(),
                status,
                pid: if status == STOPPED { 0 } else { self.pid() },
                bundle: &self.parts.bundle,
                annotations: self.parts.annotations.as_ref(),
            },
        }
    }

    /// Lets the init execute its command; returns when it has. If it cannot, or a startContainer hook fails, or it is
    /// killed meanwhile, it is reaped and the container is stopped.
    pub fn start(&self) -> Result<()> {
        let life = &self.life;
        life.begin(self.id(), "start", &[Status::Created], Status::Starting)?;
        match self.execute() {
            Ok(()) => {
                life.finish(Status::Starting, Status::Running);
                Ok(())
            }
            Err(error) => {
                self.parts.child.kill_and_reap(&self.parts.common.reaper);
                life.stop();
                Err(error)
            }
        }
    }

    fn execute(&self) -> Result<()> {
        let parts = &self.parts;
        let start_container = parts.hooks.start_container().as_ref();
        if hooks::any(start_container) {
            let place = Place::of(self.pid(), self.pidfd(), parts.plan.namespaces.own)?;
            self.hook_run(Some(&parts.child), "created").all(
                "startContainer",
                start_container,
                &place,
            )?;
        }
        if !go_on(&parts.socket)? {
            return Err(Error::Died);
        }
        match receive(&parts.socket)? {
            (Message::Closed, _) => Ok(()),
            (Message::Failed(failure), _) => Err(translate::init_failure(&parts.plan, failure)),
            _ => Err(Error::Died),
        }
    }

    /// Whether there are hooks for a container that has started.
    pub fn has_poststart_hooks(&self) -> bool {
        hooks::any(self.parts.hooks.poststart().as_ref())
    }

    /// Runs them. If one fails, the container is killed.
    pub fn run_poststart_hooks(&self) -> Result<()> {
        let poststart = self.parts.hooks.poststart().as_ref();
        self.hook_run(None, "running")
            .all("poststart", poststart, &Place::Runtime)
            .inspect_err(|_| drop(self.parts.cgroup.kill()))
    }

    /// Runs a further process, which is `birth`'s; returns when it has executed its command, or why it could not.
    pub fn exec(&self, process: &oci::Process, stdio: Stdio, birth: &Birth) -> Result<Executed> {
        let allowed = [Status::Created, Status::Starting, Status::Running];
        let _pregnancy = self.life.conceive(self.id(), "exec in it", &allowed)?;
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
        let reaper = &parts.common.reaper;
        let (child, ending) = in_pid_namespace(pid_namespace, &parts.common, || {
            match spawn::clone(reaper, 0, Some(parts.cgroup.dir()), || plan.run(number)) {
                // The container has made cgroups of its own in its cgroup: join the one its init is in.
                Err(Error::Process { source, .. })
                    if source.raw_os_error() == Some(libc::EBUSY) =>
                {
                    let cgroup = parts.cgroup.of_process(self.pid())?;
                    spawn::clone(reaper, 0, Some(cgroup.as_fd()), || plan.run(number))
                }
                other => other,
            }
        })?;
        birth.set(&child);
        drop(child_socket);
        let born = Newborn {
            child,
            ending,
            socket,
            terminal: None,
        };
        supervise(born, &plan.process, reaper)
    }

    /// Signals the init; one that has ended needs none.
    pub fn signal(&self, signal: i32) -> Result<()> {
        self.parts.child.signal(signal)
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
    pub fn freeze(&self) -> Result<()> {
        let (id, life, cgroup) = (self.id(), &self.life, &self.parts.cgroup);
        life.begin(id, "pause", &[Status::Running], Status::Pausing)?;
        let frozen = life
            .wait_for_births(id)
            .and_then(|()| cgroup.set_frozen(id, true));
        let next = match frozen {
            Ok(()) => Status::Paused,
            Err(_) => Status::Running,
        };
        if life.finish(Status::Pausing, next) {
            return frozen;
        }
        // Its init has ended: what it left behind is not to stand still for ever.
        frozen.and_then(|()| cgroup.set_frozen(id, false))?;
        life.require(id, "pause", &[Status::Running])
    }

    /// Thaws every process.
    pub fn thaw(&self) -> Result<()> {
        let (id, life) = (self.id(), &self.life);
        life.begin(id, "resume", &[Status::Paused], Status::Resuming)?;
        let thawed = self.parts.cgroup.set_frozen(id, false);
        let next = match thawed {
            Ok(()) => Status::Running,
            Err(_) => Status::Paused,
        };
        life.finish(Status::Resuming, next);
        thawed
    }

    /// Changes the limits that `resources` names; device rules, if there are any, replace the former ones.
    pub fn update(&self, resources: &oci::LinuxResources) -> Result<()> {
        let alive = [
            Status::Created,
            Status::Starting,
            Status::Running,
            Status::Pausing,
            Status::Paused,
            Status::Resuming,
        ];
        self.life.require(self.id(), "update", &alive)?;
        let filter = match resources.devices() {
            Some(rules) if !rules.is_empty() => Some(DeviceFilter::new(rules)?),
            _ => None,
        };
        let mut attached = self.filter.lock().unwrap_or_else(PoisonError::into_inner);
        self.parts.cgroup.set_resources(resources)?;
        if let Some(filter) = filter {
            let programs = &self.parts.common.programs;
            let new = attach_filter(&self.parts.cgroup, programs, &filter, attached.as_ref())?;
            if new.is_some() {
                *attached = new;
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
    /// one's failure, [`Error::Hook`], which leaves nothing to do. After another error it can be deleted again.
    /// Refused while the container runs; a created one is killed, and reaped here.
    pub fn delete(&self) -> Result<()> {
        let allowed = [Status::Created, Status::Stopped];
        let was = self
            .life
            .begin(self.id(), "delete", &allowed, Status::Deleting)?;
        if was == Status::Created {
            self.parts.child.kill_and_reap(&self.parts.common.reaper);
        }
        if let Err(error) = self.parts.cgroup.remove() {
            self.life.finish(Status::Deleting, Status::Stopped);
            return Err(error);
        }
        let mut result = Ok(());
        for hook in self.parts.hooks.poststop().iter().flatten() {
            let run = self.hook_run(None, STOPPED);
            result = result.and(run.one("poststop", hook, &Place::Runtime));
        }
        result
    }
}

/// Listens to a process until it has executed its command. On failure it is reaped.
fn supervise(mut born: Newborn, plan: &ProcessPlan, reaper: &Reaper) -> Result<Executed> {
    let error = loop {
        match receive(&born.socket) {
            Ok((Message::Terminal, fd)) => born.terminal = fd,
            Ok((Message::Closed, _)) => {
                let Newborn {
                    child,
                    ending,
                    terminal,
                    ..
                } = born;
                return Ok(Executed {
                    process: Process(child),
                    ending,
                    terminal,
                });
            }
            Ok((Message::Failed(failure), _)) => break translate::process_failure(plan, failure),
            Ok(_) => break Error::Died,
            Err(error) => break error,
        }
    };
    born.child.kill_and_reap(reaper);
    Err(error)
}
