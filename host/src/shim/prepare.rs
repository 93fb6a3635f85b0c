//! What a container gets of the host before its guest hears of it: root file system, volumes, files in /etc.
//!
//! On a thread of its own for the time it takes: a volume may be on a server that does not answer, and nobody else of the
//! pod is to wait for it.

use std::path::PathBuf;

use containerd_shim_protos::types::mount::Mount;
use oci_spec::runtime::Spec;

use super::pod_files::PodFiles;
use super::{rootfs, spec};
use crate::sandbox::Error;
use crate::sandbox::dir::SandboxDir;

/// What is wanted of the host.
pub struct Wish {
    /// The sandbox's.
    pub dir: SandboxDir,
    /// The container's id.
    pub id: String,
    /// Where containerd has its bundle.
    pub bundle: PathBuf,
    /// The root file system.
    pub rootfs: Vec<Mount>,
    /// The bundle's specification.
    pub spec: Spec,
    /// Its first process has a terminal.
    pub terminal: bool,
    /// What the shim adds to /etc, where containerd leaves that to it.
    pub files: Option<PodFiles>,
}

/// What is ready on the host.
pub struct Prepared {
    /// The guest's specification.
    pub spec: Spec,
    /// The container is in the pod's own pid namespace.
    pub pod_pids: bool,
    /// What it has on the host.
    pub files: Files,
}

/// What a container has on the host. Removed when this is dropped, unless it is kept.
pub struct Files {
    dir: SandboxDir,
    id: String,
    kept: bool,
}

impl Wish {
    /// Prepares it.
    ///
    /// # Errors
    /// With the kind of the step that failed; nothing is left then.
    pub async fn fulfil(self) -> Result<Prepared, Error> {
        let what = format!("preparing the files of container {}", self.id);
        // If nobody waits for it any more, what it answers is dropped, and with that undone.
        tokio::task::spawn_blocking(move || self.fulfil_now())
            .await
            .map_err(|e| Error::host(what, std::io::Error::other(e)))?
    }

    fn fulfil_now(mut self) -> Result<Prepared, Error> {
        let files = Files {
            dir: self.dir.clone(),
            id: self.id.clone(),
            kept: false,
        };
        let share = self.dir.container_share(&self.id);
        std::fs::create_dir_all(&share)
            .map_err(|e| Error::host(format!("making {}", share.display()), e))?;
        let root = self.spec.root().as_ref().map(|root| root.path().clone());
        let bundled = self.bundle.join(root.unwrap_or_else(|| "rootfs".into()));
        let scratch = self.dir.path().join(format!("layers-{}", self.id));
        rootfs::mount(&self.rootfs, &bundled, &share.join("rootfs"), &scratch)?;
        if let Some(files) = &self.files {
            files.add(&self.dir.path().join("files"), &mut self.spec)?;
        }
        let pod_pids = spec::translate(&self.dir, &self.id, &mut self.spec, self.terminal)?;
        Ok(Prepared {
            spec: self.spec,
            pod_pids,
            files,
        })
    }
}

impl Files {
    /// Leaves them to whoever deletes the container.
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        if let Err(error) = self.dir.remove_container_files(&self.id) {
            tracing::warn!("removing what container {} has: {error}", self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_kept_goes() {
        let place = tempfile::tempdir().unwrap();
        let paths = crate::paths::Paths {
            run_dir: place.path().join("run"),
            ..crate::paths::Paths::from_environment()
        };
        let dir = SandboxDir::new(&paths, "pod").unwrap();
        let share = dir.container_share("c");
        let files = || Files {
            dir: dir.clone(),
            id: "c".into(),
            kept: false,
        };
        std::fs::create_dir_all(&share).unwrap();
        files().keep();
        assert!(share.exists());
        drop(files());
        assert!(!share.exists());
    }
}
