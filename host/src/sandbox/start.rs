//! From a sandbox's directory to a guest that is set up: cloned from a template, or booted.

use std::path::Path;
use std::time::Duration;

use cella_proto::agent::{Mount, SetUpSandboxRequest};
use tokio::net::UnixListener;
use ttrpc::context::Context;

use super::agent::{self, Agent};
use super::dir::{self, SandboxDir};
use super::forward::Forward;
use super::state::{self, ProcessId, SandboxState};
use super::{Error, GUEST_SHARE, SandboxSpec};
use crate::error::ErrorKind;
use crate::hypervisor::{self, HandedVm, Hypervisor, Nic, SavedVm, Vm, VmSpec};
use crate::network::{Entrance, Network};
use crate::paths::Paths;
use crate::pool::{self, Claimed};
use crate::template::{self, Key, Shape, Store};
use crate::timeline::Timeline;

/// How long a guest may take from its first instruction to its agent's call. Where KVM has no hardware, a cold
/// boot takes up to 20 s.
const BOOT_TIMEOUT: Duration = Duration::from_secs(120);
/// How long a clone's agent may take to be set up. It waits already; the rest is the network's devices, each a second
/// where KVM has no hardware, and the host's load.
const CLONE_TIMEOUT: Duration = Duration::from_secs(30);
/// How much longer for each CPU that its guest has to start: so long the guest's kernel waits for one.
const CPU_TIMEOUT: Duration = Duration::from_secs(10);

/// What templates had to do with a sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TemplateUse {
    /// It is a clone.
    Cloned,
    /// It is a clone that waited in the pool.
    Claimed,
    /// It was booted; with a template of this shape it could have been a clone.
    Wanted(Shape),
    /// It was booted, and another one like it will be.
    Unused,
}

/// A guest that is set up.
pub(super) struct Started {
    pub(super) vm: Box<dyn Vm>,
    pub(super) agent: Agent,
    pub(super) template: TemplateUse,
    /// Connections to the pod's ports, if it has a network.
    pub(super) forward: Option<Forward>,
}

/// Starts the virtual machine of the sandbox in `dir`, and sets its guest up.
pub(super) async fn bring_up(
    paths: &Paths,
    dir: &SandboxDir,
    ways: Ways<'_>,
    spec: SandboxSpec,
    timeline: &Timeline,
) -> Result<Started, Error> {
    let dialled = dir.sockets().join(agent::AGENT_PORT.to_string());
    let listener = UnixListener::bind(&dialled)
        .map_err(|e| Error::host(format!("binding {}", dialled.display()), e))?;
    dir::open_to_vmm(&dialled)?;
    let mut request = set_up_request(&spec);
    let (nics, entrance) = match &spec.netns {
        Some(netns) => {
            let (network, entrance) = connect(dir, netns).await?;
            request.interfaces = network.interfaces;
            request.routes = network.routes;
            request.neighbors = network.neighbors;
            (network.nics, entrance)
        }
        None => (Vec::new(), None),
    };
    let state = SandboxState {
        id: dir.id().to_owned(),
        pod: spec.pod,
        hypervisor: ways.hypervisor.name().to_owned(),
        owner: ProcessId::own(),
        vmm: ProcessId::own(),
        vcpus: spec.vcpus,
        memory_bytes: spec.memory_bytes,
        resolv_conf: !spec.resolv_conf.is_empty(),
        created: state::now(),
    };
    let vm_spec = vm_spec(paths, dir, spec, nics);
    let mut start = Start {
        dir,
        hypervisor: ways.hypervisor,
        timeline,
        state,
        request,
    };
    let claimed = match ways.claimed {
        Some(handed) => start.claimed(handed).await,
        None => None,
    };
    let (vm, agent, template) = match claimed {
        Some((vm, agent)) => (vm, agent, TemplateUse::Claimed),
        None => {
            start
                .clone_or_boot(paths, ways.found, vm_spec, &listener)
                .await?
        }
    };
    timeline.mark("sandbox-set-up");
    let forward = entrance.map(|entrance| Forward::start(entrance, &dir.vsock()));
    Ok(Started {
        vm,
        agent,
        template,
        forward: forward.transpose()?,
    })
}

/// The ways to a machine, the quickest first.
pub(super) struct Ways<'a> {
    pub(super) hypervisor: &'a dyn Hypervisor,
    /// An idle clone that is this process's.
    pub(super) claimed: Option<HandedVm>,
    pub(super) found: Found,
}

/// What there is to clone.
pub(super) enum Found {
    Template(Key, Shape, SavedVm),
    Missing(Shape),
    Nothing,
}

impl Found {
    /// An idle clone of it. Those of the pool have no network interfaces, no disks and no added memory, and the configuration's CPUs.
    pub(super) fn claim(&self, paths: &Paths, spec: &SandboxSpec) -> Option<Claimed> {
        match self {
            Self::Template(key, shape, _)
                if spec.pool
                    && spec.netns.is_none()
                    && spec.disks.is_empty()
                    && spec.memory_bytes == shape.memory_bytes =>
            {
                pool::claim(paths, key, spec.vcpus)
            }
            _ => None,
        }
    }

    pub(super) fn look(paths: &Paths, hypervisor: &dyn Hypervisor, spec: &SandboxSpec) -> Self {
        // A console is a device that a template does not have.
        if !spec.template || !hypervisor.saves() || spec.console.is_some() {
            return Self::Nothing;
        }
        let shape = Shape::serving(spec.vcpus, spec.memory_bytes, &spec.cmdline);
        let key = match Key::of(paths, &shape) {
            Ok(key) => key,
            // A program is missing: the boot fails of it, and says so.
            Err(error) => {
                tracing::debug!("looking for a template: {error}");
                return Self::Nothing;
            }
        };
        match Store::new(paths).open(&key) {
            Ok(Some(saved)) => Self::Template(key, shape, saved),
            Ok(None) => Self::Missing(shape),
            Err(error) => {
                tracing::warn!("looking for a template: {error}; booting instead");
                Self::Nothing
            }
        }
    }
}

/// Makes `spec` that of a clone of a template of `shape`, with the memory that it has beyond that as added memory.
fn grow(spec: &mut VmSpec, shape: &Shape) {
    let more = spec.memory_bytes.saturating_sub(shape.memory_bytes);
    spec.added_memory_bytes = more
        .checked_next_multiple_of(hypervisor::ADDED_BLOCK)
        .unwrap_or(more);
    spec.memory_bytes = shape.memory_bytes;
}

/// A template that cannot be used is in the way of one that can, unless it is the host that lacks something.
fn discard(paths: &Paths, key: &Key, why: &Error) {
    if why.kind() == ErrorKind::ResourceExhausted {
        return;
    }
    match Store::new(paths).remove(key) {
        Ok(()) | Err(template::Error::NotFound(_)) => {}
        Err(error) => tracing::warn!("{error}"),
    }
}

/// What starting a machine needs, either way.
struct Start<'a> {
    dir: &'a SandboxDir,
    hypervisor: &'a dyn Hypervisor,
    timeline: &'a Timeline,
    state: SandboxState,
    request: SetUpSandboxRequest,
}

/// A guest that is set up, or its agent's refusal to, which another guest would give as well.
type SetUp = Result<(Box<dyn Vm>, Agent), ttrpc::Error>;

impl Start<'_> {
    /// A clone, if there is a template that serves; a booted machine otherwise.
    async fn clone_or_boot(
        &mut self,
        paths: &Paths,
        found: Found,
        mut spec: VmSpec,
        listener: &UnixListener,
    ) -> Result<(Box<dyn Vm>, Agent, TemplateUse), Error> {
        let memory_bytes = spec.memory_bytes;
        if let Found::Template(_, shape, _) = &found {
            grow(&mut spec, shape);
            self.state.memory_bytes = spec.memory_bytes.saturating_add(spec.added_memory_bytes);
        }
        let template = match found {
            Found::Template(key, shape, saved) => match self.clone_from(&spec, &saved).await {
                Ok(Ok((vm, agent))) => return Ok((vm, agent, TemplateUse::Cloned)),
                Ok(Err(refusal)) => return Err(self.refused(refusal)),
                Err(error) => {
                    let key_text = key.as_str();
                    tracing::warn!("cloning template {key_text}: {error}; booting instead");
                    discard(paths, &key, &error);
                    self.clear()?;
                    TemplateUse::Wanted(shape)
                }
            },
            Found::Missing(shape) => TemplateUse::Wanted(shape),
            Found::Nothing => TemplateUse::Unused,
        };
        self.state.memory_bytes = memory_bytes;
        let (vm, agent) = self
            .boot(
                VmSpec {
                    memory_bytes,
                    ..spec
                },
                listener,
            )
            .await?;
        Ok((vm, agent, template))
    }

    /// Restores the saved machine, and gives the agent that waits in it its identity before anything else.
    async fn clone_from(&mut self, spec: &VmSpec, saved: &SavedVm) -> Result<SetUp, Error> {
        self.request.added_memory_bytes = spec.added_memory_bytes;
        let vm = self.hypervisor.restore(spec, saved).await?;
        self.identify(vm).await
    }

    /// An idle clone with its identity, if it lives and takes it.
    async fn claimed(&mut self, handed: HandedVm) -> Option<(Box<dyn Vm>, Agent)> {
        let identified = match self.hypervisor.take_over(self.dir.id(), handed) {
            Ok(vm) => self.identify(vm).await,
            Err(error) => Err(error.into()),
        };
        match identified {
            Ok(Ok(identified)) => return Some(identified),
            Ok(Err(refusal)) => tracing::debug!("an idle sandbox: {refusal}"),
            Err(error) => tracing::debug!("an idle sandbox: {error}"),
        }
        // Its socket is in the way of the next attempt, which says what is wrong if that fails too.
        let _ = self.clear();
        None
    }

    async fn identify(&mut self, vm: Box<dyn Vm>) -> Result<SetUp, Error> {
        self.started(vm.as_ref())?;
        let (dir, vcpus, request) = (self.dir, self.state.vcpus, &mut self.request);
        let called = async {
            let stream = agent::dial(&dir.vsock(), agent::AGENT_PORT).await?;
            personalize(request)?;
            // Of them, the template's guest had one in use.
            request.vcpus = vcpus;
            Agent::set_up_first(stream, request).await
        };
        let limit =
            CLONE_TIMEOUT.saturating_add(CPU_TIMEOUT.saturating_mul(vcpus.saturating_sub(1)));
        let called = tokio::select! {
            called = tokio::time::timeout(limit, called) => {
                called.map_err(|_| late(limit))??
            }
            ended = vm.wait() => return Err(gone(self.dir, &ended).into()),
        };
        Ok(called.map(|agent| (vm, agent)))
    }

    /// Boots a machine, whose agent calls, and sets its guest up.
    async fn boot(
        &mut self,
        spec: VmSpec,
        listener: &UnixListener,
    ) -> Result<(Box<dyn Vm>, Agent), Error> {
        let vm = self.hypervisor.boot(spec).await?;
        self.started(vm.as_ref())?;
        let agent = tokio::select! {
            agent = first_call(listener) => agent?,
            ended = vm.wait() => return Err(gone(self.dir, &ended).into()),
        };
        let started_us = started_us(vm.as_ref()).await;
        self.timeline.ready(agent.ready().await?, started_us);
        personalize(&mut self.request)?;
        (self.request.added_memory_bytes, self.request.vcpus) = (0, 0);
        agent
            .client()
            .set_up_sandbox(Context::default(), &self.request)
            .await
            .map_err(|refusal| self.refused(refusal))?;
        Ok((vm, agent))
    }

    fn refused(&self, refusal: ttrpc::Error) -> Error {
        Error::agent(format!("setting up sandbox {}", self.dir.id()), refusal)
    }

    fn started(&mut self, vm: &dyn Vm) -> Result<(), Error> {
        self.timeline.mark("vm-started");
        if let Some(vmm) = ProcessId::of(vm.pid()) {
            self.state.vmm = vmm;
        }
        self.dir.write_state(&self.state)
    }

    /// Makes room for a second attempt.
    fn clear(&self) -> Result<(), Error> {
        let path = self.dir.vsock();
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::host(format!("removing {}", path.display()), error))
            }
            _ => Ok(()),
        }
    }
}

/// What no two guests have in common, and what changes while one starts: drawn at the last moment.
fn personalize(request: &mut SetUpSandboxRequest) -> Result<(), Error> {
    request.entropy = entropy()?;
    request.clock_ns = clock_ns();
    Ok(())
}

/// Entropy for one guest.
pub(super) fn entropy() -> Result<Vec<u8>, Error> {
    let mut entropy = vec![0; 64];
    rustix::rand::getrandom(&mut entropy[..], rustix::rand::GetRandomFlags::empty())
        .map_err(|e| Error::host("drawing entropy for the guest", e))?;
    Ok(entropy)
}

/// The host's wall clock, nanoseconds since the epoch.
pub(super) fn clock_ns() -> i64 {
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    clock.map_or(0, |since| since.as_nanos().try_into().unwrap_or(0))
}

pub(super) fn late(limit: Duration) -> Error {
    Error::state(
        ErrorKind::DeadlineExceeded,
        format!(
            "waiting for the agent: it did not answer within {} s",
            limit.as_secs()
        ),
    )
}

async fn first_call(listener: &UnixListener) -> Result<Agent, Error> {
    let accepted = tokio::time::timeout(BOOT_TIMEOUT, listener.accept()).await;
    match accepted {
        Ok(Ok((stream, _))) => Agent::new(stream).await,
        Ok(Err(e)) => Err(Error::host("accepting the agent's call", e)),
        Err(_) => Err(late(BOOT_TIMEOUT)),
    }
}

/// When the first guest instruction ran, for the timeline; 0 if the VMM does not say.
async fn started_us(vm: &dyn Vm) -> u64 {
    vm.stats().await.map_or(0, |stats| stats.started_us)
}

pub(super) fn gone(dir: &SandboxDir, ended: &hypervisor::Ended) -> hypervisor::Error {
    hypervisor::Error::Gone {
        id: dir.id().to_owned(),
        message: ended.message.clone(),
    }
}

/// Takes the interfaces of a network namespace for the guest.
pub(super) async fn connect(
    dir: &SandboxDir,
    netns: &Path,
) -> Result<(Network, Option<Entrance>), Error> {
    // The path must mean the same to whoever cleans up.
    let netns = std::path::absolute(netns)
        .map_err(|e| Error::host(format!("finding {}", netns.display()), e))?;
    let network = Network::open(&netns).await?;
    dir.write_network(&network.joints)?;
    let entrance = network.join().await?;
    Ok((network, entrance))
}

fn vm_spec(paths: &Paths, dir: &SandboxDir, spec: SandboxSpec, nics: Vec<Nic>) -> VmSpec {
    VmSpec {
        vcpus: spec.vcpus,
        memory_bytes: spec.memory_bytes,
        cmdline: spec.cmdline,
        console: spec.console,
        nics,
        disks: spec.disks,
        ..plain_vm_spec(paths, dir)
    }
}

/// The machine of the sandbox in `dir`, without memory and CPUs, and with the devices that each one has.
pub(crate) fn plain_vm_spec(paths: &Paths, dir: &SandboxDir) -> VmSpec {
    VmSpec {
        id: dir.id().to_owned(),
        vcpus: 0,
        possible_vcpus: 0,
        memory_bytes: 0,
        added_memory_bytes: 0,
        vmm: paths.vmm(),
        kernel: paths.kernel(),
        initrd: paths.initrd(),
        cmdline: String::new(),
        share: dir.share(),
        sockets: dir.sockets(),
        vsock: dir.vsock(),
        console: None,
        spare_slots: 0,
        nics: Vec::new(),
        disks: Vec::new(),
        mounts: Vec::new(),
    }
}

fn set_up_request(spec: &SandboxSpec) -> SetUpSandboxRequest {
    SetUpSandboxRequest {
        hostname: spec.hostname.clone(),
        sysctls: spec.sysctls.clone(),
        mounts: vec![Mount {
            source: "share".into(),
            destination: GUEST_SHARE.into(),
            fstype: "virtiofs".into(),
            ..Default::default()
        }],
        resolv_conf: spec.resolv_conf.clone(),
        ..Default::default()
    }
}
