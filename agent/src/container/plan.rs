//! From a spec to the plan of a container's init.

use std::ffi::CString;

use oci_spec::runtime as oci;

use super::cgroup::Cgroup;
use super::devices::DevicePlan;
use super::init::InitPlan;
use super::mounts::{self, MountContext};
use super::namespaces::NamespacePlan;
use super::process::{ProcessPlan, StreamPlan};
use super::rootfs::RootPlan;
use super::{Error, Result, hooks, sys, validate};

/// Everything that the init does between its birth and the execution of its command.
pub(super) fn init_plan(
    spec: &oci::Spec,
    parts: &validate::Parts<'_>,
    namespaces: NamespacePlan,
    process: ProcessPlan,
    cgroup: &Cgroup,
) -> Result<InitPlan> {
    let linux = parts.linux;
    let (hostname, domainname) = validate::uts_names(spec, &namespaces)?;
    let root = if namespaces.makes(libc::CLONE_NEWNS) {
        Some(root_plan(spec, parts, &namespaces, &process, cgroup)?)
    } else if namespaces.owns(libc::CLONE_NEWNS) {
        None
    } else {
        return Err(Error::invalid(
            "linux.namespaces",
            "a mount namespace is needed",
        ));
    };
    let sysctls = own_sysctls(linux, &namespaces)?;
    let mut keep = Vec::new();
    namespaces.keep(&mut keep);
    process.keep(&mut keep);
    if let Some(root) = &root {
        root.keep(&mut keep);
    }
    Ok(InitPlan {
        namespaces,
        root,
        hostname,
        domainname,
        sysctls,
        process,
        keep,
    })
}

fn root_plan(
    spec: &oci::Spec,
    parts: &validate::Parts<'_>,
    namespaces: &NamespacePlan,
    process: &ProcessPlan,
    cgroup: &Cgroup,
) -> Result<RootPlan> {
    let linux = parts.linux;
    let user = namespaces.owns(libc::CLONE_NEWUSER);
    let context = MountContext {
        foreign_network: user && !namespaces.owns(libc::CLONE_NEWNET),
        foreign_ipc: user && !namespaces.owns(libc::CLONE_NEWIPC),
        cgroup_namespace: namespaces.owns(libc::CLONE_NEWCGROUP),
        cgroup: cgroup.dir(),
    };
    let tree = mounts::open_root(parts.root.path())?;
    let mounts = mounts::plan(spec.mounts().as_deref().unwrap_or_default(), context)?;
    let dev_is_bound = mounts.iter().any(|mount| {
        mount.destination.as_c_str() == c"/dev" && matches!(mount.kind, mounts::MountKind::Tree(_))
    });
    let hooks = spec.hooks().as_ref().is_some_and(|hooks| {
        #[allow(deprecated, reason = "bundles still have prestart hooks")]
        let prestart = hooks.prestart().as_ref();
        hooks::any(prestart)
            || hooks::any(hooks.create_runtime().as_ref())
            || hooks::any(hooks.create_container().as_ref())
    });
    Ok(RootPlan {
        tree: Some(tree),
        path: parts.root.path().clone(),
        mounts,
        devices: DevicePlan::new(linux, dev_is_bound, user)?,
        masked: validate::paths("linux.maskedPaths", linux.masked_paths().as_ref())?,
        readonly_paths: validate::paths("linux.readonlyPaths", linux.readonly_paths().as_ref())?,
        readonly: parts.root.readonly().unwrap_or(false),
        propagation: validate::propagation(linux)?,
        hooks,
        terminal: match process.streams {
            StreamPlan::Terminal { size } => Some(size),
            StreamPlan::Files { .. } | StreamPlan::HandedOver => None,
        },
    })
}

/// The sysctls that the init sets. In a user namespace it could not set those of the guest's own namespaces: these
/// the agent sets now.
fn own_sysctls(linux: &oci::Linux, namespaces: &NamespacePlan) -> Result<Vec<(CString, CString)>> {
    let mut sysctls = validate::sysctls(linux)?;
    if !namespaces.owns(libc::CLONE_NEWUSER) {
        return Ok(sysctls);
    }
    let mut result = Ok(());
    sysctls.retain(|(path, value)| {
        let bytes = path.to_bytes();
        let kind = if bytes.starts_with(b"/proc/sys/net/") {
            libc::CLONE_NEWNET
        } else if bytes == b"/proc/sys/kernel/domainname" {
            libc::CLONE_NEWUTS
        } else {
            libc::CLONE_NEWIPC
        };
        if namespaces.owns(kind) || result.is_err() {
            return true;
        }
        result = sys::write_file(path, value.as_bytes()).map_err(|errno| Error::Process {
            step: format!("setting sysctl {}", path.to_string_lossy()),
            source: errno.into(),
        });
        false
    });
    result.map(|()| sysctls)
}
