//! containerd's sandbox service (`sandboxer = "shim"`): a pod's sandbox without a container that stands for it.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use cella_proto::pod_sandbox::{
    IDMapping, LinuxContainerResources, NamespaceMode, PodSandboxConfig,
};
use containerd_shim_protos::sandbox_api as api;
use containerd_shim_protos::sandbox_async::Sandbox as SandboxApi;
use oci_spec::runtime::{
    Linux, LinuxIdMapping, LinuxIdMappingBuilder, LinuxNamespace, LinuxNamespaceType, Spec,
};
use protobuf::{Message, MessageField};
use ttrpc::asynchronous::TtrpcContext;

use super::bundle::Role;
use super::error::{refuse, status};
use super::io::{Io, Stdio};
use super::pod::Pod;
use super::process::{Exited, Phase, Process};
use super::settings::{SANDBOX_CPU_PERIOD, SANDBOX_CPU_QUOTA, SANDBOX_MEMORY};
use super::time::{now_ns, timestamp};
use super::{pod_files, stats};
use crate::error::ErrorKind;
use crate::sandbox::Error;

type Answer<T> = ttrpc::Result<T>;

/// The statuses of a sandbox that was stopped, and of one whose virtual machine ended by itself.
const STOPPED: u32 = 0;
const LOST: u32 = 137;

/// A sandbox that CreateSandbox has made known.
pub struct Declared {
    spec: Spec,
    /// What its containers get as files in /etc.
    pub files: pod_files::PodFiles,
    process: Process,
    created_at: i64,
}

/// What the generated trait is implemented on: the methods need the pod to outlive a call.
pub struct SandboxService(pub Arc<Pod>);

#[async_trait]
impl SandboxApi for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::CreateSandboxRequest,
    ) -> Answer<api::CreateSandboxResponse> {
        self.0.declare(&request).map_err(|e| status(&e))?;
        Ok(api::CreateSandboxResponse::new())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        _: api::StartSandboxRequest,
    ) -> Answer<api::StartSandboxResponse> {
        let started = Pod::start_sandbox(&self.0).await;
        started.map_err(|e| status(&e))
    }

    async fn platform(
        &self,
        _: &TtrpcContext,
        _: api::PlatformRequest,
    ) -> Answer<api::PlatformResponse> {
        let platform = containerd_shim_protos::types::platform::Platform {
            os: "linux".to_owned(),
            architecture: "amd64".to_owned(),
            ..Default::default()
        };
        Ok(api::PlatformResponse {
            platform: MessageField::some(platform),
            ..Default::default()
        })
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        _: api::StopSandboxRequest,
    ) -> Answer<api::StopSandboxResponse> {
        self.0.stop_sandbox().await.map_err(|e| status(&e))?;
        Ok(api::StopSandboxResponse::new())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        _: api::WaitSandboxRequest,
    ) -> Answer<api::WaitSandboxResponse> {
        let declared = self.0.declared().map_err(|e| status(&e))?;
        let exited = declared.process.wait().await;
        Ok(api::WaitSandboxResponse {
            exit_status: exited.status,
            exited_at: MessageField::some(timestamp(exited.at)),
            ..Default::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: api::SandboxStatusRequest,
    ) -> Answer<api::SandboxStatusResponse> {
        let declared = self.0.declared().map_err(|e| status(&e))?;
        let state = match declared.process.phase() {
            Phase::Running => "SANDBOX_READY",
            _ => "SANDBOX_NOTREADY",
        };
        let exited = declared.process.exited();
        Ok(api::SandboxStatusResponse {
            sandbox_id: request.sandbox_id,
            pid: declared.process.pid(),
            state: state.to_owned(),
            created_at: MessageField::some(timestamp(declared.created_at)),
            exited_at: exited.map(|exited| timestamp(exited.at)).into(),
            ..Default::default()
        })
    }

    async fn ping_sandbox(
        &self,
        _: &TtrpcContext,
        _: api::PingRequest,
    ) -> Answer<api::PingResponse> {
        Ok(api::PingResponse::new())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        _: api::ShutdownSandboxRequest,
    ) -> Answer<api::ShutdownSandboxResponse> {
        self.0.stop_sandbox().await.map_err(|e| status(&e))?;
        self.0.shut_down_now().await.map_err(|e| status(&e))?;
        Ok(api::ShutdownSandboxResponse::new())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: api::SandboxMetricsRequest,
    ) -> Answer<api::SandboxMetricsResponse> {
        let sum = self.0.pod_stats().await.map_err(|e| status(&e))?;
        let any = stats::encode(&sum, stats::host_has_v2()).map_err(|e| status(&e))?;
        let metrics = api::SandboxMetricsResponse {
            metrics: MessageField::some(Default::default()),
            ..Default::default()
        };
        let mut answer = metrics;
        let metric = answer.metrics.mut_or_insert_default();
        metric.timestamp = MessageField::some(timestamp(now_ns()));
        metric.id = request.sandbox_id;
        metric.data = MessageField::some(any);
        Ok(answer)
    }
}

impl Pod {
    fn declare(&self, request: &api::CreateSandboxRequest) -> Result<(), Error> {
        let bytes = request.options.as_ref().map(|any| any.value.as_slice());
        let config =
            PodSandboxConfig::parse_from_bytes(bytes.unwrap_or_default()).map_err(|e| {
                refuse(
                    ErrorKind::InvalidArgument,
                    format!("the configuration of sandbox {}: {e}", request.sandbox_id),
                )
            })?;
        let declared = Declared {
            spec: spec_of(&config, request),
            files: pod_files::PodFiles::of(&config),
            process: Process::new("", Stdio::default(), 0, Io::default()),
            created_at: now_ns(),
        };
        self.declare_sandbox(declared)
    }

    async fn start_sandbox(pod: &Arc<Self>) -> Result<api::StartSandboxResponse, Error> {
        let declared = pod.declared()?;
        if declared.process.phase() != Phase::Created {
            return Err(refuse(
                ErrorKind::FailedPrecondition,
                "starting a sandbox: it was started already",
            ));
        }
        let sandbox = pod.boot(&Role::Sandbox, &declared.spec, None).await?;
        declared.process.set_running(sandbox.vmm_pid());
        let watched = Arc::clone(pod);
        let machine = Arc::clone(&sandbox);
        tokio::spawn(async move {
            let ended = machine.ended().await;
            tracing::info!("the sandbox ended: {}", ended.message);
            if let Ok(declared) = watched.declared() {
                declared.end(LOST);
            }
        });
        Ok(api::StartSandboxResponse {
            pid: sandbox.vmm_pid(),
            created_at: MessageField::some(timestamp(declared.created_at)),
            ..Default::default()
        })
    }

    async fn stop_sandbox(&self) -> Result<(), Error> {
        if let Ok(declared) = self.declared() {
            // Before the machine is: this is no failure.
            declared.end(STOPPED);
        }
        self.end_sandbox().await
    }
}

impl Declared {
    fn end(&self, status: u32) {
        if self.process.exited().is_none() {
            self.process.set_exited(Exited {
                status,
                at: now_ns(),
            });
        }
    }
}

/// The specification that containerd would have written for a container that stands for this sandbox.
fn spec_of(config: &PodSandboxConfig, request: &api::CreateSandboxRequest) -> Spec {
    let mut annotations: HashMap<String, String> = config.annotations.clone();
    annotations.extend(request.annotations.clone());
    let linux = config.linux.get_or_default();
    let (resources, overhead) = (
        linux.resources.get_or_default(),
        linux.overhead.get_or_default(),
    );
    let whole = |of: fn(&LinuxContainerResources) -> i64| match of(resources) {
        limit if limit > 0 => limit.saturating_add(of(overhead).max(0)),
        _ => 0,
    };
    let memory = whole(|resources| resources.memory_limit_in_bytes);
    let quota = whole(|resources| resources.cpu_quota);
    let mut limit = |key: &str, value: i64| annotations.insert(key.to_owned(), value.to_string());
    limit(SANDBOX_MEMORY, memory);
    limit(SANDBOX_CPU_QUOTA, quota);
    limit(SANDBOX_CPU_PERIOD, resources.cpu_period);

    let options = linux
        .security_context
        .get_or_default()
        .namespace_options
        .get_or_default();
    let mut namespaces = Vec::new();
    let mut add = |typ, mode: protobuf::EnumOrUnknown<NamespaceMode>, path: &str| {
        if mode.enum_value() != Ok(NamespaceMode::NODE) {
            let mut namespace = LinuxNamespace::default();
            namespace.set_typ(typ);
            namespace.set_path((!path.is_empty()).then(|| path.into()));
            namespaces.push(namespace);
        }
    };
    add(
        LinuxNamespaceType::Network,
        options.network,
        &request.netns_path,
    );
    add(LinuxNamespaceType::Ipc, options.ipc, "");
    let mut made = Linux::default();
    let users = options.userns_options.get_or_default();
    if options.userns_options.is_some() && users.mode.enum_value() == Ok(NamespaceMode::POD) {
        let mut namespace = LinuxNamespace::default();
        namespace.set_typ(LinuxNamespaceType::User);
        namespaces.push(namespace);
        made.set_uid_mappings(Some(mappings(&users.uids)));
        made.set_gid_mappings(Some(mappings(&users.gids)));
    }
    made.set_namespaces(Some(namespaces));
    made.set_sysctl(Some(linux.sysctls.clone()));
    let mut spec = Spec::default();
    spec.set_hostname(Some(config.hostname.clone()));
    spec.set_annotations(Some(annotations));
    spec.set_linux(Some(made));
    spec
}

fn mappings(of: &[IDMapping]) -> Vec<LinuxIdMapping> {
    let one = |mapping: &IDMapping| {
        LinuxIdMappingBuilder::default()
            .container_id(mapping.container_id)
            .host_id(mapping.host_id)
            .size(mapping.length)
            .build()
    };
    // The builder's fields are all given.
    of.iter().filter_map(|mapping| one(mapping).ok()).collect()
}
