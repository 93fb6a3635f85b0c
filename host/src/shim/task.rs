//! The task service, as v2 and v3 have it: requests taken apart, answers put together.

use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api;
use containerd_shim_protos::events::task::{
    TaskCreate, TaskExecAdded, TaskIO, TaskPaused, TaskResumed,
};
use containerd_shim_protos::shim::oci::ProcessDetails;
use containerd_shim_protos::shim_async::Task;
use containerd_shim_protos::topics;
use containerd_shim_protos::types::task::ProcessInfo;
use oci_spec::runtime::LinuxResources;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use ttrpc::asynchronous::TtrpcContext;

use super::error::{refuse, status};
use super::pod::Pod;
use super::process::Exited;
use super::time::timestamp;
use super::{pids, spec, stats};
use crate::error::ErrorKind;
use crate::sandbox::Error;

type Answer<T> = ttrpc::Result<T>;

/// What the generated trait is implemented on: the methods need the pod to outlive a call.
pub struct TaskService(pub Arc<Pod>);

#[async_trait]
impl Task for TaskService {
    async fn state(
        &self,
        _: &TtrpcContext,
        request: api::StateRequest,
    ) -> Answer<api::StateResponse> {
        self.0.state(&request).map_err(|e| status(&e))
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        request: api::CreateTaskRequest,
    ) -> Answer<api::CreateTaskResponse> {
        self.0.create(request).await.map_err(|e| status(&e))
    }

    async fn start(
        &self,
        _: &TtrpcContext,
        request: api::StartRequest,
    ) -> Answer<api::StartResponse> {
        let pid = self.0.start(&request.id, &request.exec_id).await;
        Ok(api::StartResponse {
            pid: pid.map_err(|e| status(&e))?,
            ..Default::default()
        })
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: api::DeleteRequest,
    ) -> Answer<api::DeleteResponse> {
        let deleted = self.0.delete(&request.id, &request.exec_id).await;
        let (pid, exited) = deleted.map_err(|e| status(&e))?;
        Ok(api::DeleteResponse {
            pid,
            exit_status: exited.status,
            exited_at: MessageField::some(timestamp(exited.at)),
            ..Default::default()
        })
    }

    async fn pids(&self, _: &TtrpcContext, request: api::PidsRequest) -> Answer<api::PidsResponse> {
        self.0.pids(&request.id).await.map_err(|e| status(&e))
    }

    async fn pause(&self, _: &TtrpcContext, request: api::PauseRequest) -> Answer<api::Empty> {
        self.0.pause(&request.id).await.map_err(|e| status(&e))?;
        Ok(api::Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: api::ResumeRequest) -> Answer<api::Empty> {
        self.0.resume(&request.id).await.map_err(|e| status(&e))?;
        Ok(api::Empty::new())
    }

    async fn checkpoint(
        &self,
        _: &TtrpcContext,
        request: api::CheckpointTaskRequest,
    ) -> Answer<api::Empty> {
        Err(status(&refuse(
            ErrorKind::Unimplemented,
            format!("checkpointing container {}", request.id),
        )))
    }

    async fn kill(&self, _: &TtrpcContext, request: api::KillRequest) -> Answer<api::Empty> {
        let killed = self
            .0
            .kill(&request.id, &request.exec_id, request.signal, request.all);
        killed.await.map_err(|e| status(&e))?;
        Ok(api::Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, request: api::ExecProcessRequest) -> Answer<api::Empty> {
        self.0.create_exec(&request).await.map_err(|e| status(&e))?;
        let event = TaskExecAdded {
            container_id: request.id,
            exec_id: request.exec_id,
            ..Default::default()
        };
        self.0
            .publisher
            .publish(topics::TASK_EXEC_ADDED_EVENT_TOPIC, &event);
        Ok(api::Empty::new())
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: api::ResizePtyRequest,
    ) -> Answer<api::Empty> {
        self.0.resize(&request).await.map_err(|e| status(&e))?;
        Ok(api::Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: api::CloseIORequest) -> Answer<api::Empty> {
        let container = self.0.container(&request.id).map_err(|e| status(&e))?;
        let process = container
            .process(&request.exec_id)
            .map_err(|e| status(&e))?;
        if request.stdin {
            process.close_stdin();
        }
        Ok(api::Empty::new())
    }

    async fn update(
        &self,
        _: &TtrpcContext,
        request: api::UpdateTaskRequest,
    ) -> Answer<api::Empty> {
        self.0.update(&request).await.map_err(|e| status(&e))?;
        Ok(api::Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: api::WaitRequest) -> Answer<api::WaitResponse> {
        let container = self.0.container(&request.id).map_err(|e| status(&e))?;
        let process = container
            .process(&request.exec_id)
            .map_err(|e| status(&e))?;
        let exited = process.wait().await;
        Ok(api::WaitResponse {
            exit_status: exited.status,
            exited_at: MessageField::some(timestamp(exited.at)),
            ..Default::default()
        })
    }

    async fn stats(
        &self,
        _: &TtrpcContext,
        request: api::StatsRequest,
    ) -> Answer<api::StatsResponse> {
        let any = self.0.stats(&request.id).await.map_err(|e| status(&e))?;
        Ok(api::StatsResponse {
            stats: MessageField::some(any),
            ..Default::default()
        })
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        request: api::ConnectRequest,
    ) -> Answer<api::ConnectResponse> {
        // A containerd that comes back to a shim whose task it had not created yet shall not take it for one with a task. A
        // sandbox of the sandbox service has none.
        let task_pid = match self.0.container(&request.id) {
            Ok(container) => container.init.pid(),
            Err(_) if self.0.declared().is_ok() => 0,
            Err(error) => return Err(status(&error)),
        };
        Ok(api::ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: api::ShutdownRequest) -> Answer<api::Empty> {
        self.0.shut_down().await.map_err(|e| status(&e))?;
        Ok(api::Empty::new())
    }
}

impl Pod {
    fn state(&self, request: &api::StateRequest) -> Result<api::StateResponse, Error> {
        let container = self.container(&request.id)?;
        let process = container.process(&request.exec_id)?;
        let exited = process.exited();
        Ok(api::StateResponse {
            id: request.id.clone(),
            bundle: container.bundle.display().to_string(),
            pid: process.pid(),
            status: process.status().into(),
            stdin: process.stdio.stdin.clone(),
            stdout: process.stdio.stdout.clone(),
            stderr: process.stdio.stderr.clone(),
            terminal: process.stdio.terminal,
            exit_status: exited.map_or(0, |exited: Exited| exited.status),
            exited_at: exited.map(|exited| timestamp(exited.at)).into(),
            exec_id: request.exec_id.clone(),
            ..Default::default()
        })
    }

    async fn create(
        &self,
        request: api::CreateTaskRequest,
    ) -> Result<api::CreateTaskResponse, Error> {
        let container = self.create_container(&request).await?;
        let pid = container.init.pid();
        let event = TaskCreate {
            container_id: request.id,
            bundle: request.bundle,
            rootfs: request.rootfs,
            io: MessageField::some(TaskIO {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
                ..Default::default()
            }),
            checkpoint: request.checkpoint,
            pid,
            ..Default::default()
        };
        self.publisher
            .publish(topics::TASK_CREATE_EVENT_TOPIC, &event);
        Ok(api::CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }

    /// At least one: containerd takes a task without processes for lost.
    async fn pids(&self, id: &str) -> Result<api::PidsResponse, Error> {
        let container = self.container(id)?;
        let mut processes = Vec::new();
        if !container.is_sandbox && container.init.exited().is_none() {
            // A guest that cannot be asked has none.
            let listed = self.sandbox()?.processes(id).await.unwrap_or_default();
            for process in listed {
                processes.push(ProcessInfo {
                    pid: pids::on_host(process.pid),
                    info: details(&process.exec_id).into(),
                    ..Default::default()
                });
            }
        }
        if processes.is_empty() {
            processes.push(ProcessInfo {
                pid: container.init.pid(),
                ..Default::default()
            });
        }
        Ok(api::PidsResponse {
            processes,
            ..Default::default()
        })
    }

    async fn pause(&self, id: &str) -> Result<(), Error> {
        let container = self.container(id)?;
        container.init.check_lives()?;
        if !container.is_sandbox {
            self.sandbox()?.pause(id).await?;
        }
        container.init.set_paused();
        let event = TaskPaused {
            container_id: id.to_owned(),
            ..Default::default()
        };
        self.publisher
            .publish(topics::TASK_PAUSED_EVENT_TOPIC, &event);
        Ok(())
    }

    async fn resume(&self, id: &str) -> Result<(), Error> {
        let container = self.container(id)?;
        container.init.check_lives()?;
        if !container.is_sandbox {
            self.sandbox()?.resume(id).await?;
        }
        container.init.set_running(0);
        let event = TaskResumed {
            container_id: id.to_owned(),
            ..Default::default()
        };
        self.publisher
            .publish(topics::TASK_RESUMED_EVENT_TOPIC, &event);
        Ok(())
    }

    async fn resize(&self, request: &api::ResizePtyRequest) -> Result<(), Error> {
        let container = self.container(&request.id)?;
        container.process(&request.exec_id)?.check_lives()?;
        if container.is_sandbox {
            return Ok(());
        }
        let number = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
        let size = (number(request.height), number(request.width));
        self.sandbox()?
            .resize(&request.id, &request.exec_id, size)
            .await
    }

    async fn update(&self, request: &api::UpdateTaskRequest) -> Result<(), Error> {
        let container = self.container(&request.id)?;
        container.init.check_lives()?;
        let json = request.resources.as_ref().map(|any| any.value.as_slice());
        let mut resources: LinuxResources =
            serde_json::from_slice(json.unwrap_or(b"{}")).map_err(|e| {
                refuse(
                    ErrorKind::InvalidArgument,
                    format!("the resources for container {}: {e}", request.id),
                )
            })?;
        spec::resources(&mut resources);
        if container.is_sandbox {
            return Ok(());
        }
        self.sandbox()?.update(&request.id, &resources).await
    }

    async fn stats(&self, id: &str) -> Result<Any, Error> {
        let container = self.container(id)?;
        let sandbox = self.sandbox()?;
        let v2 = stats::host_has_v2();
        if container.is_sandbox {
            let sum = self.pod_stats().await?;
            return stats::encode(&sum, v2);
        }
        match sandbox.stats(id).await {
            Ok(counters) => {
                let any = stats::encode(&counters, v2);
                container.keep_stats(counters);
                any
            }
            Err(error) => match container.last_stats() {
                Some(counters) => stats::encode(&counters, v2),
                None => Err(error),
            },
        }
    }
}

/// What containerd shows of a process beside its pid.
fn details(exec: &str) -> Option<Any> {
    if exec.is_empty() {
        return None;
    }
    let details = ProcessDetails {
        exec_id: exec.to_owned(),
        ..Default::default()
    };
    Some(Any {
        type_url: "containerd.runc.v1.ProcessDetails".to_owned(),
        value: details.write_to_bytes().ok()?,
        ..Default::default()
    })
}
