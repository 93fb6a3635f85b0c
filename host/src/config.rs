//! The configuration: `/etc/cella/config.toml` and, after it, `config.d/*.toml` beside it in the order of their names.
//! Every key is optional; a later file's key wins, and a flag wins over all.

use std::path::{Path, PathBuf};
use std::{fs, io};

use serde::Deserialize;

use crate::error::ErrorKind;
use crate::paths::Paths;
use crate::size;

const DEFAULT: &str = "/etc/cella/config.toml";
/// The largest configuration file that is read, bytes.
const MAX_FILE: u64 = 1 << 20;

/// What the configuration says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// `auto`, `kvm` or `qemu`.
    pub hypervisor: String,
    /// Guest RAM of a sandbox, bytes.
    pub memory_bytes: u64,
    /// Virtual CPUs of a sandbox.
    pub cpus: u32,
    /// Words added to the guest kernel's command line.
    pub kernel_params: String,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            hypervisor: "auto".into(),
            memory_bytes: 256 << 20,
            cpus: 1,
            kernel_params: String::new(),
        }
    }
}

/// One file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    hypervisor: Option<String>,
    memory: Option<String>,
    cpus: Option<u32>,
    kernel_params: Option<String>,
}

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error("reading configuration {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file is no configuration.
    #[error("configuration {}: {reason}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// Why, on one line.
        reason: String,
    },
}

impl Error {
    /// The kind of this failure.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Read { source, .. } => ErrorKind::from(source),
            Self::Content { .. } => ErrorKind::InvalidArgument,
        }
    }
}

impl Config {
    /// Reads the configuration. The default file may be missing, a named one may not.
    ///
    /// # Errors
    /// A file cannot be read, has an unknown key or a wrong value.
    pub fn load(paths: &Paths) -> Result<Self, Error> {
        let named = paths.config.as_deref();
        let main = named.unwrap_or(Path::new(DEFAULT));
        let mut config = Self::default();
        if named.is_some() || main.exists() {
            config.apply(main)?;
        }
        let mut drop_ins: Vec<PathBuf> = main
            .parent()
            .and_then(|dir| fs::read_dir(dir.join("config.d")).ok())
            .into_iter()
            .flatten()
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| {
                path.extension()
                    .is_some_and(|extension| extension == "toml")
            })
            .collect();
        drop_ins.sort();
        for path in drop_ins {
            config.apply(&path)?;
        }
        Ok(config)
    }

    fn apply(&mut self, path: &Path) -> Result<(), Error> {
        let read = |source| Error::Read {
            path: path.into(),
            source,
        };
        let content = |reason: String| Error::Content {
            path: path.into(),
            reason: reason.trim_end().replace('\n', " "),
        };
        if fs::metadata(path).map_err(read)?.len() > MAX_FILE {
            return Err(content("the file is larger than 1 MiB".into()));
        }
        let text = fs::read_to_string(path).map_err(read)?;
        let file: File = toml::from_str(&text).map_err(|e| content(e.to_string()))?;
        if let Some(hypervisor) = file.hypervisor {
            if !["auto", "kvm", "qemu"].contains(&hypervisor.as_str()) {
                return Err(content(format!(
                    "hypervisor '{hypervisor}' is none of auto, kvm, qemu"
                )));
            }
            self.hypervisor = hypervisor;
        }
        if let Some(memory) = file.memory {
            self.memory_bytes = size::parse(&memory).map_err(|e| content(e.to_string()))?;
        }
        if let Some(cpus) = file.cpus {
            self.cpus = cpus;
        }
        if let Some(params) = file.kernel_params {
            self.kernel_params = params;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(config: &Path) -> Paths {
        Paths {
            run_dir: "/nonexistent".into(),
            lib_dir: "/nonexistent".into(),
            libexec_dir: "/nonexistent".into(),
            qemu: "/nonexistent".into(),
            config: Some(config.into()),
        }
    }

    #[test]
    fn drop_ins_come_after_the_main_file() {
        let dir = tempfile::tempdir().unwrap();
        let main = dir.path().join("config.toml");
        fs::write(&main, "memory = \"128M\"\ncpus = 2\n").unwrap();
        fs::create_dir(dir.path().join("config.d")).unwrap();
        fs::write(dir.path().join("config.d/10.toml"), "cpus = 3").unwrap();
        fs::write(dir.path().join("config.d/20.toml"), "cpus = 4").unwrap();
        let config = Config::load(&paths(&main)).unwrap();
        assert_eq!((config.memory_bytes, config.cpus), (128 << 20, 4));
    }

    #[test]
    fn unknown_keys_and_wrong_values_name_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let main = dir.path().join("config.toml");
        for text in [
            "memry = \"1G\"",
            "memory = \"lots\"",
            "hypervisor = \"xen\"",
            "cpus = -1",
            "=",
        ] {
            fs::write(&main, text).unwrap();
            let error = Config::load(&paths(&main)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{text}");
            let message = error.to_string();
            assert!(
                message.contains("config.toml") && !message.contains('\n'),
                "{message}"
            );
        }
        assert!(Config::load(&paths(&dir.path().join("none"))).is_err());
    }
}
