//! The templates on disk: `<lib>/templates/<key>/` with `state`, `memory` and `about.json`, `<key>.lock` while one is being
//! built, and `<key>.draft` until it is whole.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use super::{Error, Key, Shape};
use crate::hypervisor::SavedVm;
use crate::own_files;
use crate::paths::Paths;

const ABOUT: &str = "about.json";
const DRAFT: &str = "draft";
const LOCK: &str = "lock";

/// All templates of a host.
#[derive(Clone, Debug)]
pub struct Store {
    dir: PathBuf,
}

/// What is written down beside a template, for people.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct About {
    shape: Shape,
    created: u64,
}

/// A template as `cella template list` shows it.
#[derive(Clone, Debug, Serialize)]
pub struct Listed {
    /// Its name.
    pub key: String,
    /// What it is good for; nothing if that cannot be read.
    pub shape: Option<Shape>,
    /// Seconds since the epoch.
    pub created: u64,
    /// What it takes on disk.
    pub bytes: u64,
    /// When a clone was last made, seconds since the epoch.
    pub used: u64,
}

/// Held by the one who builds a template.
#[derive(Debug)]
pub struct BuildLock(#[allow(dead_code, reason = "held for its Drop")] File);

/// A template that is not whole yet. Dropping it removes it.
#[derive(Debug)]
pub struct Draft {
    store: Store,
    key: Key,
    path: Option<PathBuf>,
    /// The files to be filled.
    pub files: SavedVm,
}

impl Store {
    /// The templates of `paths`.
    pub fn new(paths: &Paths) -> Self {
        Self {
            dir: paths.lib_dir.join("templates"),
        }
    }

    /// The files of the template `key`, if there is one.
    ///
    /// # Errors
    /// It is not whole, or somebody else could have written it.
    pub fn open(&self, key: &Key) -> Result<Option<SavedVm>, Error> {
        let dir = self.dir.join(key.as_str());
        if !dir.exists() {
            return Ok(None);
        }
        for dir in [&self.dir, &dir] {
            let meta = fs::symlink_metadata(dir).map_err(Error::file("looking at", dir))?;
            own_files::check(&meta, meta.is_dir()).map_err(Error::file("using", dir))?;
        }
        let saved = SavedVm::open(&dir).map_err(Error::file("opening", &dir))?;
        // The least recently used goes first when there is no room. That it was not noted is no reason not to use it.
        let _ = File::options()
            .append(true)
            .open(dir.join(ABOUT))
            .and_then(|about| about.set_modified(SystemTime::now()));
        Ok(Some(saved))
    }

    /// The shape of the template `key`, if there is one.
    pub fn shape(&self, key: &Key) -> Option<Shape> {
        self.describe(key).shape
    }

    /// Whether there is a template `key`, whole or not.
    pub fn has(&self, key: &Key) -> bool {
        self.dir.join(key.as_str()).exists()
    }

    /// Becomes the one who builds `key`; nothing if somebody is at it. What a dead builder left is removed.
    ///
    /// # Errors
    /// The directory cannot be made.
    pub fn lock(&self, key: &Key) -> Result<Option<BuildLock>, Error> {
        own_files::make_dir(&self.dir, true).map_err(Error::file("making", &self.dir))?;
        let path = self.file(key, LOCK);
        let file = File::create(&path).map_err(Error::file("making", &path))?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::AGAIN) => return Ok(None),
            Err(error) => return Err(Error::file("locking", path)(error.into())),
        }
        remove_dir(&self.file(key, DRAFT))?;
        Ok(Some(BuildLock(file)))
    }

    /// Begins the template `key` with a memory file of `memory_bytes`; the caller has its lock.
    ///
    /// # Errors
    /// The files cannot be made.
    pub fn draft(&self, key: &Key, memory_bytes: u64, _lock: &BuildLock) -> Result<Draft, Error> {
        let path = self.file(key, DRAFT);
        own_files::make_dir(&path, false).map_err(Error::file("making", &path))?;
        let files = SavedVm::create(&path, memory_bytes);
        match files {
            Ok(files) => Ok(Draft {
                store: self.clone(),
                key: key.clone(),
                path: Some(path),
                files,
            }),
            Err(error) => {
                let _ = remove_dir(&path);
                Err(Error::file("making the files of", path)(error))
            }
        }
    }

    /// Every template, the last used first.
    ///
    /// # Errors
    /// The directory exists but cannot be read.
    pub fn list(&self) -> Result<Vec<Listed>, Error> {
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Error::file("listing", &self.dir)(error)),
        };
        let mut listed: Vec<Listed> = entries
            .filter_map(|entry| Key::parse(entry.ok()?.file_name().to_str()?))
            .map(|key| self.describe(&key))
            .collect();
        listed.sort_by_key(|one| std::cmp::Reverse(one.used));
        Ok(listed)
    }

    /// Removes the template `key`. Clones that live keep what they have mapped.
    ///
    /// # Errors
    /// [`Error::NotFound`], or it cannot be removed.
    pub fn remove(&self, key: &Key) -> Result<(), Error> {
        let path = self.dir.join(key.as_str());
        if !path.exists() {
            return Err(Error::NotFound(key.as_str().to_owned()));
        }
        // First out of sight: half a template under its name would be one that cannot be used.
        let away = self.dir.join(format!("{}.removed", key.as_str()));
        remove_dir(&away)?;
        fs::rename(&path, &away).map_err(Error::file("removing", &path))?;
        remove_dir(&away)
    }

    /// Removes the least recently used templates until the rest takes at most `bytes`.
    ///
    /// # Errors
    /// One cannot be removed.
    pub fn keep_within(&self, bytes: u64) -> Result<(), Error> {
        let mut total = 0_u64;
        for one in self.list()? {
            total = total.saturating_add(one.bytes);
            if total > bytes
                && let Some(key) = Key::parse(&one.key)
            {
                self.remove(&key)?;
            }
        }
        Ok(())
    }

    /// Removes what dead builders left, and says what it was.
    ///
    /// # Errors
    /// Something could not be removed.
    pub fn collect(&self) -> Result<Vec<String>, Error> {
        let mut removed = Vec::new();
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let Some((key, kind)) = name.to_str().and_then(|name| name.split_once('.')) else {
                continue;
            };
            let Some(key) = Key::parse(key) else { continue };
            match kind {
                DRAFT if self.lock(&key)?.is_some() => {
                    removed.push(format!("half a template {}", key.as_str()));
                }
                "removed" => remove_dir(&entry.path())?,
                _ => {}
            }
        }
        Ok(removed)
    }

    fn describe(&self, key: &Key) -> Listed {
        let dir = self.dir.join(key.as_str());
        let about: Option<About> = fs::read(dir.join(ABOUT))
            .ok()
            .and_then(|text| serde_json::from_slice(&text).ok());
        let bytes = SavedVm::FILES
            .iter()
            .filter_map(|file| Some(fs::metadata(dir.join(file)).ok()?.blocks() * 512))
            .sum();
        let used = fs::metadata(dir.join(ABOUT)).map_or(0, |meta| meta.mtime());
        Listed {
            key: key.as_str().to_owned(),
            created: about.as_ref().map_or(0, |about| about.created),
            shape: about.map(|about| about.shape),
            bytes,
            used: u64::try_from(used).unwrap_or(0),
        }
    }

    fn file(&self, key: &Key, kind: &str) -> PathBuf {
        self.dir.join(format!("{}.{kind}", key.as_str()))
    }
}

impl Draft {
    /// Puts the template in its place, whole: what is under its final name has reached the disk.
    ///
    /// # Errors
    /// It cannot be written; nothing of it is left then.
    pub fn commit(mut self, shape: &Shape) -> Result<(), Error> {
        let Some(path) = self.path.clone() else {
            return Ok(());
        };
        let about = About {
            shape: shape.clone(),
            created: crate::sandbox::state::now(),
        };
        let about_path = path.join(ABOUT);
        let text = serde_json::to_vec(&about)
            .map_err(|e| Error::file("writing", &about_path)(e.into()))?;
        fs::write(&about_path, text).map_err(Error::file("writing", &about_path))?;
        self.files
            .sync()
            .and_then(|()| own_files::sync_dir(&path))
            .map_err(Error::file("writing", &path))?;
        let target = self.store.dir.join(self.key.as_str());
        fs::rename(&path, &target).map_err(Error::file("putting in place", &target))?;
        self.path = None;
        own_files::sync_dir(&self.store.dir).map_err(Error::file("writing", &self.store.dir))
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if let Some(path) = &self.path
            && let Err(error) = remove_dir(path)
        {
            tracing::warn!("removing an unfinished template: {error}");
        }
    }
}

fn remove_dir(path: &Path) -> Result<(), Error> {
    own_files::remove_dir(path).map_err(Error::file("removing", path))
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
