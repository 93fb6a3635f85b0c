//! The bundle that containerd made for a container: its specification, and whose pod it is in.

use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;
use sha2::{Digest, Sha256};

use super::error::refuse;
use crate::error::ErrorKind;
use crate::paths::Paths;
use crate::sandbox::Error;
use crate::sandbox::dir::SandboxDir;

/// Whether a container is a pod's sandbox (`sandbox`) or in one (`container`).
const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
/// The id of the pod's sandbox container.
const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";
/// The largest `config.json` that is read, bytes.
const MAX_CONFIG: u64 = 8 << 20;

/// What a container is to its sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// It has a sandbox of its own, as with `ctr run`.
    Alone,
    /// It stands for a pod's sandbox: Kubernetes' pause container.
    Sandbox,
    /// It is in the pod of this sandbox container.
    Member(String),
}

impl Role {
    /// From the specification's annotations.
    pub fn of(spec: &Spec) -> Self {
        let annotation = |key: &str| spec.annotations().as_ref()?.get(key).cloned();
        match (
            annotation(CONTAINER_TYPE).as_deref(),
            annotation(SANDBOX_ID),
        ) {
            (Some("sandbox"), _) => Self::Sandbox,
            (Some("container"), Some(sandbox)) => Self::Member(sandbox),
            _ => Self::Alone,
        }
    }

    /// The id that names the shim of container `id`.
    pub fn group<'a>(&'a self, id: &'a str) -> &'a str {
        match self {
            Self::Member(sandbox) => sandbox,
            Self::Alone | Self::Sandbox => id,
        }
    }
}

/// Reads the specification of a bundle.
///
/// # Errors
/// `NotFound`: there is none. `InvalidArgument`: it is none.
pub fn read_spec(bundle: &Path) -> Result<Spec, Error> {
    let path = bundle.join("config.json");
    let action = || format!("reading {}", path.display());
    let meta = std::fs::metadata(&path).map_err(|e| Error::host(action(), e))?;
    if meta.len() > MAX_CONFIG {
        return Err(refuse(
            ErrorKind::InvalidArgument,
            format!("{}: {} bytes are too many", action(), meta.len()),
        ));
    }
    let text = std::fs::read(&path).map_err(|e| Error::host(action(), e))?;
    serde_json::from_slice(&text)
        .map_err(|e| refuse(ErrorKind::InvalidArgument, format!("{}: {e}", action())))
}

/// The directory of the sandbox of `group` in a containerd namespace.
///
/// # Errors
/// `InvalidArgument`: the name would be no id.
pub fn sandbox_dir(paths: &Paths, namespace: &str, group: &str) -> Result<SandboxDir, Error> {
    SandboxDir::new(paths, &sandbox_id(namespace, group))
}

/// A sandbox's id on this host: short, because sockets' paths are; told apart by a hash, because ids are unique
/// within a namespace only.
fn sandbox_id(namespace: &str, group: &str) -> String {
    let hash = Sha256::digest(format!("{namespace}/{group}"));
    let hash: String = hash
        .iter()
        .take(6)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let head: String = group.chars().take(16).collect();
    format!("{head}-{hash}")
}

/// The socket of the shim of `group`, for a containerd at `address`.
pub fn socket(address: &str, namespace: &str, group: &str) -> PathBuf {
    let name = Path::new(address).join(namespace).join(group);
    let hash = Sha256::digest(name.as_os_str().as_encoded_bytes());
    let hash: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    Path::new("/run/containerd/s").join(hash)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(annotations: &[(&str, &str)]) -> Spec {
        let mut spec = Spec::default();
        let annotations = annotations
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        spec.set_annotations(Some(annotations.collect()));
        spec
    }

    #[test]
    fn containers_of_a_pod_share_its_shim() {
        let alone = Role::of(&spec(&[]));
        assert_eq!((alone.group("c"), &alone), ("c", &Role::Alone));
        let sandbox = Role::of(&spec(&[(CONTAINER_TYPE, "sandbox"), (SANDBOX_ID, "p")]));
        assert_eq!((sandbox.group("p"), &sandbox), ("p", &Role::Sandbox));
        let member = Role::of(&spec(&[(CONTAINER_TYPE, "container"), (SANDBOX_ID, "p")]));
        assert_eq!(member.group("c"), "p");
        assert_eq!(socket("/a", "n", "p"), socket("/a", "n", member.group("c")));
        assert_ne!(socket("/a", "n", "p"), socket("/b", "n", "p"));
    }

    #[test]
    fn sandbox_ids_are_short_and_differ_between_namespaces() {
        let long = "f".repeat(64);
        let (a, b) = (sandbox_id("k8s.io", &long), sandbox_id("moby", &long));
        assert_ne!(a, b);
        assert!(a.len() <= 32 && a.starts_with("ffff"), "{a}");
        assert!(crate::paths::is_valid_id(&sandbox_id("n", "x")));
    }
}
