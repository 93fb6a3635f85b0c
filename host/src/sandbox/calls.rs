//! What a sandbox asks of its agent: containers and their processes.

use std::time::Duration;

use cella_proto::agent::{
    AttachRequest, ContainerInfo, ContainerRef, CreateContainerRequest, ExecRequest, Exit,
    IdentityResponse, InfoResponse, ProcessInfo, ProcessRef, ResizeTerminalRequest, SignalRequest,
    StatsResponse, Stdio, UpdateRequest,
};
use oci_spec::runtime::{LinuxResources, Process, Spec};
use ttrpc::context::Context;

use super::start::gone;
use super::{Error, Owned, Sandbox};
use crate::error::ErrorKind;

impl Sandbox {
    /// Makes a container; its `spec` has the guest's paths ([`volume::Volumes`] makes them so).
    ///
    /// # Errors
    /// The agent's, with their kinds.
    pub async fn create(&self, id: &str, spec: &Spec, stdio: Stdio) -> Result<u32, Error> {
        self.create_in(id, spec, stdio, false).await
    }

    /// The same; with `pod_pids`, in the pid namespace that the pod's containers share.
    ///
    /// # Errors
    /// The agent's, with their kinds.
    pub async fn create_in(
        &self,
        id: &str,
        spec: &Spec,
        stdio: Stdio,
        pod_pids: bool,
    ) -> Result<u32, Error> {
        let action = || format!("creating container {id}");
        let request = CreateContainerRequest {
            container_id: id.to_owned(),
            spec: serde_json::to_vec(spec).map_err(|e| Error::host(action(), e))?,
            stdio: Some(stdio).into(),
            pod_pid_namespace: pod_pids,
            ..Default::default()
        };
        let created = self
            .guard(
                self.agent
                    .client()
                    .create_container(Context::default(), &request),
                |e| Error::starting(action(), e),
            )
            .await?;
        Ok(created.pid)
    }

    /// Makes a process in a running container.
    ///
    /// # Errors
    /// The agent's, with their kinds.
    pub async fn exec(
        &self,
        id: &str,
        exec: &str,
        process: &Process,
        stdio: Stdio,
    ) -> Result<(), Error> {
        let action = || format!("making process {exec} in container {id}");
        let request = ExecRequest {
            container_id: id.to_owned(),
            exec_id: exec.to_owned(),
            process: serde_json::to_vec(process).map_err(|e| Error::host(action(), e))?,
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        self.guard(
            self.agent.client().exec(Context::default(), &request),
            |e| Error::starting(action(), e),
        )
        .await
        .map(drop)
    }

    /// Starts a created container (`exec` empty) or process.
    ///
    /// # Errors
    /// The agent's, with their kinds.
    pub async fn start(&self, id: &str, exec: &str) -> Result<u32, Error> {
        let action = || format!("starting {}", name(id, exec));
        let request = process_ref(id, exec);
        let started = self
            .guard(
                self.agent.client().start(Context::default(), &request),
                |e| Error::starting(action(), e),
            )
            .await?;
        Ok(started.pid)
    }

    /// Sends a signal to a process, or to all of its container.
    ///
    /// # Errors
    /// The agent's, with their kinds.
    pub async fn signal(&self, id: &str, exec: &str, signal: u32, all: bool) -> Result<(), Error> {
        let request = SignalRequest {
            container_id: id.to_owned(),
            exec_id: exec.to_owned(),
            signal,
            all,
            ..Default::default()
        };
        let action = || format!("sending signal {signal} to {}", name(id, exec));
        self.guard(
            self.agent.client().signal(Context::default(), &request),
            |e| Error::agent(action(), e),
        )
        .await
        .map(drop)
    }

    /// Waits for the end of a container's init (`exec` empty) or of another process.
    ///
    /// # Errors
    /// `Unavailable`: the virtual machine or the agent is gone.
    pub async fn wait(&self, id: &str, exec: &str) -> Result<Exit, Error> {
        let action = || format!("waiting for {}", name(id, exec));
        match self.owned.as_ref() {
            None => self.agent.exit(id, exec).await,
            Some(owned) => tokio::select! {
                biased;
                exit = self.agent.exit(id, exec) => match exit {
                    Ok(exit) => Ok(exit),
                    // The connection ends with the machine: its own reason says more.
                    Err(error) => Err(self.why(owned, error).await),
                },
                ended = owned.vm.wait() => Err(Error::state(
                    ErrorKind::Unavailable,
                    format!("{}: the virtual machine ended: {}", action(), ended.message),
                )),
            },
        }
    }

    /// Waits until a container has had more than `known` out-of-memory kills, and returns how many.
    ///
    /// # Errors
    /// `Unavailable`: the virtual machine or the agent is gone.
    pub async fn oom(&self, id: &str, known: u64) -> Result<u64, Error> {
        self.agent.oom(id, known).await
    }

    /// Forgets a stopped process or container, or one that was never started. Answers its exit, if it had one.
    ///
    /// # Errors
    /// The agent's, with their kinds.
    pub async fn delete(&self, id: &str, exec: &str) -> Result<Option<Exit>, Error> {
        let action = || format!("deleting {}", name(id, exec));
        let request = process_ref(id, exec);
        self.guard(
            self.agent.client().delete(Context::default(), &request),
            |e| Error::agent(action(), e),
        )
        .await
        .map(|deleted| {
            self.agent.forget(id, exec);
            deleted.exit.into_option()
        })
    }

    /// Freezes every process of a container.
    ///
    /// # Errors
    /// The agent's, with their kinds.
    pub async fn pause(&self, id: &str) -> Result<(), Error> {
        let action = || format!("pausing container {id}");
        let request = container_ref(id);
        self.guard(
            self.agent.client().pause(Context::default(), &request),
            |e| Error::agent(action(), e),
        )
        .await
        .map(drop)
    }

    /// The containers that the guest has.
    ///
    /// # Errors
    /// The agent's, with their kinds.
    pub async fn containers(&self) -> Result<Vec<ContainerInfo>, Error> {
        let request = Default::default();
        let listed = self
            .agent
            .client()
            .list_containers(Context::default(), &request);
        self.guard(listed, |e| {
            Error::agent("listing the guest's containers", e)
        })
        .await
        .map(|listed| listed.containers)
    }

    /// Gives a container's first process other connections for its standard streams.
    ///
    /// # Errors
    /// The agent's, with their kinds.
    pub async fn attach_streams(&self, id: &str, stdio: Stdio) -> Result<(), Error> {
        let action = || format!("connecting the standard streams of container {id}");
        let request = AttachRequest {
            container_id: id.to_owned(),
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        self.guard(
            self.agent.client().attach(Context::default(), &request),
            |e| Error::agent(action(), e),
        )
        .await
        .map(drop)
    }

    /// Lets the processes of a paused container go on.
    ///
    /// # Errors
    /// The agent's, with their kinds.
    pub async fn resume(&self, id: &str) -> Result<(), Error> {
        let action = || format!("resuming container {id}");
        let request = container_ref(id);
        self.guard(
            self.agent.client().resume(Context::default(), &request),
            |e| Error::agent(action(), e),
        )
        .await
        .map(drop)
    }

    /// Changes a container's limits.
    ///
    /// # Errors
    /// The agent's, with their kinds.
    pub async fn update(&self, id: &str, resources: &LinuxResources) -> Result<(), Error> {
        let action = || format!("updating container {id}");
        let request = UpdateRequest {
            container_id: id.to_owned(),
            resources: serde_json::to_vec(resources).map_err(|e| Error::host(action(), e))?,
            ..Default::default()
        };
        self.guard(
            self.agent.client().update(Context::default(), &request),
            |e| Error::agent(action(), e),
        )
        .await
        .map(drop)
    }

    /// The processes of a container, with their pids in the guest.
    ///
    /// # Errors
    /// The agent's, with their kinds.
    pub async fn processes(&self, id: &str) -> Result<Vec<ProcessInfo>, Error> {
        let action = || format!("listing the processes of container {id}");
        let request = container_ref(id);
        self.guard(
            self.agent
                .client()
                .list_processes(Context::default(), &request),
            |e| Error::agent(action(), e),
        )
        .await
        .map(|list| list.processes)
    }

    /// Changes a terminal's size.
    ///
    /// # Errors
    /// The agent's, with their kinds.
    pub async fn resize(&self, id: &str, exec: &str, size: (u16, u16)) -> Result<(), Error> {
        let request = ResizeTerminalRequest {
            container_id: id.to_owned(),
            exec_id: exec.to_owned(),
            rows: size.0.into(),
            columns: size.1.into(),
            ..Default::default()
        };
        let action = || format!("resizing the terminal of {}", name(id, exec));
        self.guard(
            self.agent
                .client()
                .resize_terminal(Context::default(), &request),
            |e| Error::agent(action(), e),
        )
        .await
        .map(drop)
    }

    /// What a container uses.
    ///
    /// # Errors
    /// The agent's, with their kinds.
    pub async fn stats(&self, id: &str) -> Result<StatsResponse, Error> {
        let request = container_ref(id);
        let action = || format!("reading the statistics of container {id}");
        self.guard(
            self.agent.client().stats(Context::default(), &request),
            |e| Error::agent(action(), e),
        )
        .await
    }

    /// Facts of the guest and its agent.
    ///
    /// # Errors
    /// `Unavailable`: it is gone.
    pub async fn info(&self) -> Result<InfoResponse, Error> {
        let action = || "asking the agent for its facts".to_owned();
        self.guard(
            self.agent
                .client()
                .info(Context::default(), &Default::default()),
            |e| Error::agent(action(), e),
        )
        .await
    }

    /// What the guest has in common with no other.
    ///
    /// # Errors
    /// `Unavailable`: it is gone.
    pub async fn identity(&self) -> Result<IdentityResponse, Error> {
        let action = || "asking the agent for the guest's identity".to_owned();
        self.guard(
            self.agent
                .client()
                .identity(Context::default(), &Default::default()),
            |e| Error::agent(action(), e),
        )
        .await
    }

    /// Waits for the agent's answer. If it is gone, the virtual machine's end is the better reason.
    async fn guard<T>(
        &self,
        call: impl Future<Output = ttrpc::Result<T>>,
        error: impl FnOnce(ttrpc::Error) -> Error,
    ) -> Result<T, Error> {
        match (call.await, &self.owned) {
            (Ok(answer), _) => Ok(answer),
            (Err(failure), Some(owned)) => Err(self.why(owned, error(failure)).await),
            (Err(failure), None) => Err(error(failure)),
        }
    }

    async fn why(&self, owned: &Owned, error: Error) -> Error {
        if error.kind() != ErrorKind::Unavailable {
            return error;
        }
        // The two ends come within moments of each other, in either order.
        match tokio::time::timeout(Duration::from_millis(500), owned.vm.wait()).await {
            Ok(ended) => gone(&self.dir, &ended).into(),
            Err(_) => error,
        }
    }
}

fn process_ref(id: &str, exec: &str) -> ProcessRef {
    ProcessRef {
        container_id: id.to_owned(),
        exec_id: exec.to_owned(),
        ..Default::default()
    }
}

fn container_ref(id: &str) -> ContainerRef {
    ContainerRef {
        container_id: id.to_owned(),
        ..Default::default()
    }
}

fn name(id: &str, exec: &str) -> String {
    if exec.is_empty() {
        format!("container {id}")
    } else {
        format!("process {exec} of container {id}")
    }
}
