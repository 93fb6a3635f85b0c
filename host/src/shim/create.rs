//! Create, and the processes that Exec makes.

use std::path::Path;
use std::sync::Arc;

use containerd_shim_protos::api::{CreateTaskRequest, ExecProcessRequest};
use oci_spec::runtime::{Process as OciProcess, Spec};

use super::bundle::{self, Role};
use super::container::Container;
use super::error::refuse;
use super::io::{Io, Stdio};
use super::pod::Pod;
use super::prepare::Wish;
use super::process::Process;
use super::{pids, spec};
use crate::error::ErrorKind;
use crate::sandbox::stdio::{self, Wanted};
use crate::sandbox::{Error, Sandbox};

/// A terminal's size before the first resize: rows, columns.
const TERMINAL: (u16, u16) = (24, 80);

impl Pod {
    /// Makes a container; for the pod's first, the sandbox with it.
    ///
    /// # Errors
    /// With the kind of the step that failed; nothing of the container is left then.
    pub async fn create_container(
        &self,
        request: &CreateTaskRequest,
    ) -> Result<Arc<Container>, Error> {
        if !request.checkpoint.is_empty() {
            return Err(refuse(
                ErrorKind::Unimplemented,
                "creating a container from a checkpoint",
            ));
        }
        let id = &request.id;
        let place = self.reserve(id)?;
        let bundle = Path::new(&request.bundle);
        let spec = bundle::read_spec(bundle)?;
        let role = Role::of(&spec);
        let sandbox = match &role {
            Role::Member(_) => self.sandbox()?,
            Role::Alone | Role::Sandbox => {
                self.boot(&role, &spec, request.options.as_ref()).await?
            }
        };
        let container = if role == Role::Sandbox {
            let init = Process::new("", stdio_of(request), sandbox.vmm_pid(), Io::default());
            let mut container = Container::new(id, bundle.to_path_buf(), init);
            container.is_sandbox = true;
            container
        } else {
            self.make(request, &sandbox, spec, &role).await?
        };
        let container = Arc::new(container);
        place.fill(Arc::clone(&container));
        Ok(container)
    }

    async fn make(
        &self,
        request: &CreateTaskRequest,
        sandbox: &Sandbox,
        spec: Spec,
        role: &Role,
    ) -> Result<Container, Error> {
        let id = &request.id;
        let wish = Wish {
            dir: sandbox.dir().clone(),
            id: id.clone(),
            bundle: request.bundle.clone().into(),
            rootfs: request.rootfs.clone(),
            spec,
            terminal: request.terminal,
            files: self.declared().ok().map(|sandbox| sandbox.files.clone()),
        };
        let prepared = wish.fulfil().await?;
        let pod_pids = prepared.pod_pids;
        let stdio = stdio_of(request);
        let mut io = Io::open(&stdio, id, &self.namespace).await?;
        let (wish, pending) = stdio::listen(&sandbox.dir().sockets(), wanted(&stdio))?;
        let create = sandbox.create_in(id, &prepared.spec, wish, pod_pids);
        let (pid, streams) = tokio::try_join!(create, pending.accept())?;
        let connected = io.connect(streams);
        let pid = match role {
            Role::Alone => sandbox.vmm_pid(),
            Role::Sandbox | Role::Member(_) => pids::on_host(pid),
        };
        if let Err(error) = connected {
            let _ = sandbox.delete(id, "").await;
            return Err(error);
        }
        prepared.files.keep();
        let init = Process::new("", stdio, pid, io);
        let mut container = Container::new(id, request.bundle.clone().into(), init);
        container.shares_pids = pod_pids;
        Ok(container)
    }

    /// Makes a process in a container.
    ///
    /// # Errors
    /// `AlreadyExists`, `InvalidArgument`, or the agent's.
    pub async fn create_exec(&self, request: &ExecProcessRequest) -> Result<(), Error> {
        let container = self.container(&request.id)?;
        container.check_has_processes()?;
        container.init.check_lives()?;
        let place = container.reserve(&request.exec_id)?;
        let json = request.spec.as_ref().map(|any| any.value.as_slice());
        let mut process: OciProcess =
            serde_json::from_slice(json.unwrap_or_default()).map_err(|e| {
                refuse(
                    ErrorKind::InvalidArgument,
                    format!("the process of exec {}: {e}", request.exec_id),
                )
            })?;
        spec::process(&mut process, request.terminal);
        let stdio = Stdio {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let sandbox = self.sandbox()?;
        let mut io = Io::open(&stdio, &request.id, &self.namespace).await?;
        let (wish, pending) = stdio::listen(&sandbox.dir().sockets(), wanted(&stdio))?;
        let exec = sandbox.exec(&request.id, &request.exec_id, &process, wish);
        let ((), streams) = tokio::try_join!(exec, pending.accept())?;
        if let Err(error) = io.connect(streams) {
            let _ = sandbox.delete(&request.id, &request.exec_id).await;
            return Err(error);
        }
        place.fill(Arc::new(Process::new(&request.exec_id, stdio, 0, io)));
        Ok(())
    }
}

fn stdio_of(request: &CreateTaskRequest) -> Stdio {
    Stdio {
        stdin: request.stdin.clone(),
        stdout: request.stdout.clone(),
        stderr: request.stderr.clone(),
        terminal: request.terminal,
    }
}

fn wanted(stdio: &Stdio) -> Wanted {
    Wanted {
        stdin: !stdio.stdin.is_empty(),
        terminal: stdio.terminal.then_some(TERMINAL),
    }
}
