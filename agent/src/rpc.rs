//! The service of agent.proto: each method's work is in the module of its group.
//!
//! Requests run side by side on the agent's one thread; what may take long they hand to a thread of [`workers`], each
//! container's own affairs in the order that the container's state allows.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use cella_proto::agent::{self as proto, Empty};
use cella_proto::agent_ttrpc;
use ttrpc::asynchronous::{ServerStreamSender, TtrpcContext};

use crate::container::{Result as ContainerResult, Runtime, RuntimeConfig};
use crate::error::Error;
use crate::events::Events;
use crate::reaper::Reaper;
use crate::server::Options;
use crate::workers::{Slot, Workers};
use crate::{guest, identity, info, power};

mod container;
mod measure;
mod process;
mod sandbox;
mod state;
mod watch;

/// What Shutdown leaves for its reply to be sent in.
const SHUTDOWN_GRACE: Duration = Duration::from_millis(10);

/// Operations on containers that may be under way at once, each with a thread: so many are stuck in a sick pod only,
/// where one more would be too.
const OPERATIONS: usize = 64;
/// How many of them may be the making of a container. The others are for those that are there.
const CREATIONS: usize = 48;

/// The agent's state.
pub struct Agent {
    options: Options,
    ready: proto::Ready,
    events: Arc<Events>,
    prepared: OnceLock<Prepared>,
    sandbox: Mutex<sandbox::State>,
    containers: state::Containers,
}

/// What is made when the first request needs it.
struct Prepared {
    reaper: Arc<Reaper>,
    runtime: Arc<Runtime>,
    workers: Arc<Workers>,
}

impl Agent {
    /// The state of a sandbox that nothing has happened in. The times are those of [`proto::Ready`].
    pub fn new(options: Options, entry_ns: u64, dial_ns: u64) -> Self {
        Self {
            options,
            ready: proto::Ready {
                agent_version: info::VERSION.to_owned(),
                kernel_release: info::kernel_release(),
                agent_entry_ns: entry_ns,
                agent_dial_ns: dial_ns,
                ..Default::default()
            },
            events: Arc::default(),
            prepared: OnceLock::new(),
            sandbox: Mutex::default(),
            containers: state::Containers::default(),
        }
    }

    /// Prepares the guest before the first request.
    ///
    /// # Errors
    /// A step that failed; the guest is of no use then.
    pub fn prepare_early(&self) -> Result<(), Error> {
        self.prepare()?;
        crate::sandbox::prepare()?;
        lock(&self.sandbox).prepared = true;
        Ok(())
    }

    /// Does what a guest needs before anything but its call to the host, once.
    fn prepare(&self) -> Result<&Prepared, Error> {
        if let Some(prepared) = self.prepared.get() {
            return Ok(prepared);
        }
        if self.options.in_guest {
            guest::prepare()?;
        }
        let reaper = Reaper::start().map_err(|source| Error::System {
            what: "waiting for the ends of processes".to_owned(),
            source,
        })?;
        let config = RuntimeConfig {
            cgroup_root: PathBuf::from(&self.options.cgroup_root),
            ..RuntimeConfig::default()
        };
        let runtime = Runtime::new(config, reaper.clone()).map_err(|source| Error::Container {
            what: "preparing for containers".to_owned(),
            source,
        })?;
        Ok(self.prepared.get_or_init(|| Prepared {
            reaper,
            runtime: Arc::new(runtime),
            workers: Workers::new(),
        }))
    }

    /// The right to a thread, for what `what` says, if fewer than `most` are taken.
    fn slot(&self, most: usize, what: &impl Fn() -> String) -> Result<Slot, Error> {
        let slot = self.prepare()?.workers.slot(most);
        slot.map_err(|source| Error::Workers {
            what: what(),
            source,
        })
    }
}

/// The work of `slot`'s thread.
async fn on_thread<T: Send + 'static>(
    slot: Slot,
    what: &impl Fn() -> String,
    work: impl FnOnce() -> ContainerResult<T> + Send + 'static,
) -> Result<T, Error> {
    let done = slot.run(work).await.map_err(|source| Error::Workers {
        what: what(),
        source,
    })?;
    done.map_err(|source| Error::Container {
        what: what(),
        source,
    })
}

/// Carries a request through, also if its caller goes away or its time runs out: what it began is whole or gone then.
async fn carry<T: Send + 'static>(
    work: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Result<T, Error> {
    match tokio::spawn(work).await {
        Ok(result) => result,
        Err(error) => Err(Error::System {
            what: "carrying the request out".to_owned(),
            source: std::io::Error::other(error),
        }),
    }
}

/// The agent as a service.
pub struct Service(pub Arc<Agent>);

type Reply<T> = ttrpc::Result<T>;

#[async_trait]
impl agent_ttrpc::Agent for Service {
    async fn watch(
        &self,
        _: &TtrpcContext,
        request: proto::WatchRequest,
        stream: ServerStreamSender<proto::Event>,
    ) -> Reply<()> {
        self.0.serve_watch(&request, &stream).await
    }

    async fn set_up_sandbox(
        &self,
        _: &TtrpcContext,
        request: proto::SetUpSandboxRequest,
    ) -> Reply<Empty> {
        self.0.set_sandbox_up(&request)?;
        Ok(Empty::new())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: proto::CreateContainerRequest,
    ) -> Reply<proto::CreateContainerResponse> {
        let agent = self.0.clone();
        let pid = carry(async move { agent.make_container(&request).await }).await?;
        Ok(proto::CreateContainerResponse {
            pid,
            ..Default::default()
        })
    }

    async fn exec(&self, _: &TtrpcContext, request: proto::ExecRequest) -> Reply<Empty> {
        self.0.make_exec(&request).await?;
        Ok(Empty::new())
    }

    async fn start(
        &self,
        _: &TtrpcContext,
        request: proto::ProcessRef,
    ) -> Reply<proto::StartResponse> {
        let agent = self.0.clone();
        let start = async move {
            agent
                .start_process(&request.container_id, &request.exec_id)
                .await
        };
        let pid = carry(start).await?;
        Ok(proto::StartResponse {
            pid,
            ..Default::default()
        })
    }

    async fn signal(&self, _: &TtrpcContext, request: proto::SignalRequest) -> Reply<Empty> {
        self.0.signal_process(&request)?;
        Ok(Empty::new())
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: proto::ProcessRef,
    ) -> Reply<proto::DeleteResponse> {
        let agent = self.0.clone();
        let delete = async move {
            match request.exec_id.as_str() {
                "" => agent.delete_container(&request.container_id).await,
                exec => agent.delete_exec(&request.container_id, exec),
            }
        };
        let exit = carry(delete).await?;
        Ok(proto::DeleteResponse {
            exit: exit.into(),
            ..Default::default()
        })
    }

    async fn pause(&self, _: &TtrpcContext, request: proto::ContainerRef) -> Reply<Empty> {
        let agent = self.0.clone();
        carry(async move { agent.pause_container(&request.container_id).await }).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: proto::ContainerRef) -> Reply<Empty> {
        let agent = self.0.clone();
        carry(async move { agent.resume_container(&request.container_id).await }).await?;
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: proto::UpdateRequest) -> Reply<Empty> {
        let agent = self.0.clone();
        carry(async move { agent.update_container(&request).await }).await?;
        Ok(Empty::new())
    }

    async fn resize_terminal(
        &self,
        _: &TtrpcContext,
        request: proto::ResizeTerminalRequest,
    ) -> Reply<Empty> {
        self.0.resize(&request)?;
        Ok(Empty::new())
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        request: proto::ContainerRef,
    ) -> Reply<proto::ListProcessesResponse> {
        Ok(proto::ListProcessesResponse {
            processes: self.0.processes(&request.container_id).await?,
            ..Default::default()
        })
    }

    async fn list_containers(
        &self,
        _: &TtrpcContext,
        _: Empty,
    ) -> Reply<proto::ListContainersResponse> {
        Ok(proto::ListContainersResponse {
            containers: self.0.container_infos(),
            ..Default::default()
        })
    }

    async fn stats(
        &self,
        _: &TtrpcContext,
        request: proto::ContainerRef,
    ) -> Reply<proto::StatsResponse> {
        Ok(self.0.container_stats(&request.container_id)?)
    }

    async fn renew(&self, _: &TtrpcContext, request: proto::RenewRequest) -> Reply<Empty> {
        crate::sandbox::renew(&request).map_err(Error::from)?;
        Ok(Empty::new())
    }

    async fn attach(&self, _: &TtrpcContext, request: proto::AttachRequest) -> Reply<Empty> {
        self.0.attach(&request).await?;
        Ok(Empty::new())
    }

    async fn info(&self, _: &TtrpcContext, _: Empty) -> Reply<proto::InfoResponse> {
        self.0.prepare()?;
        Ok(info::info()?)
    }

    async fn identity(&self, _: &TtrpcContext, _: Empty) -> Reply<proto::IdentityResponse> {
        self.0.prepare()?;
        self.0.refuse_without_identity("drawing the identity of")?;
        Ok(identity::identity()?)
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> Reply<Empty> {
        self.0.kill_everything();
        tokio::spawn(async {
            tokio::time::sleep(SHUTDOWN_GRACE).await;
            power::off();
        });
        Ok(Empty::new())
    }
}

/// What a mutex guards, also after a panic under it: the agent does not outlive one.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
