//! `-info`: what the runtime is and what it can do, for containerd 2 (and by it for kubelet: user namespaces, recursive
//! read-only mounts).

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use oci_spec::runtime::{Features, IDMap, LinuxFeature, LinuxNamespaceType, MountExtensions};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};

use crate::sandbox::Error;

/// The type of the OCI runtime's features, as containerd registers it.
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";
/// The mount options that a container's mounts may have and that are no file system's own.
const MOUNT_OPTIONS: [&str; 32] = [
    "async",
    "atime",
    "bind",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "nosuid",
    "private",
    "rbind",
    "relatime",
    "ro",
    "rnodev",
    "rnoexec",
    "rnosuid",
    "rprivate",
    "rro",
    "rrw",
    "rslave",
    "rw",
    "slave",
    "strictatime",
    "suid",
    "sync",
    "unbindable",
    "runbindable",
    "nosymfollow",
];

/// The encoded RuntimeInfo.
///
/// # Errors
/// It cannot be encoded.
pub fn encode() -> Result<Vec<u8>, Error> {
    let action = "encoding the runtime's description";
    let value = serde_json::to_vec(&features())
        .map_err(|e| Error::host(action, std::io::Error::other(e)))?;
    let info = RuntimeInfo {
        name: super::NAME.to_owned(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        }),
        features: MessageField::some(Any {
            type_url: FEATURES.to_owned(),
            value,
            ..Default::default()
        }),
        ..Default::default()
    };
    info.write_to_bytes().map_err(|e| Error::host(action, e))
}

fn features() -> Features {
    use LinuxNamespaceType as Namespace;
    let mut idmap = IDMap::default();
    // By the host, in sandbox::volume.
    idmap.set_enabled(Some(true));
    let mut mounts = MountExtensions::default();
    mounts.set_idmap(Some(idmap));
    let mut linux = LinuxFeature::default();
    linux.set_mount_extensions(Some(mounts));
    linux.set_namespaces(Some(vec![
        Namespace::Cgroup,
        Namespace::Ipc,
        Namespace::Mount,
        Namespace::Network,
        Namespace::Pid,
        Namespace::User,
        Namespace::Uts,
    ]));
    let mut features = Features::default();
    features.set_oci_version_min("1.0.0".to_owned());
    features.set_oci_version_max("1.2.0".to_owned());
    // They name the host's programs.
    features.set_hooks(Some(Vec::new()));
    features.set_mount_options(Some(MOUNT_OPTIONS.map(str::to_owned).to_vec()));
    features.set_linux(Some(linux));
    features
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containerd_finds_what_it_asks_for() {
        let info = RuntimeInfo::parse_from_bytes(&encode().unwrap()).unwrap();
        assert_eq!(info.name, "io.containerd.cella.v2");
        assert_eq!(info.features.type_url, FEATURES);
        let features: serde_json::Value = serde_json::from_slice(&info.features.value).unwrap();
        assert_eq!(
            features["linux"]["mountExtensions"]["idmap"]["enabled"],
            true
        );
        let list = |value: &serde_json::Value| value.as_array().unwrap().clone();
        assert!(list(&features["linux"]["namespaces"]).contains(&"user".into()));
        assert!(list(&features["mountOptions"]).contains(&"rro".into()));
    }
}
