//! The configuration: `/etc/cella/config.toml` and, after it, `config.d/*.toml` beside it in the order of their names.
//! Every key is optional; a later file's key wins, and a flag wins over all.

use std::collections::HashMap;
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
    /// Sandboxes are cloned from templates.
    pub template: bool,
    /// What templates may take on disk, bytes.
    pub template_limit: u64,
    /// How many idle clones wait for sandboxes of this file's own shape.
    pub pool: u32,
    /// What the guest itself needs beside a pod's memory limit, bytes.
    pub overhead_bytes: u64,
    /// The keys of this file that a pod's `io.cella.*` annotations may set.
    pub annotations: Vec<String>,
}

/// The environment variable that says whether sandboxes are cloned from templates, `true` or `false`, over every file: for
/// tests and measurements.
const TEMPLATE_VARIABLE: &str = "CELLA_TEMPLATE";
/// The most idle clones.
const MAX_POOL: u32 = 256;
/// The prefix of annotations that set a key of the configuration for one pod.
pub const ANNOTATION: &str = "io.cella.";
/// The keys of a configuration file.
const KEYS: [&str; 9] = [
    "hypervisor",
    "memory",
    "cpus",
    "kernel_params",
    "overhead",
    "annotations",
    "template",
    "template_limit",
    "pool",
];
/// The keys that make sense for one pod.
const POD_KEYS: [&str; 4] = ["hypervisor", "memory", "cpus", "kernel_params"];

impl Default for Config {
    fn default() -> Self {
        Self {
            hypervisor: "auto".into(),
            memory_bytes: 256 << 20,
            cpus: 1,
            kernel_params: String::new(),
            template: true,
            template_limit: 4 << 30,
            pool: 0,
            overhead_bytes: 64 << 20,
            annotations: vec!["memory".into(), "cpus".into()],
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
    overhead: Option<String>,
    template: Option<bool>,
    template_limit: Option<String>,
    pool: Option<u32>,
    annotations: Option<Vec<String>>,
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
    #[error("configuration {name}: {reason}")]
    Content {
        /// Its name.
        name: String,
        /// Why, on one line.
        reason: String,
    },
    /// An annotation cannot be used.
    #[error("annotation {key}: {reason}")]
    Annotation {
        /// The annotation.
        key: String,
        /// Why, on one line.
        reason: String,
    },
}

impl Error {
    /// The kind of this failure.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Read { source, .. } => ErrorKind::from(source),
            Self::Content { .. } | Self::Annotation { .. } => ErrorKind::InvalidArgument,
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
        if let Ok(value) = std::env::var(TEMPLATE_VARIABLE)
            && !value.is_empty()
        {
            config.apply_text(TEMPLATE_VARIABLE, &format!("template = {value}"))?;
        }
        Ok(config)
    }

    fn apply(&mut self, path: &Path) -> Result<(), Error> {
        let read = |source| Error::Read {
            path: path.into(),
            source,
        };
        let name = path.display().to_string();
        if fs::metadata(path).map_err(read)?.len() > MAX_FILE {
            return Err(Error::Content {
                name,
                reason: "the file is larger than 1 MiB".into(),
            });
        }
        let text = fs::read_to_string(path).map_err(read)?;
        self.apply_text(&name, &text)
    }

    /// Applies a configuration's text; `name` says in errors where it is from.
    ///
    /// # Errors
    /// It has an unknown key or a wrong value.
    pub fn apply_text(&mut self, name: &str, text: &str) -> Result<(), Error> {
        self.set(text).map_err(|reason| Error::Content {
            name: name.to_owned(),
            reason: reason.trim_end().replace('\n', " "),
        })
    }

    /// Applies a pod's `io.cella.*` annotations: `io.cella.memory` sets `memory`, if `annotations` allows it.
    ///
    /// # Errors
    /// [`Error::Annotation`]: there is no such key, it is not allowed, or its value is wrong.
    pub fn annotate(&mut self, annotations: &HashMap<String, String>) -> Result<(), Error> {
        for (annotation, value) in annotations {
            let Some(key) = annotation.strip_prefix(ANNOTATION) else {
                continue;
            };
            let set = self.annotate_one(&key.replace('-', "_"), value);
            set.map_err(|reason| Error::Annotation {
                key: annotation.clone(),
                reason: reason.trim_end().replace('\n', " "),
            })?;
        }
        Ok(())
    }

    fn annotate_one(&mut self, key: &str, value: &str) -> Result<(), String> {
        if !POD_KEYS.contains(&key) {
            let near = nearest(key, &POD_KEYS);
            return Err(format!("there is none; did you mean {ANNOTATION}{near}?"));
        }
        if !self.annotations.iter().any(|allowed| allowed == key) {
            return Err(format!(
                "the host does not allow it: add \"{key}\" to `annotations` in its configuration"
            ));
        }
        let value = match key {
            "cpus" => value.to_owned(),
            _ => toml::Value::from(value).to_string(),
        };
        self.set(&format!("{key} = {value}"))
    }

    /// Sets what a TOML text sets, or says why not.
    fn set(&mut self, text: &str) -> Result<(), String> {
        let table: toml::Table = toml::from_str(text).map_err(|e| e.to_string())?;
        if let Some(key) = table.keys().find(|key| !KEYS.contains(&key.as_str())) {
            let near = nearest(key, &KEYS);
            return Err(format!("there is no key '{key}'; did you mean '{near}'?"));
        }
        let file: File = toml::from_str(text).map_err(|e| e.to_string())?;
        if let Some(hypervisor) = file.hypervisor {
            if !["auto", "kvm", "qemu"].contains(&hypervisor.as_str()) {
                return Err(format!(
                    "hypervisor '{hypervisor}' is none of auto, kvm, qemu"
                ));
            }
            self.hypervisor = hypervisor;
        }
        if let Some(memory) = file.memory {
            self.memory_bytes = size::parse(&memory).map_err(|e| e.to_string())?;
        }
        if let Some(overhead) = file.overhead {
            self.overhead_bytes = size::parse(&overhead).map_err(|e| e.to_string())?;
        }
        if let Some(template) = file.template {
            self.template = template;
        }
        if let Some(limit) = file.template_limit {
            self.template_limit = size::parse(&limit).map_err(|e| e.to_string())?;
        }
        if let Some(pool) = file.pool {
            if pool > MAX_POOL {
                return Err(format!("pool: {pool} are more than {MAX_POOL}"));
            }
            self.pool = pool;
        }
        if let Some(cpus) = file.cpus {
            self.cpus = cpus;
        }
        if let Some(params) = file.kernel_params {
            self.kernel_params = params;
        }
        if let Some(annotations) = file.annotations {
            if let Some(key) = annotations
                .iter()
                .find(|key| !POD_KEYS.contains(&key.as_str()))
            {
                let near = nearest(key, &POD_KEYS);
                return Err(format!(
                    "annotations: '{key}' is none; did you mean '{near}'?"
                ));
            }
            self.annotations = annotations;
        }
        Ok(())
    }
}

/// The one of `words` that takes the fewest changes of a letter to be `word`.
fn nearest<'a>(word: &str, words: &[&'a str]) -> &'a str {
    let mut words = words.iter();
    let first = words.next().copied().unwrap_or_default();
    words.fold(first, |best, candidate| {
        if distance(word, candidate) < distance(word, best) {
            candidate
        } else {
            best
        }
    })
}

/// Levenshtein's distance in bytes, of the first 64.
fn distance(a: &str, b: &str) -> usize {
    let (a, b) = (a.as_bytes().iter().take(64), b.as_bytes());
    let mut row: Vec<usize> = (0..=b.len().min(64)).collect();
    for (i, x) in a.enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        for (above, y) in row.iter_mut().skip(1).zip(b) {
            let here = (diagonal + usize::from(x != y))
                .min(left + 1)
                .min(*above + 1);
            diagonal = std::mem::replace(above, here);
            left = here;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.last().copied().unwrap_or(0)
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
            "pool = 257",
            "template_limit = \"much\"",
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
        fs::write(&main, "memry = \"1G\"").unwrap();
        let message = Config::load(&paths(&main)).unwrap_err().to_string();
        assert!(message.contains("'memory'"), "{message}");
    }

    #[test]
    fn the_nearest_word_takes_the_fewest_changes() {
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("abc", "abc"), 0);
        assert_eq!(nearest("cpu", &KEYS), "cpus");
        assert_eq!(nearest("kernel-params", &KEYS), "kernel_params");
    }
}
