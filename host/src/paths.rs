//! Where things are on a host. Every path has a flag and an environment variable, so that a test or a work tree
//! needs no installation.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::ErrorKind;
use crate::sandbox::Error;

/// The directories and files that Cella uses on a host.
#[derive(Clone, Debug, Serialize, Deserialize, clap::Args)]
pub struct Paths {
    /// Sandboxes that exist: sockets, mounts, state
    #[arg(
        long,
        env = "CELLA_RUN_DIR",
        default_value = "/run/cella",
        global = true,
        value_name = "DIR",
        help_heading = "Paths"
    )]
    pub run_dir: PathBuf,
    /// Unpacked images and what containers write
    #[arg(
        long,
        env = "CELLA_LIB_DIR",
        default_value = "/var/lib/cella",
        global = true,
        value_name = "DIR",
        help_heading = "Paths"
    )]
    pub lib_dir: PathBuf,
    /// cella-vmm, the guest kernel (vmlinux) and the guest image (initrd.cpio)
    #[arg(
        long,
        env = "CELLA_LIBEXEC_DIR",
        default_value = "/usr/libexec/cella",
        global = true,
        value_name = "DIR",
        help_heading = "Paths"
    )]
    pub libexec_dir: PathBuf,
    /// QEMU, for --hypervisor qemu: a path, or a name that is looked up in PATH
    #[arg(
        long,
        env = "CELLA_QEMU",
        default_value = "qemu-system-x86_64",
        global = true,
        value_name = "FILE",
        help_heading = "Paths"
    )]
    pub qemu: PathBuf,
    /// Configuration file [default: /etc/cella/config.toml if it exists]
    #[arg(
        long,
        env = "CELLA_CONFIG",
        global = true,
        value_name = "FILE",
        help_heading = "Paths"
    )]
    pub config: Option<PathBuf>,
}

impl Paths {
    /// Those that the environment names, otherwise the defaults: for programs whose command line is not theirs to make.
    pub fn from_environment() -> Self {
        let path = |name, default| {
            std::env::var_os(name)
                .filter(|value| !value.is_empty())
                .map_or_else(|| PathBuf::from(default), PathBuf::from)
        };
        Self {
            run_dir: path("CELLA_RUN_DIR", "/run/cella"),
            lib_dir: path("CELLA_LIB_DIR", "/var/lib/cella"),
            libexec_dir: path("CELLA_LIBEXEC_DIR", "/usr/libexec/cella"),
            qemu: path("CELLA_QEMU", "qemu-system-x86_64"),
            config: std::env::var_os("CELLA_CONFIG").map(PathBuf::from),
        }
    }

    /// The VMM's binary.
    pub fn vmm(&self) -> PathBuf {
        self.libexec_dir.join("cella-vmm")
    }

    /// The guest kernel, an ELF vmlinux.
    pub fn kernel(&self) -> PathBuf {
        self.libexec_dir.join("vmlinux")
    }

    /// The guest image: an uncompressed cpio archive with the agent in it.
    pub fn initrd(&self) -> PathBuf {
        self.libexec_dir.join("initrd.cpio")
    }

    /// The directory of one sandbox.
    pub fn sandbox(&self, id: &str) -> PathBuf {
        self.run_dir.join(id)
    }

    /// Where the containers of a sandbox write: overlay upper directories.
    pub fn scratch(&self, id: &str) -> PathBuf {
        self.lib_dir.join("scratch").join(id)
    }
}

/// Whether `id` can name a sandbox or a container: 1 to 76 of `[a-zA-Z0-9_.-]`, the first a letter or a digit.
/// It becomes a path's component and, in the guest, a cgroup's.
pub fn is_valid_id(id: &str) -> bool {
    id.len() <= 76
        && id.starts_with(|first: char| first.is_ascii_alphanumeric())
        && id
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
}

/// Checks an id of a caller's.
///
/// # Errors
/// `InvalidArgument`: see [`is_valid_id`].
pub fn check_id(id: &str) -> Result<(), Error> {
    if is_valid_id(id) {
        return Ok(());
    }
    Err(Error::state(
        ErrorKind::InvalidArgument,
        format!(
            "'{id}' is no id: 1 to 76 letters, digits, '_', '.' or '-', the first a letter or a digit"
        ),
    ))
}

/// `path` with its directory, for messages and comparisons: as given where it cannot be resolved.
pub fn canonical(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_path_buf())
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// Everything below one directory.
    pub fn paths(dir: &Path) -> Paths {
        Paths {
            run_dir: dir.join("run"),
            lib_dir: dir.join("lib"),
            libexec_dir: dir.into(),
            qemu: dir.join("qemu"),
            config: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_could_leave_their_directory_are_refused() {
        for id in ["a", "demo", "0f.x-y_z", &"a".repeat(76)] {
            assert!(is_valid_id(id), "{id}");
        }
        for id in [
            "",
            ".",
            "..",
            "-x",
            "a/b",
            "a b",
            "ä",
            "a\0",
            &"a".repeat(77),
        ] {
            assert!(!is_valid_id(id), "{id}");
        }
    }
}
