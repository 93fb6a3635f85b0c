//! What a sandbox shall be: the configuration, containerd's options for the runtime, `io.cella.*` annotations and the
//! pod's own limits, each over the one before.

use std::collections::HashMap;
use std::path::PathBuf;

use oci_spec::runtime::{Linux, LinuxNamespaceType, Spec};
use protobuf::CodedInputStream;
use protobuf::well_known_types::any::Any;

use super::bundle::Role;
use super::error::refuse;
use crate::config::{self, Config};
use crate::error::ErrorKind;
use crate::paths::Paths;
use crate::sandbox::{Error, SandboxSpec};

/// The pod's memory limit in bytes, as containerd's CRI plugin writes it on the sandbox container.
pub const SANDBOX_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
/// Its CPU limit: microseconds a period.
pub const SANDBOX_CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
/// The period, microseconds.
pub const SANDBOX_CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
/// The type of the options that are for this runtime.
pub const OPTIONS: &str = "runtimeoptions.v1.Options";
/// Linux's default CFS period, microseconds.
const DEFAULT_PERIOD: i64 = 100_000;
/// CPUs of a sandbox at most.
const MAX_CPUS: u64 = 32;
/// The smallest guest memory that is worth booting, and the largest that makes sense, bytes.
const MIN_MEMORY: u64 = 128 << 20;
const MAX_MEMORY: u64 = 1 << 42;

/// The configuration of the host.
///
/// # Errors
/// A file cannot be read or is wrong.
pub fn load(paths: &Paths) -> Result<Config, Error> {
    Config::load(paths).map_err(|e| from_config(&e))
}

/// The configuration with containerd's options over it.
///
/// # Errors
/// The options, or the file that they name, are wrong.
pub fn with_options(paths: &Paths, options: Option<&Any>) -> Result<Config, Error> {
    let options = match options {
        Some(any) if any.type_url.ends_with(OPTIONS) => RuntimeOptions::parse(&any.value)?,
        // runc's options say how to run runc; others are not for a runtime at all.
        _ => RuntimeOptions::default(),
    };
    let mut config = match options.config_path {
        Some(path) => {
            let mut paths = paths.clone();
            paths.config = Some(path);
            load(&paths)?
        }
        None => load(paths)?,
    };
    if !options.config_body.is_empty() {
        config
            .apply_text("of the containerd runtime", &options.config_body)
            .map_err(|e| from_config(&e))?;
    }
    Ok(config)
}

/// containerd's `runtimeoptions.v1.Options`.
#[derive(Debug, Default)]
struct RuntimeOptions {
    config_path: Option<PathBuf>,
    config_body: String,
}

impl RuntimeOptions {
    fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let wrong = |e: &dyn std::fmt::Display| {
            refuse(
                ErrorKind::InvalidArgument,
                format!("reading the runtime options: {e}"),
            )
        };
        let mut options = Self::default();
        let mut input = CodedInputStream::from_bytes(bytes);
        // Each field is a number and a wire type; 2 is "length-delimited".
        while let Some(tag) = input.read_raw_tag_or_eof().map_err(|e| wrong(&e))? {
            match (tag >> 3, tag & 7) {
                (2, 2) => {
                    let path = input.read_string().map_err(|e| wrong(&e))?;
                    options.config_path = (!path.is_empty()).then(|| path.into());
                }
                (3, 2) => {
                    let body = input.read_bytes().map_err(|e| wrong(&e))?;
                    options.config_body = String::from_utf8(body).map_err(|e| wrong(&e))?;
                }
                (_, 2) => drop(input.read_bytes().map_err(|e| wrong(&e))?),
                (_, 0) => drop(input.read_raw_varint64().map_err(|e| wrong(&e))?),
                (field, kind) => {
                    return Err(wrong(&format!("field {field} has wire type {kind}")));
                }
            }
        }
        Ok(options)
    }
}

/// What the sandbox of a container shall be.
///
/// # Errors
/// `InvalidArgument`: an annotation that there is not, that may not be used, or of a wrong value.
/// `Unimplemented`: a namespace of the host's that a virtual machine cannot be in.
pub fn sandbox(
    mut config: Config,
    group: &str,
    role: &Role,
    spec: &Spec,
) -> Result<SandboxSpec, Error> {
    let annotations = spec.annotations().clone().unwrap_or_default();
    let limits = match role {
        Role::Alone => Limits::of_container(spec),
        Role::Sandbox | Role::Member(_) => Limits::of_pod(&annotations)?,
    };
    limits.apply(&mut config);
    config.annotate(&annotations).map_err(|e| from_config(&e))?;
    if !(MIN_MEMORY / 2..=MAX_MEMORY).contains(&config.memory_bytes) {
        return Err(refuse(
            ErrorKind::InvalidArgument,
            format!(
                "a sandbox's memory is 64 MiB to 4 TiB, not {} bytes",
                config.memory_bytes
            ),
        ));
    }
    if !(1..=MAX_CPUS).contains(&u64::from(config.cpus)) {
        return Err(refuse(
            ErrorKind::InvalidArgument,
            format!("a sandbox has 1 to {MAX_CPUS} CPUs, not {}", config.cpus),
        ));
    }
    let hostname = spec.hostname().clone().filter(|name| !name.is_empty());
    let linux = spec.linux().as_ref();
    Ok(SandboxSpec {
        pod: *role != Role::Alone,
        vcpus: config.cpus,
        memory_bytes: config.memory_bytes,
        hostname: hostname.unwrap_or_else(|| group.chars().take(12).collect()),
        sysctls: linux
            .and_then(|linux| linux.sysctl().clone())
            .unwrap_or_default(),
        cmdline: config.kernel_params,
        console: None,
        template: config.template,
        pool: config.pool > 0,
        netns: linux.and_then(netns),
        // Whoever makes containers brings their resolv.conf among their mounts.
        resolv_conf: String::new(),
        disks: Vec::new(),
    })
}

/// The network namespace that is to be joined; one that is to be made has nothing in it.
fn netns(linux: &Linux) -> Option<PathBuf> {
    let namespaces = linux.namespaces().iter().flatten();
    let mut networks = namespaces.filter(|one| one.typ() == LinuxNamespaceType::Network);
    networks.find_map(|one| one.path().clone())
}

/// What the workload may use at most.
#[derive(Debug, Default, PartialEq, Eq)]
struct Limits {
    /// Bytes.
    memory: Option<u64>,
    /// Whole CPUs.
    cpus: Option<u32>,
}

impl Limits {
    fn of_container(spec: &Spec) -> Self {
        let resources = spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.resources().as_ref());
        let memory = resources
            .and_then(|resources| resources.memory().as_ref()?.limit())
            .and_then(|limit| u64::try_from(limit).ok());
        let cpu = resources.and_then(|resources| resources.cpu().as_ref());
        let quota = cpu.and_then(|cpu| cpu.quota()).unwrap_or(0);
        let period = cpu.and_then(|cpu| cpu.period()).unwrap_or(0);
        Self {
            memory: memory.filter(|limit| *limit > 0),
            cpus: cpus(quota, i64::try_from(period).unwrap_or(0)),
        }
    }

    fn of_pod(annotations: &HashMap<String, String>) -> Result<Self, Error> {
        let number = |key: &str| match annotations.get(key) {
            None => Ok(0),
            Some(text) => text.parse::<i64>().map_err(|_| {
                refuse(
                    ErrorKind::InvalidArgument,
                    format!("annotation {key}: '{text}' is no number"),
                )
            }),
        };
        let memory = u64::try_from(number(SANDBOX_MEMORY)?).unwrap_or(0);
        Ok(Self {
            memory: Some(memory).filter(|limit| *limit > 0),
            cpus: cpus(number(SANDBOX_CPU_QUOTA)?, number(SANDBOX_CPU_PERIOD)?),
        })
    }

    /// The virtual machine has what the workload may use and what the guest itself needs.
    fn apply(&self, config: &mut Config) {
        if let Some(memory) = self.memory {
            let whole = memory.saturating_add(config.overhead_bytes).max(MIN_MEMORY);
            let rounded = whole
                .checked_next_multiple_of(1 << 20)
                .unwrap_or(MAX_MEMORY);
            config.memory_bytes = rounded.min(MAX_MEMORY);
        }
        if let Some(cpus) = self.cpus {
            config.cpus = cpus;
        }
    }
}

/// CPUs that a quota of microseconds a period comes to; `None` without a limit.
fn cpus(quota: i64, period: i64) -> Option<u32> {
    let quota = u64::try_from(quota).ok().filter(|quota| *quota > 0)?;
    let period = u64::try_from(period).ok().filter(|period| *period > 0);
    let period = period.unwrap_or(DEFAULT_PERIOD.unsigned_abs());
    u32::try_from(quota.div_ceil(period).clamp(1, MAX_CPUS)).ok()
}

fn from_config(error: &config::Error) -> Error {
    refuse(error.kind(), error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(annotations: &[(&str, &str)]) -> Result<SandboxSpec, Error> {
        let mut spec = Spec::default();
        let annotations = annotations
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        spec.set_annotations(Some(annotations.collect()));
        sandbox(Config::default(), "pod", &Role::Sandbox, &spec)
    }

    #[test]
    fn a_pod_gets_its_limits_and_the_guests_overhead() {
        let plain = pod(&[]).unwrap();
        assert_eq!((plain.memory_bytes, plain.vcpus), (256 << 20, 1));
        let limited = pod(&[
            (SANDBOX_MEMORY, "1073741824"),
            (SANDBOX_CPU_QUOTA, "250000"),
            (SANDBOX_CPU_PERIOD, "100000"),
        ])
        .unwrap();
        assert_eq!(
            (limited.memory_bytes, limited.vcpus),
            ((1 << 30) + (64 << 20), 3)
        );
        // No limit in Kubernetes' words.
        let unlimited = pod(&[(SANDBOX_MEMORY, "0"), (SANDBOX_CPU_QUOTA, "-1")]).unwrap();
        assert_eq!((unlimited.memory_bytes, unlimited.vcpus), (256 << 20, 1));
        let huge = pod(&[(SANDBOX_MEMORY, "9223372036854775807")]).unwrap();
        assert_eq!(huge.memory_bytes, MAX_MEMORY);
        assert!(pod(&[(SANDBOX_MEMORY, "much")]).is_err());
    }

    #[test]
    fn annotations_win_where_they_are_allowed() {
        let spec = pod(&[("io.cella.memory", "512M"), (SANDBOX_MEMORY, "1")]).unwrap();
        assert_eq!(spec.memory_bytes, 512 << 20);
        for (key, word) in [
            ("io.cella.memroy", "io.cella.memory"),
            ("io.cella.hypervisor", "allow"),
        ] {
            let error = pod(&[(key, "qemu")]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
            assert!(error.to_string().contains(word), "{error}");
        }
        assert!(pod(&[("io.cella.cpus", "99")]).is_err());
    }

    #[test]
    fn options_of_the_runtime_are_read() {
        // Fields 1 (type_url), 2 (config_path), 3 (config_body).
        let bytes = b"\x0a\x01t\x12\x06/x.tml\x1a\x08cpus = 2";
        let options = RuntimeOptions::parse(bytes).unwrap();
        assert_eq!(options.config_path, Some("/x.tml".into()));
        assert_eq!(options.config_body, "cpus = 2");
        for wrong in [&b"\x12\xff"[..], b"\x1a\x01\xff", b"\x15\0\0\0\0"] {
            assert!(RuntimeOptions::parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
