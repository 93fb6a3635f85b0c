//! A sandbox's machine saved while its containers are paused, and a sandbox that goes on from there.

use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use cella_proto::agent::RenewRequest;

use super::agent::{self, Agent};
use super::dir::{BootLock, OwnerLock, SandboxDir};
use super::forward::Forward;
use super::start;
use super::state::{self, ProcessId, SandboxState};
use super::{Error, Owned, Sandbox, TemplateUse, Unfinished};
use crate::hypervisor::{Hypervisor, Nic, SavedVm, VmSpec};
use crate::network::Entrance;
use crate::paths::Paths;

/// How long the agent of a restored guest may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

impl Sandbox {
    /// Writes an owned sandbox's machine to `files`. It stands still meanwhile, and while `copy` copies what else there is of it.
    ///
    /// # Errors
    /// `FailedPrecondition`: another process owns it. What `copy` fails of. The hypervisor's: `Unimplemented`, if it saves none.
    pub(crate) async fn save(
        &self,
        files: &SavedVm,
        copy: impl FnOnce() -> Result<(), Error>,
    ) -> Result<(), Error> {
        let owned = self.owned()?;
        owned.vm.pause().await?;
        let saved = match owned.vm.snapshot(files).await {
            Ok(()) => copy(),
            Err(error) => Err(error.into()),
        };
        owned.vm.resume().await?;
        saved
    }
}

/// A sandbox on its way back. Dropping it removes what there is of it.
pub struct Restoration {
    dir: SandboxDir,
    unfinished: Unfinished,
    lock: OwnerLock,
    booting: BootLock,
    paths: Paths,
    nics: Vec<Nic>,
    entrance: Option<Entrance>,
    renewal: RenewRequest,
}

impl Restoration {
    /// Takes the directory of the sandbox to be.
    ///
    /// # Errors
    /// `AlreadyExists`: a living sandbox has it.
    pub fn begin(paths: &Paths, dir: SandboxDir) -> Result<Self, Error> {
        let (lock, booting) = dir.create()?;
        Ok(Self {
            unfinished: Unfinished(Some(dir.clone())),
            dir,
            lock,
            booting,
            paths: paths.clone(),
            nics: Vec::new(),
            entrance: None,
            renewal: RenewRequest::default(),
        })
    }

    /// Takes the interfaces of the network namespace at `netns` for the guest, which has some of the same names. Returns these.
    ///
    /// # Errors
    /// It is none, or cannot be used.
    pub async fn connect(&mut self, netns: &Path) -> Result<Vec<String>, Error> {
        let (network, entrance) = start::connect(&self.dir, netns).await?;
        let names = network.joints.names();
        self.nics = network.nics;
        self.entrance = entrance;
        self.renewal.interfaces = network.interfaces;
        self.renewal.routes = network.routes;
        self.renewal.neighbors = network.neighbors;
        Ok(names)
    }

    /// The machine, but for its size and mounts.
    pub fn vm_spec(&mut self) -> VmSpec {
        VmSpec {
            nics: std::mem::take(&mut self.nics),
            ..start::plain_vm_spec(&self.paths, &self.dir)
        }
    }

    /// Restores the machine of `spec` from `files`, and gives its agent what no other one must have. Its containers are still paused.
    ///
    /// # Errors
    /// The files are of another machine, VMM or processor; the agent does not answer.
    pub async fn finish(
        mut self,
        hypervisor: &dyn Hypervisor,
        spec: VmSpec,
        files: &SavedVm,
        pod: bool,
    ) -> Result<Sandbox, Error> {
        let vm = hypervisor.restore(&spec, files).await?;
        let own = ProcessId::own();
        self.dir.write_state(&SandboxState {
            id: self.dir.id().to_owned(),
            pod,
            hypervisor: hypervisor.name().to_owned(),
            owner: own,
            vmm: ProcessId::of(vm.pid()).unwrap_or(own),
            vcpus: spec.vcpus,
            memory_bytes: spec.memory_bytes,
            resolv_conf: false,
            created: state::now(),
        })?;
        let vsock = self.dir.vsock();
        let agent = tokio::select! {
            renewed = tokio::time::timeout(ANSWER_TIMEOUT, renew(&vsock, self.renewal)) => {
                renewed.map_err(|_| start::late(ANSWER_TIMEOUT))??
            }
            ended = vm.wait() => return Err(start::gone(&self.dir, &ended).into()),
        };
        let forward = self
            .entrance
            .map(|entrance| Forward::start(entrance, &vsock))
            .transpose()?;
        self.unfinished.0 = None;
        drop(self.booting);
        Ok(Sandbox {
            dir: self.dir,
            agent,
            owned: Some(Owned {
                _forward: forward,
                vm,
                ended: AtomicBool::new(false),
                template: TemplateUse::Unused,
                _lock: self.lock,
            }),
        })
    }
}

async fn renew(vsock: &Path, renewal: RenewRequest) -> Result<Agent, Error> {
    let stream = agent::dial(vsock, agent::AGENT_PORT).await?;
    let request = RenewRequest {
        entropy: start::entropy()?,
        clock_ns: start::clock_ns(),
        ..renewal
    };
    Agent::renew_first(stream, &request).await
}
