//! A bundle's specification made the guest's: host paths replaced by what virtiofs serves, and what means something on the
//! host alone dropped where the virtual machine does the same job, refused where a user would miss it.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{
    Linux, LinuxDevice, LinuxDeviceType, LinuxNamespace, LinuxNamespaceType, LinuxResources, Mount,
    Process, Spec,
};

use super::error::refuse;
use super::pids;
use crate::error::ErrorKind;
use crate::sandbox::Error;
use crate::sandbox::dir::SandboxDir;
use crate::sandbox::volume::{self, has_option};

/// Makes `spec` the guest's: binds its volumes into the share of container `id`. Answers whether the container is in the
/// pod's own pid namespace.
///
/// # Errors
/// `InvalidArgument` or `Unimplemented`: something in it that a virtual machine cannot do, by its name.
pub fn translate(
    dir: &SandboxDir,
    id: &str,
    spec: &mut Spec,
    terminal: bool,
) -> Result<bool, Error> {
    refuse_hooks(spec)?;
    refuse_propagation(spec)?;
    // The pod's, in the guest; set with the sandbox.
    spec.set_hostname(None);
    spec.set_domainname(None);
    if let Some(process) = spec.process_mut() {
        self::process(process, terminal);
    }
    let pod_pids = match spec.linux_mut() {
        Some(linux) => self::linux(linux)?,
        None => false,
    };
    volume::share(dir, id, spec, guests_own)?;
    Ok(pod_pids)
}

/// A process of the guest's, in which there are no security modules: the virtual machine is the wall.
pub fn process(process: &mut Process, terminal: bool) {
    process.set_terminal(Some(terminal));
    process.set_apparmor_profile(None);
    process.set_selinux_label(None);
}

/// What a limit of the host's means in the guest; the rest is dropped.
pub fn resources(resources: &mut LinuxResources) {
    if let Some(cpu) = resources.cpu_mut() {
        // Numbers of the host's CPUs and memory nodes.
        cpu.set_cpus(None);
        cpu.set_mems(None);
        cpu.set_realtime_period(None);
        cpu.set_realtime_runtime(None);
    }
    resources.set_hugepage_limits(None);
    resources.set_network(None);
    resources.set_rdma(None);
    // By numbers of the host's disks.
    resources.set_block_io(None);
}

/// The namespaces that a pod cannot share with the host.
///
/// # Errors
/// `Unimplemented`, with the namespace's name.
pub fn refuse_host_namespaces(spec: &Spec) -> Result<(), Error> {
    let namespaces = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.namespaces().as_deref());
    let namespaces = namespaces.unwrap_or_default();
    for (typ, name) in [
        (LinuxNamespaceType::Network, "network"),
        (LinuxNamespaceType::Ipc, "IPC"),
    ] {
        if !namespaces.iter().any(|namespace| namespace.typ() == typ) {
            return Err(refuse(
                ErrorKind::Unimplemented,
                format!("the host's {name} namespace: a pod in a virtual machine cannot be in it"),
            ));
        }
    }
    Ok(())
}

/// Refuses a user namespace without a root: nothing could be done in it.
///
/// # Errors
/// `InvalidArgument`.
pub fn check_user_namespace(spec: &Spec) -> Result<(), Error> {
    let Some(linux) = spec.linux() else {
        return Ok(());
    };
    let mut namespaces = linux.namespaces().iter().flatten();
    let wanted = namespaces.any(|one| one.typ() == LinuxNamespaceType::User);
    for (name, mappings) in [
        ("user", linux.uid_mappings()),
        ("group", linux.gid_mappings()),
    ] {
        let mut mappings = mappings.iter().flatten();
        if wanted && !mappings.any(|one| one.container_id() == 0) {
            return Err(refuse(
                ErrorKind::InvalidArgument,
                format!("the pod's user namespace: {name} id 0 is not mapped"),
            ));
        }
    }
    Ok(())
}

fn refuse_hooks(spec: &Spec) -> Result<(), Error> {
    let Some(hooks) = spec.hooks() else {
        return Ok(());
    };
    #[allow(deprecated, reason = "old bundles have it")]
    let prestart = hooks.prestart();
    let all = [
        prestart,
        hooks.create_runtime(),
        hooks.create_container(),
        hooks.start_container(),
        hooks.poststart(),
        hooks.poststop(),
    ];
    if all
        .iter()
        .any(|hooks| hooks.as_ref().is_some_and(|hooks| !hooks.is_empty()))
    {
        return Err(refuse(
            ErrorKind::Unimplemented,
            "hooks: they name the host's programs, which are not in the guest",
        ));
    }
    Ok(())
}

fn refuse_propagation(spec: &Spec) -> Result<(), Error> {
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    let shared = mounts
        .iter()
        .find(|mount| has_option(mount, "rshared") || has_option(mount, "shared"));
    match shared {
        None => Ok(()),
        Some(mount) => Err(refuse(
            ErrorKind::Unimplemented,
            format!(
                "mount {}: bidirectional propagation: a guest's mounts cannot be the host's",
                mount.destination().display()
            ),
        )),
    }
}

fn linux(linux: &mut Linux) -> Result<bool, Error> {
    linux.set_cgroups_path(None);
    linux.set_mount_label(None);
    linux.set_intel_rdt(None);
    let privileged = linux.resources().as_ref().is_some_and(allows_all_devices);
    if let Some(resources) = linux.resources_mut() {
        self::resources(resources);
    }
    let devices = linux.devices().clone().unwrap_or_default();
    linux.set_devices(Some(devices_of_guest(devices, privileged)?));
    let mut pod_pids = false;
    for namespace in linux.namespaces_mut().iter_mut().flatten() {
        pod_pids |= namespace_of_guest(namespace);
    }
    Ok(pod_pids)
}

/// A namespace by path is one of the pod's, all of which the guest has; of another container's pids, that container's.
/// Answers whether it is the pod's pid namespace.
fn namespace_of_guest(namespace: &mut LinuxNamespace) -> bool {
    let Some(path) = namespace.path().clone() else {
        return false;
    };
    namespace.set_path(None);
    if namespace.typ() != LinuxNamespaceType::Pid {
        return false;
    }
    match pids::in_guest(&path) {
        Some(pid) => {
            namespace.set_path(Some(format!("/proc/{pid}/ns/pid").into()));
            false
        }
        None => true,
    }
}

fn allows_all_devices(resources: &LinuxResources) -> bool {
    let rules = resources.devices().as_deref().unwrap_or_default();
    rules.iter().any(|rule| {
        let any = |number: Option<i64>| number.is_none_or(|number| number < 0);
        rule.allow()
            && any(rule.major())
            && any(rule.minor())
            && rule.typ().is_none_or(|typ| typ == LinuxDeviceType::A)
            && rule
                .access()
                .as_deref()
                .is_none_or(|access| access.contains("rw"))
    })
}

/// The devices that a guest has. A privileged container is given every device of its host: here, of its guest.
fn devices_of_guest(
    devices: Vec<LinuxDevice>,
    privileged: bool,
) -> Result<Vec<LinuxDevice>, Error> {
    let (own, others): (Vec<_>, Vec<_>) = devices.into_iter().partition(is_guests);
    match others.first() {
        Some(device) if !privileged => Err(refuse(
            ErrorKind::Unimplemented,
            format!(
                "device {} ({}:{}): the guest has no such device",
                device.path().display(),
                device.major(),
                device.minor()
            ),
        )),
        _ => Ok(own),
    }
}

/// Devices of the kernel itself, by Linux's admin-guide/devices.txt.
fn is_guests(device: &LinuxDevice) -> bool {
    let character = matches!(device.typ(), LinuxDeviceType::C | LinuxDeviceType::U);
    // null, zero, full, random, urandom; tty, console, ptmx; tun, fuse.
    let numbers = matches!(
        (device.major(), device.minor()),
        (1, 3 | 5 | 7 | 8 | 9) | (5, 0..=2) | (10, 200 | 229)
    );
    character && numbers
}

/// What is bound from the guest instead of the host: the pod's shared memory, and the kernel's devices.
fn guests_own(mount: &Mount) -> Option<PathBuf> {
    if mount.destination() == Path::new("/dev/shm") {
        return Some("/dev/shm".into());
    }
    let source = mount.source().as_deref()?;
    let device = source.strip_prefix("/dev").ok()?.to_str()?;
    let own = [
        "null", "zero", "full", "random", "urandom", "tty", "fuse", "net/tun",
    ];
    own.contains(&device).then(|| source.to_path_buf())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(json: &str) -> Spec {
        serde_json::from_str(&format!(r#"{{"ociVersion":"1.0.2",{json}}}"#)).unwrap()
    }

    fn linux_of(json: &str) -> Result<(Linux, bool), Error> {
        let mut linux = spec(&format!(r#""linux":{json}"#)).linux().clone().unwrap();
        let pod_pids = self::linux(&mut linux)?;
        Ok((linux, pod_pids))
    }

    #[test]
    fn what_is_the_hosts_alone_goes() {
        let (linux, pod_pids) = linux_of(
            r#"{"cgroupsPath":"/kubepods/x","mountLabel":"l","namespaces":[{"type":"network","path":"/run/netns/a"},
            {"type":"ipc","path":"/proc/7/ns/ipc"},{"type":"pid"}],
            "resources":{"cpu":{"shares":2,"cpus":"0-63","mems":"1"},"hugepageLimits":[{"pageSize":"2MB","limit":0}]}}"#,
        )
        .unwrap();
        assert!(!pod_pids);
        assert!(linux.cgroups_path().is_none());
        let namespaces = linux.namespaces().clone().unwrap();
        assert!(
            namespaces
                .iter()
                .all(|namespace| namespace.path().is_none())
        );
        let resources = linux.resources().clone().unwrap();
        let cpu = resources.cpu().clone().unwrap();
        assert_eq!((cpu.shares(), cpu.cpus()), (Some(2), &None));
        assert!(resources.hugepage_limits().is_none());
    }

    #[test]
    fn pid_namespaces_are_the_pods_or_a_siblings() {
        let (_, pod_pids) =
            linux_of(r#"{"namespaces":[{"type":"pid","path":"/proc/4321/ns/pid"}]}"#).unwrap();
        assert!(pod_pids);
        let sibling = pids::on_host(45);
        let (linux, pod_pids) = linux_of(&format!(
            r#"{{"namespaces":[{{"type":"pid","path":"/proc/{sibling}/ns/pid"}}]}}"#
        ))
        .unwrap();
        assert!(!pod_pids);
        let namespaces = linux.namespaces().clone().unwrap();
        assert_eq!(
            namespaces[0].path().as_deref(),
            Some(Path::new("/proc/45/ns/pid"))
        );
    }

    #[test]
    fn devices_of_the_host_are_refused_or_left_out() {
        let device = r#"{"path":"/dev/sda","type":"b","major":8,"minor":0}"#;
        let null = r#"{"path":"/dev/null","type":"c","major":1,"minor":3}"#;
        let error = linux_of(&format!(r#"{{"devices":[{null},{device}]}}"#)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unimplemented);
        assert!(error.to_string().contains("/dev/sda"), "{error}");
        let (linux, _) = linux_of(&format!(
            r#"{{"devices":[{null},{device}],"resources":{{"devices":[{{"allow":true,"access":"rwm"}}]}}}}"#
        ))
        .unwrap();
        let devices = linux.devices().clone().unwrap();
        assert_eq!(devices.len(), 1);
    }

    #[test]
    fn what_a_virtual_machine_cannot_do_is_named() {
        let hooks = spec(r#""hooks":{"poststop":[{"path":"/bin/x"}]}"#);
        assert!(refuse_hooks(&hooks).is_err());
        let mount = r#""mounts":[{"destination":"/d","source":"/s","type":"bind","options":["rbind","rshared"]}]"#;
        assert!(refuse_propagation(&spec(mount)).is_err());
        let host = spec(r#""linux":{"namespaces":[{"type":"network"}]}"#);
        let error = refuse_host_namespaces(&host).unwrap_err();
        assert!(error.to_string().contains("IPC"), "{error}");
    }

    #[test]
    fn a_user_namespace_has_a_root() {
        let with = |uids: &str| {
            spec(&format!(
                r#""linux":{{"namespaces":[{{"type":"user"}}],"uidMappings":[{uids}],
                "gidMappings":[{{"containerID":0,"hostID":5,"size":9}}]}}"#
            ))
        };
        check_user_namespace(&with(r#"{"containerID":0,"hostID":5,"size":9}"#)).unwrap();
        for wrong in ["", r#"{"containerID":1,"hostID":5,"size":9}"#] {
            let error = check_user_namespace(&with(wrong)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
            assert!(error.to_string().contains("user id 0"), "{error}");
        }
        check_user_namespace(&spec(r#""hostname":"x""#)).unwrap();
    }

    #[test]
    fn shared_memory_and_devices_are_the_guests() {
        let mount = |source: &str, destination: &str| {
            let mut mount = Mount::default();
            mount.set_source(Some(source.into()));
            mount.set_destination(destination.into());
            guests_own(&mount)
        };
        assert_eq!(mount("/run/c/shm", "/dev/shm"), Some("/dev/shm".into()));
        assert_eq!(mount("/dev/fuse", "/dev/fuse"), Some("/dev/fuse".into()));
        assert_eq!(mount("/dev/sda", "/dev/sda"), None);
        assert_eq!(mount("/srv", "/srv"), None);
    }
}
