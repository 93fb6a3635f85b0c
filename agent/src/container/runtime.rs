//! Making containers.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;

use oci_spec::runtime as oci;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::cgroup::{Cgroup, Hierarchy};
use super::container::{Container, Parts};
use super::device_filter::{DeviceFilter, Program, Programs};
use super::hooks::{self, HookRun, HookState, Place};
use super::init::InitPlan;
use super::namespaces::{IdMaps, NamespacePlan, SharedNamespaces};
use super::plan::init_plan;
use super::process::ProcessPlan;
use super::report::Message;
use super::seccomp::{Filters, SeccompPlan};
use super::spawn::{self, Birth, Child};
use super::{Error, Result, terminal, translate, validate};
use crate::reaper::{Ending, Reaper};

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

/// What the containers of an agent have in common.
#[derive(Debug)]
pub(super) struct Common {
    /// The agent's own pid namespace, to return to.
    pub pid_namespace: OwnedFd,
    /// Device and inode of the agent's binary.
    pub own_binary: (u64, u64),
    pub reaper: Arc<Reaper>,
    pub programs: Programs,
    pub filters: Filters,
}

/// Makes containers. The guest must have /proc, /sys and a cgroup2 mount, and /dev with the standard devices.
#[derive(Debug)]
pub struct Runtime {
    common: Arc<Common>,
    hierarchy: Hierarchy,
}

/// Standard streams of a process; what is `None` is /dev/null. With a terminal only `size` counts.
#[derive(Debug, Default)]
pub struct Stdio {
    /// Standard input.
    pub stdin: Option<OwnedFd>,
    /// Standard output.
    pub stdout: Option<OwnedFd>,
    /// Standard error.
    pub stderr: Option<OwnedFd>,
    /// Rows and columns of the terminal; else what the spec's consoleSize says.
    pub size: Option<(u16, u16)>,
}

/// What [`Runtime::create`] made.
#[derive(Debug)]
pub struct Created {
    /// The container, waiting for its start.
    pub container: Container,
    /// Tells of the end of its init.
    pub ending: Ending,
    /// The terminal's master, if the spec asks for a terminal.
    pub terminal: Option<OwnedFd>,
}

/// A new process on its way to `execve`.
#[derive(Debug)]
pub(super) struct Newborn {
    pub child: Arc<Child>,
    pub ending: Ending,
    pub socket: OwnedFd,
    pub terminal: Option<OwnedFd>,
}

impl Runtime {
    /// Prepares the runtime. `reaper` learns of every child before it can end.
    pub fn new(config: RuntimeConfig, reaper: Arc<Reaper>) -> Result<Self> {
        let hierarchy = Hierarchy::new(config.cgroup_root, config.cgroup_parent)?;
        let fail = |step: &str, source: io::Error| Error::Process {
            step: step.into(),
            source,
        };
        let pid_namespace = std::fs::File::open("/proc/self/ns/pid")
            .map_err(|e| fail("opening /proc/self/ns/pid", e))?
            .into();
        let binary = rustix::fs::stat("/proc/self/exe")
            .map_err(|e| fail("examining /proc/self/exe", e.into()))?;
        let own_binary = (binary.st_dev, binary.st_ino);
        Ok(Self {
            common: Arc::new(Common {
                pid_namespace,
                own_binary,
                reaper,
                programs: Programs::default(),
                filters: Filters::default(),
            }),
            hierarchy,
        })
    }

    /// Makes a container up to, not including, the execution of its command. Its init is `birth`'s. On failure nothing
    /// is left of it.
    pub fn create(
        &self,
        id: &str,
        spec: &oci::Spec,
        stdio: Stdio,
        shared: &SharedNamespaces,
        birth: &Birth,
    ) -> Result<Created> {
        validate::id(id)?;
        let parts = validate::spec(spec)?;
        let linux = parts.linux;
        let namespaces = NamespacePlan::new(linux, shared)?;
        let seccomp = self.seccomp(linux)?;
        let personality = linux
            .personality()
            .as_ref()
            .map(validate::personality)
            .transpose()?;
        let own_binary = self.common.own_binary;
        let process = ProcessPlan::new(
            parts.process,
            seccomp.clone(),
            personality,
            own_binary,
            stdio,
        )?;
        let no_rules = Vec::new();
        let resources = linux.resources().as_ref();
        let rules = resources
            .and_then(|r| r.devices().as_ref())
            .unwrap_or(&no_rules);
        let filter = DeviceFilter::new(rules)?;
        let cgroup = self.hierarchy.create(id, linux.cgroups_path().as_deref())?;
        let programs = &self.common.programs;
        let made = set_limits(&cgroup, resources, programs, &filter).and_then(|filter| {
            let mut plan = init_plan(spec, &parts, namespaces, process, &cgroup)?;
            let born = self.give_birth(id, spec, &cgroup, &mut plan, birth)?;
            Ok((filter, plan, born))
        });
        let (filter, plan, born) = made.inspect_err(|_| {
            // The first error is what the caller needs; a cgroup in use is met again by the next create.
            let _ = cgroup.remove();
        })?;
        let Newborn {
            child,
            ending,
            socket,
            terminal,
        } = born;
        let container = Container::new(Parts {
            id: id.into(),
            common: Arc::clone(&self.common),
            child,
            socket,
            cgroup,
            filter,
            plan,
            seccomp,
            personality,
            hooks: spec.hooks().clone().unwrap_or_default(),
            annotations: spec.annotations().clone(),
            bundle: bundle(parts.root),
        });
        Ok(Created {
            container,
            ending,
            terminal,
        })
    }

    /// The system call filter, if there is to be one.
    fn seccomp(&self, linux: &oci::Linux) -> Result<Option<Arc<SeccompPlan>>> {
        let filter_of = |rules: &oci::LinuxSeccomp| {
            let compile = || SeccompPlan::new(rules).map(Arc::new);
            self.common.filters.get(rules, compile)
        };
        linux.seccomp().as_ref().map(filter_of).transpose()
    }

    /// Makes the init and brings it to where it waits for its start.
    fn give_birth(
        &self,
        id: &str,
        spec: &oci::Spec,
        cgroup: &Cgroup,
        plan: &mut InitPlan,
        birth: &Birth,
    ) -> Result<Newborn> {
        let (socket, child_socket) = socket_pair()?;
        plan.keep.push(child_socket.as_raw_fd());
        plan.keep.sort_unstable();
        let plan = &*plan;
        let number = child_socket.as_raw_fd();
        let (kinds, reaper) = (plan.namespaces.clone, &*self.common.reaper);
        let (child, ending) = in_pid_namespace(
            plan.namespaces.pid.as_ref().map(AsFd::as_fd),
            &self.common,
            || spawn::clone(reaper, kinds, Some(cgroup.dir()), || plan.run(number)),
        )?;
        birth.set(&child);
        drop(child_socket);
        let born = Newborn {
            child,
            ending,
            socket,
            terminal: None,
        };
        supervise(id, spec, plan, born, reaper)
    }
}

/// Speaks with the init until it is ready. On failure it is reaped.
fn supervise(
    id: &str,
    spec: &oci::Spec,
    plan: &InitPlan,
    mut born: Newborn,
    reaper: &Reaper,
) -> Result<Newborn> {
    let result = (|| {
        if let Some(maps) = &plan.namespaces.id_maps {
            write_id_maps(&born.child, maps, plan)?;
            // Of a death the next message tells.
            let _ = go_on(&born.socket)?;
        }
        loop {
            let (message, fd) = receive(&born.socket)?;
            match message {
                Message::Terminal => born.terminal = fd,
                Message::Hooks => {
                    run_create_hooks(id, spec, plan, &born.child, reaper)?;
                    let _ = go_on(&born.socket)?;
                }
                Message::Ready => return Ok(()),
                Message::Failed(failure) => return Err(translate::init_failure(plan, failure)),
                Message::Closed | Message::Continue => return Err(Error::Died),
            }
        }
    })();
    match result {
        Ok(()) => Ok(born),
        Err(error) => {
            born.child.kill_and_reap(reaper);
            Err(error)
        }
    }
}

fn run_create_hooks(
    id: &str,
    spec: &oci::Spec,
    plan: &InitPlan,
    child: &Child,
    reaper: &Reaper,
) -> Result<()> {
    let Some(hooks) = spec.hooks() else {
        return Ok(());
    };
    let bundle = spec.root().as_ref().map(bundle).unwrap_or_default();
    let run = HookRun {
        reaper,
        init: Some(child),
        state: HookState {
            id,
            status: "creating",
            pid: child.pid,
            bundle: &bundle,
            annotations: spec.annotations().as_ref(),
        },
    };
    #[allow(deprecated, reason = "bundles still have prestart hooks")]
    let prestart = hooks.prestart().as_ref();
    run.all("prestart", prestart, &Place::Runtime)?;
    run.all(
        "createRuntime",
        hooks.create_runtime().as_ref(),
        &Place::Runtime,
    )?;
    let create_container = hooks.create_container().as_ref();
    if !hooks::any(create_container) {
        return Ok(());
    }
    let place = Place::of(child.pid, child.pidfd.as_fd(), plan.namespaces.own)?;
    run.all("createContainer", create_container, &place)
}

/// The directory that the root is in, which for every bundle is the bundle.
fn bundle(root: &oci::Root) -> PathBuf {
    root.path().parent().map(PathBuf::from).unwrap_or_default()
}

fn set_limits(
    cgroup: &Cgroup,
    resources: Option<&oci::LinuxResources>,
    programs: &Programs,
    filter: &DeviceFilter,
) -> Result<Option<Program>> {
    if let Some(resources) = resources {
        cgroup.set_resources(resources)?;
    }
    attach_filter(cgroup, programs, filter, None)
}

/// Attaches a device filter.
pub(super) fn attach_filter(
    cgroup: &Cgroup,
    programs: &Programs,
    filter: &DeviceFilter,
    old: Option<&Program>,
) -> Result<Option<Program>> {
    filter
        .attach(cgroup.dir(), programs, old)
        .map_err(|source| Error::Cgroup {
            step: "attaching the device filter to",
            path: cgroup.path().into(),
            source,
        })
}

/// What a child in a new user namespace cannot write itself: its maps, and a lowered OOM score.
fn write_id_maps(child: &Child, maps: &IdMaps, plan: &InitPlan) -> Result<()> {
    maps.write(child.pid)?;
    let Some(adj) = &plan.process.oom_score_adj else {
        return Ok(());
    };
    let path = format!("/proc/{}/oom_score_adj", child.pid);
    std::fs::write(&path, adj.as_bytes()).map_err(|source| Error::Namespace {
        step: format!("writing {path}"),
        source,
    })
}

/// The pair that an agent and its child speak over.
pub(super) fn socket_pair() -> Result<(OwnedFd, OwnedFd)> {
    rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(|e| Error::Process {
        step: "making a socket pair".into(),
        source: e.into(),
    })
}

/// Runs `f`, which makes a child, so that the child is born in the pid namespace `fd`.
pub(super) fn in_pid_namespace<T>(
    fd: Option<std::os::fd::BorrowedFd<'_>>,
    common: &Common,
    f: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let Some(fd) = fd else { return f() };
    let enter = |fd: RawFd, step: &str| {
        super::sys::setns(fd, libc::CLONE_NEWPID).map_err(|errno| Error::Namespace {
            step: step.into(),
            source: errno.into(),
        })
    };
    enter(fd.as_raw_fd(), "joining the pid namespace")?;
    let result = f();
    enter(
        common.pid_namespace.as_raw_fd(),
        "returning to the guest's pid namespace",
    )?;
    result
}

/// Lets a child go on; false if it has died.
pub(super) fn go_on(socket: &OwnedFd) -> Result<bool> {
    match Message::Continue.send(socket.as_raw_fd()) {
        Ok(()) => Ok(true),
        Err(super::sys::Errno(libc::EPIPE | libc::ECONNRESET)) => Ok(false),
        Err(errno) => Err(Error::Process {
            step: "speaking to the init".into(),
            source: errno.into(),
        }),
    }
}

/// The next message of a child.
pub(super) fn receive(socket: &OwnedFd) -> Result<(Message, Option<OwnedFd>)> {
    terminal::receive(socket).map_err(|source| Error::Process {
        step: "listening to the new process".into(),
        source,
    })
}
