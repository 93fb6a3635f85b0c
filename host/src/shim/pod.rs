//! What a shim has: one sandbox, and the containers in it. Locks are held for a step, never across a call to the guest, so
//! that no container waits for its sibling.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use cella_proto::agent::StatsResponse;
use oci_spec::runtime::Spec;
use protobuf::well_known_types::any::Any;
use tokio::sync::{Notify, OnceCell};

use super::args::Args;
use super::bundle::{self, Role};
use super::container::Container;
use super::error::refuse;
use super::events::Publisher;
use super::sandbox_service::Declared;
use super::stats;
use super::{settings, spec};
use crate::error::ErrorKind;
use crate::hypervisor;
use crate::paths::Paths;
use crate::sandbox::{Error, Sandbox};
use crate::template;
use crate::timeline::Timeline;

/// The state of one shim.
pub struct Pod {
    /// Where things are on this host.
    pub paths: Paths,
    /// containerd's namespace.
    pub namespace: String,
    /// Where events go.
    pub publisher: Publisher,
    /// What containerd gave `start` for the runtime.
    options: Option<Any>,
    group: String,
    socket: PathBuf,
    socket_removed: AtomicBool,
    sandbox: OnceCell<Arc<Sandbox>>,
    declared: OnceLock<Declared>,
    containers: Mutex<HashMap<String, Slot>>,
    end: Notify,
}

#[derive(Clone)]
enum Slot {
    /// Somebody makes a container of this id.
    Reserved,
    Made(Arc<Container>),
}

/// A container's place in its pod while it is made. Dropping it gives the place up.
pub struct Place<'a> {
    pod: &'a Pod,
    id: &'a str,
}

impl Pod {
    /// The pod of a shim that `start` has made for container `args.id`.
    pub fn new(paths: Paths, args: &Args, publisher: Publisher, options: Option<Any>) -> Self {
        Self {
            paths,
            namespace: args.namespace.clone(),
            publisher,
            options,
            group: args.id.clone(),
            socket: bundle::socket(&args.address, &args.namespace, &args.id),
            socket_removed: AtomicBool::new(false),
            sandbox: OnceCell::new(),
            declared: OnceLock::new(),
            containers: Mutex::default(),
            end: Notify::new(),
        }
    }

    /// The sandbox.
    ///
    /// # Errors
    /// `Unavailable`: there is none yet.
    pub fn sandbox(&self) -> Result<Arc<Sandbox>, Error> {
        self.sandbox.get().cloned().ok_or_else(|| {
            refuse(
                ErrorKind::Unavailable,
                format!("pod {} has no sandbox yet", self.group),
            )
        })
    }

    /// The sandbox, booted for its first container; a second one that comes meanwhile waits.
    ///
    /// # Errors
    /// The configuration is wrong, or the sandbox does not boot.
    pub async fn boot(
        &self,
        role: &Role,
        spec: &Spec,
        options: Option<&Any>,
    ) -> Result<Arc<Sandbox>, Error> {
        let boot = || async {
            spec::refuse_host_namespaces(spec)?;
            spec::check_user_namespace(spec)?;
            let config = settings::with_options(&self.paths, options.or(self.options.as_ref()))?;
            let name = config.hypervisor.clone();
            let spec = settings::sandbox(config.clone(), &self.group, role, spec)?;
            let choice = hypervisor::choose(&name, &self.paths.qemu)?;
            if let Some(warning) = choice.warning {
                tracing::warn!("{warning}");
            }
            let dir = bundle::sandbox_dir(&self.paths, &self.namespace, &self.group)?;
            let timeline = Timeline::new();
            let made = Sandbox::boot(
                &self.paths,
                dir,
                choice.hypervisor.as_ref(),
                spec,
                &timeline,
            );
            let made = made.await?;
            template::background::provide(&self.paths, &config, &made);
            Ok(Arc::new(made))
        };
        self.sandbox.get_or_try_init(boot).await.cloned()
    }

    /// Makes the pod's sandbox known, by the sandbox service.
    ///
    /// # Errors
    /// `AlreadyExists`.
    pub fn declare_sandbox(&self, declared: Declared) -> Result<(), Error> {
        self.declared.set(declared).map_err(|_| {
            refuse(
                ErrorKind::AlreadyExists,
                format!("sandbox {} exists already", self.group),
            )
        })
    }

    /// What the sandbox service has made known.
    ///
    /// # Errors
    /// `NotFound`: it was not asked to.
    pub fn declared(&self) -> Result<&Declared, Error> {
        self.declared.get().ok_or_else(|| {
            refuse(
                ErrorKind::NotFound,
                format!("sandbox {} does not exist", self.group),
            )
        })
    }

    /// The counters of all containers together.
    ///
    /// # Errors
    /// `Unavailable`: there is no sandbox yet.
    pub async fn pod_stats(&self) -> Result<StatsResponse, Error> {
        let sandbox = self.sandbox()?;
        let mut sum = StatsResponse::default();
        for member in self.containers().iter().filter(|member| !member.is_sandbox) {
            if let Ok(counters) = sandbox.stats(&member.id).await {
                stats::add(&mut sum, &counters);
            }
        }
        Ok(sum)
    }

    /// Takes a container's id.
    ///
    /// # Errors
    /// `AlreadyExists`.
    pub fn reserve<'a>(&'a self, id: &'a str) -> Result<Place<'a>, Error> {
        crate::paths::check_id(id)?;
        let mut containers = self.lock();
        if containers.contains_key(id) {
            return Err(refuse(
                ErrorKind::AlreadyExists,
                format!("container {id} exists already"),
            ));
        }
        containers.insert(id.to_owned(), Slot::Reserved);
        Ok(Place { pod: self, id })
    }

    /// A container.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn container(&self, id: &str) -> Result<Arc<Container>, Error> {
        match self.lock().get(id) {
            Some(Slot::Made(container)) => Ok(Arc::clone(container)),
            _ => Err(refuse(
                ErrorKind::NotFound,
                format!("container {id} does not exist"),
            )),
        }
    }

    /// Every container.
    pub fn containers(&self) -> Vec<Arc<Container>> {
        let containers = self.lock();
        let made = containers.values().filter_map(|slot| match slot {
            Slot::Made(container) => Some(Arc::clone(container)),
            Slot::Reserved => None,
        });
        made.collect()
    }

    /// Forgets a container; says whether it was known.
    pub fn remove(&self, id: &str) -> bool {
        self.lock().remove(id).is_some()
    }

    /// Ends the shim, unless there are containers, or a sandbox that has its own call for this.
    ///
    /// # Errors
    /// Something of the sandbox could not be removed.
    pub async fn shut_down(&self) -> Result<(), Error> {
        if !self.lock().is_empty() || self.declared.get().is_some() {
            return Ok(());
        }
        self.shut_down_now().await
    }

    /// Ends the shim. When this returns, everything of it that has a name is gone: the answer is what containerd makes
    /// the next shim of the same name after.
    ///
    /// # Errors
    /// Something of the sandbox could not be removed.
    pub async fn shut_down_now(&self) -> Result<(), Error> {
        let ended = self.end().await;
        self.end.notify_one();
        ended
    }

    /// Returns when the shim is to end.
    pub async fn told_to_end(&self) {
        self.end.notified().await;
    }

    /// Ends the sandbox, and takes the socket away, once.
    ///
    /// # Errors
    /// Something could not be removed.
    pub async fn end(&self) -> Result<(), Error> {
        let ended = self.end_sandbox().await;
        if !self.socket_removed.swap(true, Ordering::Relaxed) {
            let _ = std::fs::remove_file(&self.socket);
        }
        ended
    }

    /// Ends the sandbox.
    ///
    /// # Errors
    /// Something could not be removed.
    pub async fn end_sandbox(&self) -> Result<(), Error> {
        match self.sandbox.get() {
            Some(sandbox) => sandbox.end().await,
            None => Ok(()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place<'_> {
    /// Puts the container in its place.
    pub fn fill(self, container: Arc<Container>) {
        let id = self.id.to_owned();
        self.pod.lock().insert(id, Slot::Made(container));
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut containers = self.pod.lock();
        if matches!(containers.get(self.id), Some(Slot::Reserved)) {
            containers.remove(self.id);
        }
    }
}
