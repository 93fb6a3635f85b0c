//! From a sandbox's directory to a guest that is set up: cloned from a template, or booted.

use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use cella_proto::agent::{Mount, SetUpSandboxRequest};
use tokio::net::UnixListener;
use ttrpc::context::Context;

use super::agent::{self, Agent};
use super::dir::{self, SandboxDir};
use super::forward::Forward;
use super::state::{self, ProcessId, SandboxState};
use super::ways::{self, Found, TemplateUse, Ways};
use super::{Error, GUEST_SHARE, SandboxSpec};
use crate::error::ErrorKind;
use crate::hypervisor::{self, HandedVm, Hypervisor, Nic, SavedVm, Vm, VmSpec};
use crate::network::{self, Entrance, Network};
use crate::paths::Paths;
use crate::template::Shape;
use crate::timeline::Timeline;

/// How long a guest may take from its first instruction to its agent's call. Where KVM has no hardware, a cold
/// boot takes up to 20 s.
const BOOT_TIMEOUT: Duration = Duration::from_secs(120);
/// How long a clone's agent may take to be set up. It waits already; the rest is the network's devices, each a second
/// where KVM has no hardware, and the host's load.
const CLONE_TIMEOUT: Duration = Duration::from_secs(30);
/// How much longer for each CPU that its guest has to start: so long the guest's kernel waits for one.
const CPU_TIMEOUT: Duration = Duration::from_secs(10);
/// How much longer for each GiB that its guest has to take into use: 5 to 9 s where KVM has no hardware.
const GIB_TIMEOUT: Duration = Duration::from_secs(20);

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
    mut ways: Ways<'_>,
    mut spec: SandboxSpec,
    timeline: &Timeline,
) -> Result<Started, Error> {
    let dialled = dir.sockets().join(agent::AGENT_PORT.to_string());
    let listener = UnixListener::bind(&dialled)
        .map_err(|e| Error::host(format!("binding {}", dialled.display()), e))?;
    dir::open_to_vmm(&dialled)?;
    let (mut network, mut entrance) = (Network::default(), None);
    let found_nics = usize::from(spec.netns.is_some());
    if let Some(netns) = spec.netns.take() {
        (network, entrance) = connect(dir, &netns).await?;
        // One without interfaces is none: what was found is for one with some.
        if network.nics.is_empty() {
            ways.found = Found::look(paths, ways.hypervisor, &spec);
        }
    }
    let state = first_state(dir, ways.hypervisor, &spec);
    let request = set_up_request(&spec, &ways.found);
    let vm_spec = vm_spec(paths, dir, spec, network.nics);
    let mut start = Start {
        dir,
        hypervisor: ways.hypervisor,
        timeline,
        state,
        request: SetUpSandboxRequest {
            interfaces: network.interfaces,
            routes: network.routes,
            neighbors: network.neighbors,
            ..request
        },
    };
    let claimed = match ways.idle {
        Some(idle) if vm_spec.nics.len() == found_nics => {
            start.claimed(idle, vm_spec.nics.first()).await
        }
        // It has too many interfaces or too few, and runs.
        Some(idle) => {
            drop(idle);
            start.clear()?;
            None
        }
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

/// What is written down while there is no VMM yet.
fn first_state(dir: &SandboxDir, hypervisor: &dyn Hypervisor, spec: &SandboxSpec) -> SandboxState {
    SandboxState {
        id: dir.id().to_owned(),
        pod: spec.pod,
        hypervisor: hypervisor.name().to_owned(),
        owner: ProcessId::own(),
        vmm: ProcessId::own(),
        vcpus: spec.vcpus,
        memory_bytes: spec.memory_bytes,
        resolv_conf: !spec.resolv_conf.is_empty(),
        created: state::now(),
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
        let template = match found {
            Found::Template {
                key,
                shape,
                saved,
                better,
            } => match self.clone_from(&mut spec, &shape, &saved).await {
                Ok(Ok((vm, agent))) => {
                    let how = better.map_or(TemplateUse::Cloned, TemplateUse::Grown);
                    return Ok((vm, agent, how));
                }
                Ok(Err(refusal)) => return Err(self.refused(refusal)),
                Err(error) => {
                    let key_text = key.as_str();
                    tracing::warn!("cloning template {key_text}: {error}; booting instead");
                    ways::discard(paths, &key, &error);
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

    /// Restores the saved machine, which is of `shape`, and gives the agent that waits in it its identity before anything else.
    async fn clone_from(
        &mut self,
        spec: &mut VmSpec,
        shape: &Shape,
        saved: &SavedVm,
    ) -> Result<SetUp, Error> {
        ways::grow(spec, shape);
        self.state.memory_bytes = spec.memory_bytes.saturating_add(spec.added_memory_bytes);
        self.request.added_memory_bytes = spec.added_memory_bytes;
        let vm = self.hypervisor.restore(spec, saved).await?;
        self.identify(vm).await
    }

    /// An idle clone with its identity, if it lives and takes it.
    async fn claimed(&mut self, idle: HandedVm, nic: Option<&Nic>) -> Option<(Box<dyn Vm>, Agent)> {
        match self.take_over(idle, nic).await {
            Ok(Ok(identified)) => return Some(identified),
            Ok(Err(refusal)) => tracing::debug!("an idle sandbox: {refusal}"),
            Err(error) => tracing::debug!("an idle sandbox: {error}"),
        }
        // Its socket is in the way of the next attempt, which says what is wrong if that fails too.
        let _ = self.clear();
        None
    }

    async fn take_over(&mut self, idle: HandedVm, nic: Option<&Nic>) -> Result<SetUp, Error> {
        let vm = self.hypervisor.take_over(self.dir.id(), idle)?;
        if let Some(nic) = nic {
            vm.plug(nic.tap.as_fd()).await?;
        }
        self.identify(vm).await
    }

    async fn identify(&mut self, vm: Box<dyn Vm>) -> Result<SetUp, Error> {
        self.started(vm.as_ref())?;
        let (dir, vcpus, request) = (self.dir, self.state.vcpus, &mut self.request);
        let limit = clone_timeout(vcpus, request.added_memory_bytes);
        let called = async {
            let stream = agent::dial(&dir.vsock(), agent::AGENT_PORT).await?;
            personalize(request)?;
            // Of them, the template's guest had one in use.
            request.vcpus = vcpus;
            Agent::set_up_first(stream, request).await
        };
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
        self.request.spare_hardware_address.clear();
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

/// How long a clone may take that has so many CPUs, and so much memory beyond its template's.
fn clone_timeout(vcpus: u32, added_bytes: u64) -> Duration {
    let gib = u32::try_from(added_bytes >> 30).unwrap_or(u32::MAX);
    CLONE_TIMEOUT
        .saturating_add(CPU_TIMEOUT.saturating_mul(vcpus.saturating_sub(1)))
        .saturating_add(GIB_TIMEOUT.saturating_mul(gib))
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

fn set_up_request(spec: &SandboxSpec, found: &Found) -> SetUpSandboxRequest {
    let spares = match found {
        Found::Template { shape, .. } if shape.nics > 0 => network::SPARE_ADDRESS,
        _ => "",
    };
    SetUpSandboxRequest {
        spare_hardware_address: spares.to_owned(),
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
