//! A sandbox: one virtual machine, its agent, and the containers in it.
//!
//! | file | what lives there |
//! | --- | --- |
//! | [`dir`] | its directory on the host |
//! | [`state`] | what is written down of it |
//! | [`agent`] | the connection to its agent |
//! | `calls` | what it asks of its agent |
//! | `forward` | connections to the pod's ports |
//! | [`stdio`] | standard streams as connections |
//! | [`volume`] | what containers see of the host |
//! | [`gc`] | what dead processes left |

pub mod agent;
mod calls;
pub mod dir;
mod error;
mod forward;
pub mod gc;
pub mod state;
pub mod stdio;
pub mod volume;

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cella_proto::agent::{Mount, Ready, SetUpSandboxRequest};
use cella_proto::vmm::Stats;
use tokio::net::UnixListener;
use ttrpc::context::Context;

pub use self::agent::Agent;
use self::dir::{BootLock, OwnerLock, SandboxDir};
pub use self::error::{Error, StartFailure};
use self::state::{ProcessId, SandboxState};
use crate::error::ErrorKind;
use crate::hypervisor::{self, Hypervisor, Nic, Vm, VmSpec};
use crate::network::{Entrance, Network};
use crate::paths::Paths;
use crate::timeline::Timeline;

/// Where the guest sees the host's shared directory.
pub const GUEST_SHARE: &str = "/run/cella/share";
/// How long a guest may take from its first instruction to its agent's call. Where KVM has no hardware, a cold
/// boot takes up to 20 s.
const BOOT_TIMEOUT: Duration = Duration::from_secs(120);
/// How long the agent may take to end the containers and power off before the machine is just stopped.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(3);

/// What a new sandbox shall be.
#[derive(Debug)]
pub struct SandboxSpec {
    /// It outlives its containers.
    pub pod: bool,
    /// 1 to 32.
    pub vcpus: u32,
    /// Guest RAM in bytes.
    pub memory_bytes: u64,
    /// The pod's host name.
    pub hostname: String,
    /// The pod's sysctls.
    pub sysctls: HashMap<String, String>,
    /// Words for the guest kernel's command line.
    pub cmdline: String,
    /// The guest's console goes there.
    pub console: Option<File>,
    /// The network namespace whose interfaces the pod gets; without one it has a loopback device only.
    pub netns: Option<PathBuf>,
    /// The text of the containers' /etc/resolv.conf; empty: they keep their image's.
    pub resolv_conf: String,
}

/// A living sandbox: owned, if this process booted it, or attached.
pub struct Sandbox {
    dir: SandboxDir,
    agent: Agent,
    owned: Option<Owned>,
}

struct Owned {
    _forward: Option<forward::Forward>,
    vm: Box<dyn Vm>,
    /// Its directory is removed, and may be another's by now.
    ended: AtomicBool,
    _lock: OwnerLock,
}

/// Removes a sandbox's directory unless it got a sandbox.
struct Unfinished(Option<SandboxDir>);

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(dir) = &self.0
            && let Err(error) = dir.remove()
        {
            tracing::warn!("removing unfinished sandbox {}: {error}", dir.id());
        }
    }
}

impl Sandbox {
    /// Boots a sandbox and sets it up; it is ready for containers.
    ///
    /// # Errors
    /// `AlreadyExists`: the id is in use. After any error nothing is left of it.
    pub async fn boot(
        paths: &Paths,
        dir: SandboxDir,
        hypervisor: &dyn Hypervisor,
        spec: SandboxSpec,
        timeline: &Timeline,
    ) -> Result<Self, Error> {
        let (lock, booting) = dir.create()?;
        // From here on the directory is this call's to remove. The machine, made later, is dropped before.
        let mut unfinished = Unfinished(Some(dir.clone()));
        let made = Self::bring_up(paths, &dir, hypervisor, spec, lock, booting, timeline).await;
        if made.is_ok() {
            unfinished.0 = None;
        }
        made
    }

    async fn bring_up(
        paths: &Paths,
        dir: &SandboxDir,
        hypervisor: &dyn Hypervisor,
        spec: SandboxSpec,
        lock: OwnerLock,
        _booting: BootLock,
        timeline: &Timeline,
    ) -> Result<Self, Error> {
        let dialled = dir.sockets().join(agent::AGENT_PORT.to_string());
        let listener = UnixListener::bind(&dialled)
            .map_err(|e| Error::host(format!("binding {}", dialled.display()), e))?;
        dir::open_to_vmm(&dialled)?;
        let mut request = set_up_request(&spec)?;
        let (nics, entrance) = match &spec.netns {
            Some(netns) => connect(dir, netns, &mut request).await?,
            None => (Vec::new(), None),
        };
        let mut state = SandboxState {
            id: dir.id().to_owned(),
            pod: spec.pod,
            hypervisor: hypervisor.name().to_owned(),
            owner: ProcessId::own(),
            vmm: ProcessId::own(),
            vcpus: spec.vcpus,
            memory_bytes: spec.memory_bytes,
            resolv_conf: !spec.resolv_conf.is_empty(),
            created: state::now(),
        };
        let vm = hypervisor.boot(vm_spec(paths, dir, spec, nics)).await?;
        timeline.mark("vm-started");
        state.vmm = ProcessId::of(vm.pid()).unwrap_or(state.vmm);
        dir.write_state(&state)?;
        let agent = tokio::select! {
            agent = first_call(&listener) => agent?,
            ended = vm.wait() => return Err(gone(dir, &ended).into()),
        };
        timeline.ready(agent.ready().await?, started_us(vm.as_ref()).await);
        agent
            .client()
            .set_up_sandbox(Context::default(), &request)
            .await
            .map_err(|e| Error::agent(format!("setting up sandbox {}", dir.id()), e))?;
        timeline.mark("sandbox-set-up");
        let forward = entrance.map(|entrance| forward::Forward::start(entrance, &dir.vsock()));
        Ok(Self {
            dir: dir.clone(),
            agent,
            owned: Some(Owned {
                _forward: forward.transpose()?,
                vm,
                ended: AtomicBool::new(false),
                _lock: lock,
            }),
        })
    }

    /// Connects to a sandbox that another process owns, once it has booted.
    ///
    /// # Errors
    /// `NotFound`: there is none of that id that lives.
    pub async fn attach(dir: SandboxDir) -> Result<Self, Error> {
        dir.wait_booted().await?;
        if !dir.is_owned() {
            return Err(Error::state(
                ErrorKind::NotFound,
                format!("no sandbox {} is running", dir.id()),
            ));
        }
        let stream = agent::dial(&dir.vsock(), agent::AGENT_PORT).await?;
        let agent = Agent::new(stream).await?;
        Ok(Self {
            dir,
            agent,
            owned: None,
        })
    }

    /// Its directory.
    pub fn dir(&self) -> &SandboxDir {
        &self.dir
    }

    /// What the agent said when it was ready.
    ///
    /// # Errors
    /// `Unavailable`: it is gone.
    pub async fn ready(&self) -> Result<Ready, Error> {
        self.agent.ready().await
    }

    /// What the virtual machine has cost; only its owner can ask.
    ///
    /// # Errors
    /// `FailedPrecondition`: another process owns it.
    pub async fn vm_stats(&self) -> Result<Stats, Error> {
        match &self.owned {
            Some(owned) => Ok(owned.vm.stats().await?),
            None => Err(Error::state(
                ErrorKind::FailedPrecondition,
                format!("sandbox {} is owned by another process", self.dir.id()),
            )),
        }
    }

    /// Returns when the owned virtual machine has ended; never for an attached one.
    pub async fn ended(&self) -> hypervisor::Ended {
        match &self.owned {
            Some(owned) => owned.vm.wait().await,
            None => std::future::pending().await,
        }
    }

    /// The process id of the owned virtual machine's VMM; 0 for an attached sandbox.
    pub fn vmm_pid(&self) -> u32 {
        self.owned.as_ref().map_or(0, |owned| owned.vm.pid())
    }

    /// Ends an owned sandbox as it is, for an owner that shares it with tasks of its own. What asks it for something
    /// afterwards is told that it is gone; dropping it then removes nothing any more.
    ///
    /// # Errors
    /// Something could not be removed.
    pub async fn end(&self) -> Result<(), Error> {
        let Some(owned) = &self.owned else {
            return Ok(());
        };
        owned.vm.stop().await?;
        if owned.ended.swap(true, Ordering::Relaxed) {
            return Ok(());
        }
        self.dir.remove()
    }

    /// Ends an owned sandbox with everything in it and removes it from the host. An attached one is only left.
    ///
    /// # Errors
    /// Something could not be removed.
    pub async fn stop(self) -> Result<(), Error> {
        let Some(owned) = &self.owned else {
            return Ok(());
        };
        let request = Default::default();
        let asked = async {
            let _ = self
                .agent
                .client()
                .shutdown(Context::default(), &request)
                .await;
            owned.vm.wait().await
        };
        if tokio::time::timeout(SHUTDOWN_TIMEOUT, asked).await.is_err() {
            tracing::debug!("sandbox {} did not power off by itself", self.dir.id());
        }
        self.discard().await
    }

    /// Ends an owned sandbox in which nothing runs any more: what its processes wrote to files is on the host when they
    /// have ended, so the machine is just stopped. An attached one is only left.
    ///
    /// # Errors
    /// Something could not be removed.
    pub async fn discard(mut self) -> Result<(), Error> {
        let Some(owned) = self.owned.take() else {
            return Ok(());
        };
        owned.vm.stop().await?;
        drop(owned);
        self.dir.remove()
    }

    /// Whether this process booted it, and ends it.
    pub fn is_owned(&self) -> bool {
        self.owned.is_some()
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        let Some(owned) = self.owned.take() else {
            return;
        };
        let ended = owned.ended.load(Ordering::Relaxed);
        // Not stopped: the virtual machine first, then what it used.
        drop(owned);
        if !ended && let Err(error) = self.dir.remove() {
            tracing::warn!("removing sandbox {}: {error}", self.dir.id());
        }
    }
}

async fn first_call(listener: &UnixListener) -> Result<Agent, Error> {
    let accepted = tokio::time::timeout(BOOT_TIMEOUT, listener.accept()).await;
    match accepted {
        Ok(Ok((stream, _))) => Agent::new(stream).await,
        Ok(Err(e)) => Err(Error::host("accepting the agent's call", e)),
        Err(_) => Err(Error::state(
            ErrorKind::DeadlineExceeded,
            format!(
                "waiting for the agent: it did not call within {} s",
                BOOT_TIMEOUT.as_secs()
            ),
        )),
    }
}

/// When the first guest instruction ran, for the timeline; 0 if the VMM does not say.
async fn started_us(vm: &dyn Vm) -> u64 {
    vm.stats().await.map_or(0, |stats| stats.started_us)
}

fn gone(dir: &SandboxDir, ended: &hypervisor::Ended) -> hypervisor::Error {
    hypervisor::Error::Gone {
        id: dir.id().to_owned(),
        message: ended.message.clone(),
    }
}

/// Takes the interfaces of a network namespace for the guest: their descriptors, and what the agent is told of them.
async fn connect(
    dir: &SandboxDir,
    netns: &Path,
    request: &mut SetUpSandboxRequest,
) -> Result<(Vec<Nic>, Option<Entrance>), Error> {
    // The path must mean the same to whoever cleans up.
    let netns = std::path::absolute(netns)
        .map_err(|e| Error::host(format!("finding {}", netns.display()), e))?;
    let network = Network::open(&netns).await?;
    dir.write_network(&network.joints)?;
    let entrance = network.join().await?;
    request.interfaces = network.interfaces;
    request.routes = network.routes;
    request.neighbors = network.neighbors;
    Ok((network.nics, entrance))
}

fn vm_spec(paths: &Paths, dir: &SandboxDir, spec: SandboxSpec, nics: Vec<Nic>) -> VmSpec {
    VmSpec {
        id: dir.id().to_owned(),
        vcpus: spec.vcpus,
        memory_bytes: spec.memory_bytes,
        vmm: paths.vmm(),
        kernel: paths.kernel(),
        initrd: paths.initrd(),
        cmdline: spec.cmdline,
        share: dir.share(),
        sockets: dir.sockets(),
        vsock: dir.vsock(),
        console: spec.console,
        nics,
    }
}

fn set_up_request(spec: &SandboxSpec) -> Result<SetUpSandboxRequest, Error> {
    let mut entropy = vec![0; 64];
    rustix::rand::getrandom(&mut entropy[..], rustix::rand::GetRandomFlags::empty())
        .map_err(|e| Error::host("drawing entropy for the guest", e))?;
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    Ok(SetUpSandboxRequest {
        hostname: spec.hostname.clone(),
        sysctls: spec.sysctls.clone(),
        mounts: vec![Mount {
            source: "share".into(),
            destination: GUEST_SHARE.into(),
            fstype: "virtiofs".into(),
            ..Default::default()
        }],
        clock_ns: clock.map_or(0, |since| since.as_nanos().try_into().unwrap_or(0)),
        entropy,
        resolv_conf: spec.resolv_conf.clone(),
        ..Default::default()
    })
}
