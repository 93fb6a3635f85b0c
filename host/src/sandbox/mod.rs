//! A sandbox: one virtual machine, its agent, and the containers in it.
//!
//! | file | what lives there |
//! | --- | --- |
//! | [`dir`] | its directory on the host |
//! | [`state`] | what is written down of it |
//! | [`agent`] | the connection to its agent |
//! | `ways` | what there is to clone |
//! | `start` | from a directory to a guest that is set up: cloned or booted |
//! | `saved` | saved, and restored |
//! | `calls` | what it asks of its agent |
//! | `forward` | connections to the pod's ports |
//! | [`stdio`] | standard streams as connections |
//! | [`volume`], [`idmap`] | what containers see of the host, and as whose |
//! | [`gc`] | what dead processes left |

pub mod agent;
mod calls;
pub mod dir;
mod error;
mod forward;
pub mod gc;
pub mod idmap;
mod saved;
mod start;
pub mod state;
pub mod stdio;
pub mod volume;
mod ways;

use std::collections::HashMap;
use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cella_proto::agent::Ready;
use cella_proto::vmm::Stats;
use ttrpc::context::Context;

pub use self::agent::Agent;
use self::dir::{OwnerLock, SandboxDir};
pub use self::error::{Error, StartFailure};
pub use self::saved::Restoration;
pub(crate) use self::start::plain_vm_spec;
pub use self::ways::TemplateUse;
use self::ways::{Found, Ways};
use crate::error::ErrorKind;
use crate::hypervisor::{self, Disk, Hypervisor, Vm};
use crate::paths::Paths;
use crate::timeline::Timeline;

/// Where the guest sees the host's shared directory.
pub const GUEST_SHARE: &str = "/run/cella/share";
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
    /// It is cloned from a template if there is one for it.
    pub template: bool,
    /// An idle clone is claimed if there is one for it.
    pub pool: bool,
    /// The network namespace whose interfaces the pod gets; without one it has a loopback device only.
    pub netns: Option<PathBuf>,
    /// The text of the containers' /etc/resolv.conf; empty: they keep their image's.
    pub resolv_conf: String,
    /// Its disks.
    pub disks: Vec<Disk>,
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
    template: TemplateUse,
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
        let found = Found::look(paths, hypervisor, &spec);
        let claimed = found.claim(paths, &spec);
        let (idle, lock, booting) = match claimed.map(|claimed| claimed.settle(&dir)) {
            Some(Ok((idle, lock, booting))) => (Some(idle), lock, booting),
            other => {
                if let Some(Err(error)) = other {
                    tracing::debug!("claiming an idle sandbox: {error}");
                }
                let (lock, booting) = dir.create()?;
                (None, lock, booting)
            }
        };
        // From here on the directory is this call's to remove. The machine, made later, is dropped before.
        let mut unfinished = Unfinished(Some(dir.clone()));
        let ways = Ways {
            hypervisor,
            idle,
            found,
        };
        let started = start::bring_up(paths, &dir, ways, spec, timeline).await?;
        unfinished.0 = None;
        drop(booting);
        Ok(Self {
            dir,
            agent: started.agent,
            owned: Some(Owned {
                _forward: started.forward,
                vm: started.vm,
                ended: AtomicBool::new(false),
                template: started.template,
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

    /// How the sandbox came to be; an attached one does not know.
    pub fn template_use(&self) -> Option<&TemplateUse> {
        self.owned.as_ref().map(|owned| &owned.template)
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
        Ok(self.owned()?.vm.stats().await?)
    }

    fn owned(&self) -> Result<&Owned, Error> {
        self.owned.as_ref().ok_or_else(|| {
            Error::state(
                ErrorKind::FailedPrecondition,
                format!("sandbox {} is owned by another process", self.dir.id()),
            )
        })
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
