//! The service of agent.proto: each method's work is in the module of its group.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use cella_proto::agent::{self as proto, Empty};
use cella_proto::agent_ttrpc;
use ttrpc::asynchronous::{ServerStreamSender, TtrpcContext};

use crate::container::{Runtime, RuntimeConfig};
use crate::error::Error;
use crate::events::Events;
use crate::reaper::Reaper;
use crate::server::Options;
use crate::{guest, info, power};

mod container;
mod process;
mod sandbox;
mod state;
mod watch;

/// What Shutdown leaves for its reply to be sent in.
const SHUTDOWN_GRACE: Duration = Duration::from_millis(10);

/// The agent's state and its service.
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
    runtime: Runtime,
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
        self.prepare().map(drop)
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
        let runtime = Runtime::new(config).map_err(|source| Error::Container {
            what: "preparing for containers".to_owned(),
            source,
        })?;
        Ok(self.prepared.get_or_init(|| Prepared { reaper, runtime }))
    }
}

type Reply<T> = ttrpc::Result<T>;

#[async_trait]
impl agent_ttrpc::Agent for Agent {
    async fn watch(
        &self,
        _: &TtrpcContext,
        request: proto::WatchRequest,
        stream: ServerStreamSender<proto::Event>,
    ) -> Reply<()> {
        self.serve_watch(&request, &stream).await
    }

    async fn set_up_sandbox(
        &self,
        _: &TtrpcContext,
        request: proto::SetUpSandboxRequest,
    ) -> Reply<Empty> {
        self.set_sandbox_up(&request)?;
        Ok(Empty::new())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: proto::CreateContainerRequest,
    ) -> Reply<proto::CreateContainerResponse> {
        let pid = self.make_container(&request).await?;
        Ok(proto::CreateContainerResponse {
            pid,
            ..Default::default()
        })
    }

    async fn exec(&self, _: &TtrpcContext, request: proto::ExecRequest) -> Reply<Empty> {
        self.make_exec(&request).await?;
        Ok(Empty::new())
    }

    async fn start(
        &self,
        _: &TtrpcContext,
        request: proto::ProcessRef,
    ) -> Reply<proto::StartResponse> {
        let pid = self.start_process(&request.container_id, &request.exec_id)?;
        Ok(proto::StartResponse {
            pid,
            ..Default::default()
        })
    }

    async fn signal(&self, _: &TtrpcContext, request: proto::SignalRequest) -> Reply<Empty> {
        self.signal_process(&request)?;
        Ok(Empty::new())
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: proto::ProcessRef,
    ) -> Reply<proto::DeleteResponse> {
        let exit = match request.exec_id.as_str() {
            "" => self.delete_container(&request.container_id).await?,
            exec => self.delete_exec(&request.container_id, exec)?,
        };
        Ok(proto::DeleteResponse {
            exit: exit.into(),
            ..Default::default()
        })
    }

    async fn pause(&self, _: &TtrpcContext, request: proto::ContainerRef) -> Reply<Empty> {
        self.pause_container(&request.container_id)?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: proto::ContainerRef) -> Reply<Empty> {
        self.resume_container(&request.container_id)?;
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: proto::UpdateRequest) -> Reply<Empty> {
        self.update_container(&request)?;
        Ok(Empty::new())
    }

    async fn resize_terminal(
        &self,
        _: &TtrpcContext,
        request: proto::ResizeTerminalRequest,
    ) -> Reply<Empty> {
        self.resize(&request)?;
        Ok(Empty::new())
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        request: proto::ContainerRef,
    ) -> Reply<proto::ListProcessesResponse> {
        Ok(proto::ListProcessesResponse {
            processes: self.processes(&request.container_id)?,
            ..Default::default()
        })
    }

    async fn list_containers(
        &self,
        _: &TtrpcContext,
        _: Empty,
    ) -> Reply<proto::ListContainersResponse> {
        Ok(proto::ListContainersResponse {
            containers: self.container_infos(),
            ..Default::default()
        })
    }

    async fn stats(
        &self,
        _: &TtrpcContext,
        request: proto::ContainerRef,
    ) -> Reply<proto::StatsResponse> {
        Ok(self.container_stats(&request.container_id)?)
    }

    async fn info(&self, _: &TtrpcContext, _: Empty) -> Reply<proto::InfoResponse> {
        self.prepare()?;
        Ok(info::info()?)
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> Reply<Empty> {
        self.kill_everything();
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
