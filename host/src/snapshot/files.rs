//! A snapshot's directory: written beside its place, and put there when it is whole.

use std::fs;
use std::path::{Path, PathBuf};

use super::{About, VERSION, refuse};
use crate::error::ErrorKind;
use crate::hypervisor::SavedVm;
use crate::own_files;
use crate::paths::is_valid_id;
use crate::sandbox::Error;
use crate::sandbox::state;

const ABOUT: &str = "about.json";

/// A snapshot on disk.
#[derive(Debug)]
pub struct Snapshot {
    /// Its directory.
    pub path: PathBuf,
    /// What was saved.
    pub about: About,
    pub(super) files: SavedVm,
}

/// A snapshot that is not whole yet. Dropping it removes it.
#[derive(Debug)]
pub(super) struct Draft {
    path: PathBuf,
    target: PathBuf,
    pub(super) files: SavedVm,
    whole: bool,
}

/// Opens the snapshot at `path`.
///
/// # Errors
/// There is none, somebody else could have written it, or it is of another version.
pub fn open(path: &Path) -> Result<Snapshot, Error> {
    let file = |e| Error::host(format!("opening the snapshot {}", path.display()), e);
    let meta = fs::symlink_metadata(path).map_err(file)?;
    own_files::check(&meta, meta.is_dir()).map_err(file)?;
    // Checked before its text is.
    own_files::open(&path.join(ABOUT)).map_err(file)?;
    let about: About = state::read(&path.join(ABOUT))?;
    if about.version != VERSION {
        return Err(refuse(format!(
            "the snapshot {} is of format {}, not {VERSION}",
            path.display(),
            about.version
        )));
    }
    let ids = about.containers.iter().map(|container| &container.id);
    if let Some(id) = ids.chain([&about.sandbox]).find(|id| !is_valid_id(id)) {
        return Err(refuse(format!(
            "the snapshot {} names a container {id:?}, which is no id",
            path.display()
        )));
    }
    Ok(Snapshot {
        files: SavedVm::open(path).map_err(file)?,
        path: path.to_owned(),
        about,
    })
}

impl Draft {
    /// Begins the snapshot that is to be at `target`, of a machine with `memory_bytes` of memory. What a dead one left of it
    /// goes.
    ///
    /// # Errors
    /// `AlreadyExists`: something is there. The files cannot be made.
    pub(super) fn new(target: &Path, memory_bytes: u64) -> Result<Self, Error> {
        let file = |e| Error::host(format!("making the snapshot {}", target.display()), e);
        if fs::symlink_metadata(target).is_ok() {
            return Err(Error::state(
                ErrorKind::AlreadyExists,
                format!("making the snapshot {}: it is there", target.display()),
            ));
        }
        let mut name = target.as_os_str().to_owned();
        name.push(".draft");
        let path = PathBuf::from(name);
        own_files::remove_dir(&path).map_err(file)?;
        own_files::make_dir(&path, false).map_err(file)?;
        match SavedVm::create(&path, memory_bytes) {
            Ok(files) => Ok(Self {
                path,
                target: target.to_owned(),
                files,
                whole: false,
            }),
            Err(error) => {
                let _ = own_files::remove_dir(&path);
                Err(file(error))
            }
        }
    }

    /// Where it is written.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Puts the snapshot in its place, whole: what is there has reached the disk.
    ///
    /// # Errors
    /// It cannot be written; nothing of it is left then.
    pub(super) fn commit(mut self, about: &About) -> Result<(), Error> {
        state::write(&self.path.join(ABOUT), about)?;
        let parent = self.target.parent().unwrap_or(&self.target);
        let put = || {
            self.files.sync()?;
            // What was copied, too: a file system at a time, as a snapshot is in one.
            rustix::fs::syncfs(fs::File::open(&self.path)?)?;
            fs::rename(&self.path, &self.target)?;
            own_files::sync_dir(parent)
        };
        put().map_err(|e| {
            Error::host(format!("writing the snapshot {}", self.target.display()), e)
        })?;
        self.whole = true;
        Ok(())
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.whole
            && let Err(error) = own_files::remove_dir(&self.path)
        {
            tracing::warn!("removing an unfinished snapshot: {error}");
        }
    }
}
