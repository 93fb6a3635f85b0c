//! Start, Kill, Delete, and how the ends of processes are noticed and told.

use std::sync::Arc;
use std::sync::PoisonError;
use std::time::Duration;

use containerd_shim_protos::events::task::{
    TaskDelete, TaskExecStarted, TaskExit, TaskOOM, TaskStart,
};
use containerd_shim_protos::topics;
use protobuf::MessageField;

use super::container::Container;
use super::error::refuse;
use super::pids;
use super::pod::Pod;
use super::process::{Exited, Phase, Process};
use super::time::{now_ns, timestamp};
use crate::error::ErrorKind;
use crate::sandbox::{Error, Sandbox, StartFailure};

/// The status of what ended with its virtual machine: as killed.
const LOST: u32 = 137;
/// How long Delete lets an output drain that somebody may still read.
const DRAIN_INIT: Duration = Duration::from_secs(10);
const DRAIN_EXEC: Duration = Duration::from_secs(2);
/// How long the end of an init waits for those of its container's other processes, which the kernel kills with it.
const EXECS: Duration = Duration::from_secs(5);
const SIGKILL: u32 = 9;

impl Pod {
    /// Starts a container (`exec` empty) or process; answers its pid.
    ///
    /// # Errors
    /// `FailedPrecondition`: it was started before. Or the agent's.
    pub async fn start(self: &Arc<Self>, id: &str, exec: &str) -> Result<u32, Error> {
        let container = self.container(id)?;
        let process = container.process(exec)?;
        if process.phase() != Phase::Created {
            return Err(refuse(
                ErrorKind::FailedPrecondition,
                format!("starting container {id} {exec}: it was started already"),
            ));
        }
        let sandbox = self.sandbox()?;
        if container.is_sandbox {
            process.set_running(0);
            self.started(&container, &process);
            tokio::spawn(Arc::clone(self).watch_sandbox(container, sandbox));
            return Ok(process.pid());
        }
        process.open_stdin()?;
        match sandbox.start(id, exec).await {
            Ok(pid) if exec.is_empty() && process.pid() == sandbox.vmm_pid() => {
                tracing::debug!("container {id} is pid {pid} of the guest");
                process.set_running(0);
            }
            Ok(pid) => process.set_running(pids::on_host(pid)),
            Err(error) => {
                process.set_exited(Exited {
                    status: status_of(&error),
                    at: now_ns(),
                });
                return Err(error);
            }
        }
        self.started(&container, &process);
        let pid = process.pid();
        tokio::spawn(Arc::clone(self).watch(container, process, sandbox));
        Ok(pid)
    }

    /// Sends a signal to a process, or to all of its container.
    ///
    /// # Errors
    /// `NotFound`: it has ended.
    pub async fn kill(&self, id: &str, exec: &str, signal: u32, all: bool) -> Result<(), Error> {
        let container = self.container(id)?;
        let process = container.process(exec)?;
        process.check_lives()?;
        if container.is_sandbox {
            if signal != 0 {
                container.end_sandbox(128_u32.saturating_add(signal));
            }
            return Ok(());
        }
        let killed = self.sandbox()?.signal(id, exec, signal, all).await;
        match killed {
            // Its end is on its way, or the virtual machine's is.
            Err(error) if error.kind() == ErrorKind::Unavailable => Err(refuse(
                ErrorKind::NotFound,
                format!("the virtual machine of container {id} is gone"),
            )),
            other => other,
        }
    }

    /// Forgets a process, or a container with all that it has on the host.
    ///
    /// # Errors
    /// `FailedPrecondition`: it runs.
    pub async fn delete(&self, id: &str, exec: &str) -> Result<(u32, Exited), Error> {
        let container = self.container(id)?;
        let process = container.process(exec)?;
        process.check_deletable()?;
        process.close_stdin();
        let limit = match (process.phase(), exec) {
            // Nothing was ever written.
            (Phase::Created, _) => Duration::ZERO,
            (_, "") => DRAIN_INIT,
            _ => DRAIN_EXEC,
        };
        process.finish_io(limit).await;
        let sandbox = self.sandbox()?;
        if !container.is_sandbox {
            match sandbox.delete(id, exec).await {
                Ok(_) => {}
                // What is gone with its guest, or was deleted by a call whose answer was lost, is deleted.
                Err(error)
                    if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Unavailable) =>
                {
                    tracing::debug!("{error}");
                }
                Err(error) => return Err(error),
            }
        }
        let exited = process.exited().unwrap_or(Exited {
            status: LOST,
            at: now_ns(),
        });
        let pid = process.pid();
        if !exec.is_empty() {
            container.remove_exec(exec);
            return Ok((pid, exited));
        }
        if !container.is_sandbox {
            sandbox.dir().remove_container_files(id)?;
        }
        self.remove(id);
        self.publisher.publish(
            topics::TASK_DELETE_EVENT_TOPIC,
            &TaskDelete {
                container_id: id.to_owned(),
                pid,
                exit_status: exited.status,
                exited_at: MessageField::some(timestamp(exited.at)),
                ..Default::default()
            },
        );
        Ok((pid, exited))
    }

    fn started(&self, container: &Container, process: &Process) {
        let container_id = container.id.clone();
        let pid = process.pid();
        if process.exec.is_empty() {
            let event = TaskStart {
                container_id,
                pid,
                ..Default::default()
            };
            self.publisher
                .publish(topics::TASK_START_EVENT_TOPIC, &event);
        } else {
            let event = TaskExecStarted {
                container_id,
                exec_id: process.exec.clone(),
                pid,
                ..Default::default()
            };
            self.publisher
                .publish(topics::TASK_EXEC_STARTED_EVENT_TOPIC, &event);
        }
    }

    /// Waits for the end of a process; of an init, also for out-of-memory kills, which are told before the end that
    /// they lead to.
    async fn watch(
        self: Arc<Self>,
        container: Arc<Container>,
        process: Arc<Process>,
        sandbox: Arc<Sandbox>,
    ) {
        let mut kills = 0;
        let exit = loop {
            tokio::select! {
                biased;
                Ok(count) = sandbox.oom(&container.id, kills), if process.exec.is_empty() => {
                    kills = count;
                    let event = TaskOOM {
                        container_id: container.id.clone(),
                        ..Default::default()
                    };
                    self.publisher.publish(topics::TASK_OOM_EVENT_TOPIC, &event);
                }
                exit = sandbox.wait(&container.id, &process.exec) => break exit,
            }
        };
        let exited = match exit {
            Ok(exit) => Exited {
                status: exit.exit_status,
                at: exit.exited_at_ns,
            },
            Err(error) => {
                tracing::warn!("container {} {}: {error}", container.id, process.exec);
                Exited {
                    status: LOST,
                    at: now_ns(),
                }
            }
        };
        if process.exec.is_empty() {
            self.outlive_execs(&container, &sandbox).await;
        }
        self.exited(&container, &process, exited);
    }

    /// Returns when the processes beside an init that has ended have ended too.
    async fn outlive_execs(&self, container: &Container, sandbox: &Sandbox) {
        if let Ok(stats) = sandbox.stats(&container.id).await {
            container.keep_stats(stats);
        }
        if container.shares_pids {
            // The namespace lives on, so the kernel does not do it.
            let _ = sandbox.signal(&container.id, "", SIGKILL, true).await;
        }
        let execs = container.execs();
        let ends = async {
            for exec in execs.iter().filter(|exec| exec.phase() == Phase::Running) {
                exec.wait().await;
            }
        };
        if tokio::time::timeout(EXECS, ends).await.is_err() {
            tracing::warn!("container {}: a process outlives its init", container.id);
        }
    }

    fn exited(&self, container: &Container, process: &Process, exited: Exited) {
        process.set_exited(exited);
        let id = match process.exec.as_str() {
            "" => &container.id,
            exec => exec,
        };
        self.publisher.publish(
            topics::TASK_EXIT_EVENT_TOPIC,
            &TaskExit {
                container_id: container.id.clone(),
                id: id.to_owned(),
                pid: process.pid(),
                exit_status: exited.status,
                exited_at: MessageField::some(timestamp(exited.at)),
                ..Default::default()
            },
        );
    }

    /// Waits until the container that stands for the sandbox is killed, or the virtual machine has ended.
    async fn watch_sandbox(self: Arc<Self>, container: Arc<Container>, sandbox: Arc<Sandbox>) {
        let status = tokio::select! {
            status = container.told_to_end() => status,
            ended = sandbox.ended() => {
                tracing::warn!("sandbox {} ended: {}", container.id, ended.message);
                LOST
            }
        };
        let exited = Exited {
            status,
            at: now_ns(),
        };
        self.exited(&container, &container.init, exited);
    }
}

impl Container {
    /// Ends the container that stands for the sandbox.
    pub fn end_sandbox(&self, status: u32) {
        let mut stopped_with = self
            .stopped_with
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        stopped_with.get_or_insert(status);
        self.stop.notify_one();
    }

    async fn told_to_end(&self) -> u32 {
        loop {
            let stopped_with = *self
                .stopped_with
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            match stopped_with {
                Some(status) => return status,
                None => self.stop.notified().await,
            }
        }
    }
}

/// As shells and container runtimes have it.
fn status_of(error: &Error) -> u32 {
    match error.start_failure() {
        Some(StartFailure::NotFound) => 127,
        Some(StartFailure::NotExecutable) => 126,
        None => 128,
    }
}
