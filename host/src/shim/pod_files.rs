//! The files in /etc that a pod's containers share, where containerd leaves them to the shim.

use std::fmt::Write as _;
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};

use cella_proto::pod_sandbox::PodSandboxConfig;
use oci_spec::runtime::{Mount, Spec};

use crate::sandbox::Error;

/// Their contents.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodFiles {
    hostname: String,
    resolv_conf: Option<String>,
}

impl PodFiles {
    /// What a pod's configuration asks for.
    pub fn of(config: &PodSandboxConfig) -> Self {
        let dns = config.dns_config.get_or_default();
        let mut text = String::new();
        // Writing to a String cannot fail.
        if !dns.searches.is_empty() {
            let _ = writeln!(text, "search {}", dns.searches.join(" "));
        }
        for server in &dns.servers {
            let _ = writeln!(text, "nameserver {server}");
        }
        if !dns.options.is_empty() {
            let _ = writeln!(text, "options {}", dns.options.join(" "));
        }
        Self {
            hostname: config.hostname.clone(),
            resolv_conf: config.dns_config.is_some().then_some(text),
        }
    }

    /// Adds a mount of each file that `spec` does not mount already; the files are made in `dir`.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn add(&self, dir: &Path, spec: &mut Spec) -> Result<(), Error> {
        let resolv = match &self.resolv_conf {
            Some(text) => text.clone(),
            None => std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default(),
        };
        let hosts = std::fs::read_to_string("/etc/hosts")
            .unwrap_or_else(|_| "127.0.0.1 localhost\n::1 localhost\n".to_owned());
        let hostname = format!("{}\n", self.hostname);
        std::fs::create_dir_all(dir)
            .map_err(|e| Error::host(format!("making {}", dir.display()), e))?;
        for (name, text) in [
            ("hostname", hostname),
            ("hosts", hosts),
            ("resolv.conf", resolv),
        ] {
            let destination = Path::new("/etc").join(name);
            let mounts = spec.mounts().as_deref().unwrap_or_default();
            if mounts
                .iter()
                .any(|mount| *mount.destination() == destination)
            {
                continue;
            }
            let source = dir.join(name);
            let action = || format!("writing {}", source.display());
            match std::fs::File::create_new(&source) {
                Ok(mut file) => file
                    .write_all(text.as_bytes())
                    .map_err(|e| Error::host(action(), e))?,
                // The first container's: later ones share it.
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
                Err(e) => return Err(Error::host(action(), e)),
            }
            let mut mounts = mounts.to_vec();
            mounts.push(bind(source, destination));
            spec.set_mounts(Some(mounts));
        }
        Ok(())
    }
}

fn bind(source: PathBuf, destination: PathBuf) -> Mount {
    let mut mount = Mount::default();
    mount.set_source(Some(source));
    mount.set_destination(destination);
    mount.set_typ(Some("bind".into()));
    mount.set_options(Some(vec!["rbind".into(), "rprivate".into(), "rw".into()]));
    mount
}

#[cfg(test)]
mod tests {
    use super::*;
    use cella_proto::pod_sandbox::DNSConfig;

    #[test]
    fn containers_get_what_they_do_not_mount_themselves() {
        let config = PodSandboxConfig {
            hostname: "pod".into(),
            dns_config: protobuf::MessageField::some(DNSConfig {
                servers: vec!["10.0.0.1".into()],
                searches: vec!["a.b".into(), "c".into()],
                ..Default::default()
            }),
            ..Default::default()
        };
        let dir = tempfile::tempdir().unwrap();
        let mut spec = Spec::default();
        let own = bind("/var/lib/kubelet/hosts".into(), "/etc/hosts".into());
        spec.set_mounts(Some(vec![own.clone()]));
        PodFiles::of(&config).add(dir.path(), &mut spec).unwrap();
        let mounts = spec.mounts().clone().unwrap();
        assert_eq!(mounts.len(), 3);
        assert_eq!(mounts[0], own);
        let read = |name| std::fs::read_to_string(dir.path().join(name)).unwrap();
        assert_eq!(read("hostname"), "pod\n");
        assert_eq!(read("resolv.conf"), "search a.b c\nnameserver 10.0.0.1\n");
    }
}
