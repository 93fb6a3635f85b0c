//! The service of agent.proto: each method's work is in the module of its group.

use std::sync::{Mutex, OnceLock, PoisonError};

use async_trait::async_trait;
use cella_proto::agent::{self as proto, Empty};
use cella_proto::agent_ttrpc;
use ttrpc::asynchronous::{ServerStreamSender, TtrpcContext};

use crate::error::Error;
use crate::events::Events;
use crate::server::Options;
use crate::{guest, info, power};

mod sandbox;
mod watch;

/// The agent's state and its service.
pub struct Agent {
    options: Options,
    ready: proto::Ready,
    events: Events,
    prepared: OnceLock<()>,
    sandbox: Mutex<sandbox::State>,
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
            events: Events::default(),
            prepared: OnceLock::new(),
            sandbox: Mutex::default(),
        }
    }

    /// Does what a guest needs before anything but its call to the host, once.
    fn prepare(&self) -> Result<(), Error> {
        if self.prepared.get().is_none() {
            if self.options.in_guest {
                guest::prepare()?;
            }
            let _ = self.prepared.set(());
        }
        Ok(())
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

    async fn info(&self, _: &TtrpcContext, _: Empty) -> Reply<proto::InfoResponse> {
        self.prepare()?;
        Ok(info::info()?)
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> Reply<Empty> {
        power::off();
        Ok(Empty::new())
    }
}

/// What a mutex guards, also after a panic under it: the agent does not outlive one.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
