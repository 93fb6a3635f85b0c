//! VM exits of a cold boot on KVM, counted by our VMM.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::Error;
use super::count::said;

/// What `cella bench boot` says.
#[derive(Clone, Debug)]
pub struct Exits {
    /// By reason, those that occurred.
    pub exits: BTreeMap<String, u64>,
    /// When each phase began and how long it took, in microseconds: this host's, and this minute's.
    pub timeline: Value,
}

impl Exits {
    /// Boots a sandbox of the usual shape with directories of its own, built by `make` in `root`.
    ///
    /// # Errors
    /// [`Error::Missing`] without KVM; others where it failed.
    pub fn measure(root: &Path) -> Result<Self, Error> {
        let kvm = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/kvm");
        kvm.map_err(|error| Error::Missing(format!("VM exits: a usable /dev/kvm ({error})")))?;
        let cella = root.join("target/release/cella");
        if !cella.exists() {
            return Err(Error::Missing(format!("{} (make build)", cella.display())));
        }
        let dir = tempfile::tempdir().map_err(Error::system("making", "a directory"))?;
        let config = dir.path().join("config.toml");
        fs::write(&config, "").map_err(Error::system("writing", config.display()))?;
        let mut bench = Command::new(&cella);
        bench
            .args([
                "bench",
                "boot",
                "--hypervisor",
                "kvm",
                "--memory",
                "128M",
                "--cpus",
                "1",
                "--json",
            ])
            .env("CELLA_RUN_DIR", dir.path().join("run"))
            .env("CELLA_LIB_DIR", dir.path().join("lib"))
            .env("CELLA_CONFIG", config)
            .env("CELLA_LIBEXEC_DIR", root.join("target/libexec"));
        Self::parse(&said(&mut bench, "cella bench boot")?)
    }

    fn parse(text: &str) -> Result<Self, Error> {
        let value: Value = serde_json::from_str(text)
            .map_err(|error| Error::Count(format!("cella bench boot said {text:?}: {error}")))?;
        let exits = value.get("exits").and_then(Value::as_object);
        let exits = exits.ok_or_else(|| Error::Count(format!("no exits in {text:?}")))?;
        let exits = exits.iter().filter_map(|(name, count)| {
            Some((name.clone(), count.as_u64().filter(|count| *count > 0)?))
        });
        Ok(Self {
            exits: exits.collect(),
            timeline: value.get("phases").cloned().unwrap_or_default(),
        })
    }

    /// All of them.
    pub fn total(&self) -> u64 {
        self.exits.values().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_that_did_not_occur_are_left_out() {
        let exits = Exits::parse(
            r#"{"vm_exits":5,"exits":{"mmio_read":3,"io_in":0,"intr":2},"phases":[]}"#,
        )
        .unwrap();
        assert_eq!(exits.total(), 5);
        assert_eq!(exits.exits.len(), 2);
        assert!(Exits::parse("{}").is_err() && Exits::parse("no").is_err());
    }
}
