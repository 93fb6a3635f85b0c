//! What a spec must be before anything is made, and the small conversions that go with it.

use std::ffi::CString;

use oci_spec::runtime as oci;

use super::command::c_string;
use super::namespaces::NamespacePlan;
use super::options::Propagation;
use super::{Error, Result};

/// Longest id, also a file name.
const MAX_ID: usize = 200;

/// Ids are names of cgroups and appear in messages: letters, digits and `_+-.`, not starting with a dot.
pub(super) fn id(id: &str) -> Result<()> {
    let good = |c: char| c.is_ascii_alphanumeric() || "_+-.".contains(c);
    if id.is_empty() || id.len() > MAX_ID || id.starts_with('.') || !id.chars().all(good) {
        return Err(Error::invalid(
            "id",
            format!("{id:?} is not a container id"),
        ));
    }
    Ok(())
}

/// Parts of a spec that must be there.
pub(super) struct Parts<'a> {
    pub process: &'a oci::Process,
    pub root: &'a oci::Root,
    pub linux: &'a oci::Linux,
}

/// Checks what can be checked without looking at the guest.
pub(super) fn spec(spec: &oci::Spec) -> Result<Parts<'_>> {
    let missing = |field: &str| Error::invalid(field, "is missing");
    let parts = Parts {
        process: spec.process().as_ref().ok_or_else(|| missing("process"))?,
        root: spec.root().as_ref().ok_or_else(|| missing("root"))?,
        linux: spec.linux().as_ref().ok_or_else(|| missing("linux"))?,
    };
    let linux = parts.linux;
    if linux.intel_rdt().is_some() {
        return Err(Error::unsupported(
            "linux.intelRdt",
            "cache allocation is the host's",
        ));
    }
    if linux.memory_policy().is_some() {
        return Err(Error::unsupported(
            "linux.memoryPolicy",
            "a sandbox has one memory node",
        ));
    }
    if linux
        .net_devices()
        .as_ref()
        .is_some_and(|devices| !devices.is_empty())
    {
        return Err(Error::unsupported(
            "linux.netDevices",
            "the network is the sandbox's",
        ));
    }
    if linux
        .mount_label()
        .as_ref()
        .is_some_and(|label| !label.is_empty())
    {
        return Err(Error::unsupported(
            "linux.mountLabel",
            "there is no SELinux in the guest",
        ));
    }
    process(parts.process)?;
    Ok(parts)
}

/// Checks a process.
pub(super) fn process(process: &oci::Process) -> Result<()> {
    if !process.cwd().is_absolute() {
        return Err(Error::invalid(
            "process.cwd",
            format!("{} is not absolute", process.cwd().display()),
        ));
    }
    let user = process.user();
    let groups = user.additional_gids().iter().flatten().copied();
    if groups
        .chain([user.uid(), user.gid()])
        .any(|id| id == u32::MAX)
    {
        return Err(Error::invalid("process.user", "4294967295 is no id"));
    }
    let set = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
    if set(process.apparmor_profile()) {
        return Err(Error::unsupported(
            "process.apparmorProfile",
            "no AppArmor in the guest",
        ));
    }
    if set(process.selinux_label()) {
        return Err(Error::unsupported(
            "process.selinuxLabel",
            "no SELinux in the guest",
        ));
    }
    if process.scheduler().is_some() {
        return Err(Error::unsupported(
            "process.scheduler",
            "only the default is",
        ));
    }
    if process.exec_cpu_affinity().is_some() {
        return Err(Error::unsupported(
            "process.execCPUAffinity",
            "use resources.cpu.cpus",
        ));
    }
    if let Some(adj) = process.oom_score_adj()
        && !(-1000..=1000).contains(&adj)
    {
        return Err(Error::invalid(
            "process.oomScoreAdj",
            format!("{adj} is not -1000..1000"),
        ));
    }
    rlimits(process.rlimits().as_deref().unwrap_or_default())
}

fn rlimits(limits: &[oci::PosixRlimit]) -> Result<()> {
    let mut seen = std::collections::HashSet::new();
    for limit in limits {
        if limit.soft() > limit.hard() {
            return Err(Error::invalid(
                "process.rlimits",
                format!(
                    "{}: soft {} is above hard {}",
                    limit.typ(),
                    limit.soft(),
                    limit.hard()
                ),
            ));
        }
        if !seen.insert(rlimit_number(limit.typ())) {
            return Err(Error::invalid(
                "process.rlimits",
                format!("{} twice", limit.typ()),
            ));
        }
    }
    Ok(())
}

/// The RLIMIT_* number.
pub(super) fn rlimit_number(typ: oci::PosixRlimitType) -> i32 {
    use oci::PosixRlimitType as T;
    let number = match typ {
        T::RlimitCpu => libc::RLIMIT_CPU,
        T::RlimitFsize => libc::RLIMIT_FSIZE,
        T::RlimitData => libc::RLIMIT_DATA,
        T::RlimitStack => libc::RLIMIT_STACK,
        T::RlimitCore => libc::RLIMIT_CORE,
        T::RlimitRss => libc::RLIMIT_RSS,
        T::RlimitNproc => libc::RLIMIT_NPROC,
        T::RlimitNofile => libc::RLIMIT_NOFILE,
        T::RlimitMemlock => libc::RLIMIT_MEMLOCK,
        T::RlimitAs => libc::RLIMIT_AS,
        T::RlimitLocks => libc::RLIMIT_LOCKS,
        T::RlimitSigpending => libc::RLIMIT_SIGPENDING,
        T::RlimitMsgqueue => libc::RLIMIT_MSGQUEUE,
        T::RlimitNice => libc::RLIMIT_NICE,
        T::RlimitRtprio => libc::RLIMIT_RTPRIO,
        T::RlimitRttime => libc::RLIMIT_RTTIME,
    };
    number as i32
}

/// ioprio_set(2)'s value.
pub(super) fn io_priority(priority: &oci::LinuxIOPriority) -> u64 {
    let class = match priority.class() {
        oci::IOPriorityClass::IoprioClassRt => 1u64,
        oci::IOPriorityClass::IoprioClassBe => 2,
        oci::IOPriorityClass::IoprioClassIdle => 3,
    };
    class << 13 | priority.priority().clamp(0, 7).unsigned_abs()
}

/// personality(2)'s value.
pub(super) fn personality(personality: &oci::LinuxPersonality) -> Result<u64> {
    if personality
        .flags()
        .as_ref()
        .is_some_and(|flags| !flags.is_empty())
    {
        return Err(Error::unsupported(
            "linux.personality.flags",
            "none are defined",
        ));
    }
    Ok(match personality.domain() {
        oci::LinuxPersonalityDomain::PerLinux => 0,
        oci::LinuxPersonalityDomain::PerLinux32 => 8,
    })
}

/// `linux.rootfsPropagation`.
pub(super) fn propagation(linux: &oci::Linux) -> Result<Option<Propagation>> {
    match linux.rootfs_propagation().as_deref() {
        None | Some("") => Ok(None),
        Some(word) => Propagation::parse(word).map(Some).ok_or_else(|| {
            Error::invalid(
                "linux.rootfsPropagation",
                format!("{word:?} is no propagation"),
            )
        }),
    }
}

/// Masked or read-only paths: absolute.
pub(super) fn paths(field: &str, paths: Option<&Vec<String>>) -> Result<Vec<CString>> {
    paths
        .into_iter()
        .flatten()
        .map(|path| {
            if !path.starts_with('/') {
                return Err(Error::invalid(field, format!("{path:?} is not absolute")));
            }
            c_string(field, path.as_bytes())
        })
        .collect()
}

/// Host and domain name, as far as they are the container's own to set. In a host name shared with the pod they are
/// the pod's, set with the sandbox.
pub(super) fn uts_names(
    spec: &oci::Spec,
    namespaces: &NamespacePlan,
) -> Result<(Option<CString>, Option<CString>)> {
    let name = |field: &str, name: &Option<String>| -> Result<Option<CString>> {
        let Some(name) = name.as_ref().filter(|name| !name.is_empty()) else {
            return Ok(None);
        };
        if name.len() > 64 {
            return Err(Error::invalid(field, "is longer than 64 bytes"));
        }
        c_string(field, name.as_bytes()).map(Some)
    };
    let names = (
        name("hostname", spec.hostname())?,
        name("domainname", spec.domainname())?,
    );
    Ok(if namespaces.makes(libc::CLONE_NEWUTS) {
        names
    } else {
        (None, None)
    })
}

/// The spec's sysctls as files below /proc/sys. Only those that a namespace of the pod bounds: every other would
/// change the guest under its siblings.
pub(super) fn sysctls(linux: &oci::Linux) -> Result<Vec<(CString, CString)>> {
    let mut result = Vec::new();
    for (name, value) in linux.sysctl().iter().flatten() {
        let path = if name.contains('/') {
            name.clone()
        } else {
            name.replace('.', "/")
        };
        let plain = path
            .split('/')
            .all(|part| !part.is_empty() && part != "." && part != "..");
        if !plain || !is_namespaced(&path) {
            return Err(Error::invalid(
                "linux.sysctl",
                format!("{name:?} is not bounded by a namespace of the pod"),
            ));
        }
        result.push((
            c_string("linux.sysctl", format!("/proc/sys/{path}").as_bytes())?,
            c_string("linux.sysctl", value.as_bytes())?,
        ));
    }
    Ok(result)
}

fn is_namespaced(path: &str) -> bool {
    const IPC: [&str; 8] = [
        "kernel/msgmax",
        "kernel/msgmnb",
        "kernel/msgmni",
        "kernel/sem",
        "kernel/shmall",
        "kernel/shmmax",
        "kernel/shmmni",
        "kernel/shm_rmid_forced",
    ];
    path.starts_with("net/")
        || path.starts_with("fs/mqueue/")
        || path == "kernel/domainname"
        || IPC.contains(&path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_file_names() {
        for good in ["a", "web-1", "A_b+c.d"] {
            assert!(id(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            ".",
            "..",
            ".a",
            "a/b",
            "a b",
            "a\n",
            "é",
            &"x".repeat(201),
        ] {
            assert!(id(bad).is_err(), "{bad:?}");
        }
    }

    fn sysctls_of(json: &str) -> Result<Vec<(CString, CString)>> {
        sysctls(&serde_json::from_str(&format!(r#"{{"sysctl":{json}}}"#)).unwrap())
    }

    #[test]
    fn only_namespaced_sysctls() {
        let good = sysctls_of(r#"{"net.ipv4.ip_forward":"1"}"#).unwrap();
        assert_eq!(
            good,
            [(c"/proc/sys/net/ipv4/ip_forward".into(), c"1".into())]
        );
        assert!(sysctls_of(r#"{"net/ipv4/conf/eth0.1/forwarding":"1"}"#).is_ok());
        assert!(sysctls_of(r#"{"kernel.shmmax":"1"}"#).is_ok());
        for bad in [
            "kernel.core_pattern",
            "vm.overcommit_memory",
            "net..x",
            "net/../kernel/panic",
        ] {
            assert!(sysctls_of(&format!(r#"{{"{bad}":"1"}}"#)).is_err(), "{bad}");
        }
    }

    fn process_of(extra: &str) -> Result<()> {
        let json = format!(r#"{{"user":{{}},"args":["x"],"cwd":"/"{extra}}}"#);
        process(&serde_json::from_str(&json).unwrap())
    }

    #[test]
    fn processes_with_contradictions_are_refused() {
        assert!(process_of("").is_ok());
        for bad in [
            r#","oomScoreAdj":1001"#,
            r#","apparmorProfile":"x""#,
            r#","rlimits":[{"type":"RLIMIT_NOFILE","soft":2,"hard":1}]"#,
            r#","rlimits":[{"type":"RLIMIT_CPU","soft":1,"hard":1},{"type":"RLIMIT_CPU","soft":1,"hard":1}]"#,
        ] {
            assert!(process_of(bad).is_err(), "{bad}");
        }
    }
}
