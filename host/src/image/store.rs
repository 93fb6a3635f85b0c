//! The store of unpacked layers, by the digests of their content.
//!
//! ```text
//! DIR/layers/DIFF-ID/fs     a layer; complete and final if it is there
//! DIR/tmp/DIFF-ID/fs        a layer in the making
//! DIR/tmp/DIFF-ID/trash     what its own later entries replaced
//! DIR/locks/DIFF-ID         locked (flock) by whoever makes or removes either
//! ```
//!
//! A layer is renamed into place when it is whole and on disk, so that a crash at any moment leaves
//! nothing but a directory in `tmp`, which the next to want that layer, or [`Store::gc`], removes.

use std::fs::File;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use super::digest::Sha256Digest;
use super::error::{Context, Error, Result};
use super::limits::Limits;
use super::reference::ImageRef;
use super::source::{self, Files, LayerBlob};
use super::tree::remove_tree;
use super::{Content, Image, LayerDir, layer};

/// Where layers are when nothing else is said.
pub const DEFAULT_DIR: &str = "/var/lib/cella";

/// A directory of unpacked layers. Any number of processes may use one at the same time.
#[derive(Clone, Debug)]
pub struct Store {
    dir: PathBuf,
    limits: Limits,
}

/// Holds the right to make or remove a layer, until dropped.
struct LayerLock {
    _file: File,
}

impl Store {
    /// Opens the store in `dir`, which is made if it does not exist. It and all in it is for root
    /// alone: layers hold set-id programs and devices.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self> {
        Self::with_limits(dir, Limits::default())
    }

    /// As [`open`](Self::open), with other caps on what images may have.
    pub fn with_limits(dir: impl Into<PathBuf>, limits: Limits) -> Result<Self> {
        let store = Self {
            dir: dir.into(),
            limits,
        };
        for name in ["layers", "tmp", "locks"] {
            let path = store.dir.join(name);
            let made = std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&path);
            made.context("make the directory", &path)?;
        }
        Ok(store)
    }

    /// Reads the image that `reference` names, and unpacks those of its layers that are not here yet.
    ///
    /// `rootfs:` gives an image without a configuration. A `bundle:` is no image but a whole container:
    /// [`bundle::load`](super::bundle::load) it instead.
    pub fn prepare(&self, reference: &ImageRef) -> Result<Image> {
        match reference {
            ImageRef::Rootfs(dir) => return Image::from_rootfs(dir),
            ImageRef::Bundle(_) => {
                return Err(Error::option(
                    reference.to_string(),
                    "a bundle is not an image",
                ));
            }
            _ => {}
        }
        let (files, image) = source::resolve(reference, &self.dir.join("tmp"), &self.limits)?;
        let mut layers = Vec::with_capacity(image.layers.len());
        for blob in &image.layers {
            layers.push(self.layer(files.as_ref(), blob)?);
        }
        Ok(Image {
            config: image.config,
            digest: Some(image.digest),
            content: Content::Layers(layers),
        })
    }

    /// Removes what unpackers that died have left, and says what that was. Layers that are being
    /// unpacked are left alone.
    pub fn gc(&self) -> Result<Vec<PathBuf>> {
        let mut removed = Vec::new();
        let tmp = self.dir.join("tmp");
        for entry in std::fs::read_dir(&tmp).context("list", &tmp)? {
            let path = entry.context("list", &tmp)?.path();
            // `DIFF-ID`, or `DIFF-ID.N` of a removal that was interrupted itself.
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            let hex = name.split('.').next().unwrap_or_default();
            let Some(diff_id) = Sha256Digest::from_hex(hex) else {
                continue;
            };
            if let Some(_lock) = self.try_lock(&diff_id)? {
                remove_tree(&path)?;
                removed.push(path);
            }
        }
        self.remove_free_locks()?;
        Ok(removed)
    }

    /// Where the layer `diff_id` is, once it is there.
    fn layer_dir(&self, diff_id: &Sha256Digest) -> PathBuf {
        self.dir.join("layers").join(diff_id.hex())
    }

    fn find(&self, diff_id: &Sha256Digest) -> Result<Option<LayerDir>> {
        let path = self.layer_dir(diff_id).join("fs");
        match std::fs::symlink_metadata(&path) {
            Ok(meta) if meta.is_dir() => Ok(Some(LayerDir {
                diff_id: diff_id.clone(),
                path,
            })),
            Ok(_) => Err(Error::malformed(
                path.display().to_string(),
                "it is not a directory",
            )),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).context("look at", &path),
        }
    }

    /// The layer, from the store or unpacked into it. The blob must be there in any case and have its
    /// size; its content is read only if it is needed.
    fn layer(&self, files: &dyn Files, blob: &LayerBlob) -> Result<LayerDir> {
        let (reader, size) = files.open(&blob.name)?;
        if let Some(expected) = blob.expected.size
            && expected != size
        {
            let what = format!("layer {}", blob.name);
            return Err(Error::Size {
                what,
                expected,
                found: size,
            });
        }
        if let Some(layer) = self.find(&blob.diff_id)? {
            return Ok(layer);
        }
        let _lock = self.lock(&blob.diff_id)?;
        // Another process may have been faster.
        if let Some(layer) = self.find(&blob.diff_id)? {
            return Ok(layer);
        }
        let tmp = self.dir.join("tmp").join(blob.diff_id.hex());
        // Left by one that was killed: the lock says that it is not at work any more.
        remove_tree(&tmp)?;
        let unpacked = self.unpack(reader, blob, &tmp);
        if unpacked.is_err()
            && let Err(error) = remove_tree(&tmp)
        {
            tracing::warn!(error = %error.chain(), "a layer that failed to unpack is left for gc");
        }
        unpacked?;
        self.find(&blob.diff_id)?.ok_or_else(|| Error::Missing {
            what: format!("layer {}, just unpacked,", blob.diff_id),
            place: self.dir.display().to_string(),
        })
    }

    fn unpack(&self, reader: impl std::io::Read, blob: &LayerBlob, tmp: &Path) -> Result<()> {
        let (fs, trash) = (tmp.join("fs"), tmp.join("trash"));
        for (dir, mode) in [(tmp, 0o700), (&fs, 0o755), (&trash, 0o700)] {
            std::fs::create_dir(dir).context("make the directory", dir)?;
            // The umask must not show in an image's root.
            let made = rustix::fs::chmod(dir, Mode::from_raw_mode(mode));
            made.context("set the mode of", dir)?;
        }
        let dirs = (fs.as_path(), trash.as_path());
        layer::unpack(reader, &blob.expected, &blob.diff_id, dirs, &self.limits)?;
        remove_tree(&trash)?;
        let tmp_fd = open_dir(tmp)?;
        rustix::fs::syncfs(&tmp_fd).context("write to disk", tmp)?;
        let done = self.layer_dir(&blob.diff_id);
        std::fs::rename(tmp, &done).context("put the layer in place as", &done)?;
        let layers = self.dir.join("layers");
        rustix::fs::fsync(open_dir(&layers)?).context("write to disk", &layers)
    }

    fn lock(&self, diff_id: &Sha256Digest) -> Result<LayerLock> {
        loop {
            if let Some(lock) = self.lock_with(diff_id, FlockOperation::LockExclusive)? {
                return Ok(lock);
            }
        }
    }

    fn try_lock(&self, diff_id: &Sha256Digest) -> Result<Option<LayerLock>> {
        self.lock_with(diff_id, FlockOperation::NonBlockingLockExclusive)
    }

    /// `None` if another has the lock (and `how` is not to wait), or if the lock's file was removed by
    /// [`gc`](Self::gc) before it was locked.
    fn lock_with(&self, diff_id: &Sha256Digest, how: FlockOperation) -> Result<Option<LayerLock>> {
        let path = self.dir.join("locks").join(diff_id.hex());
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR)
            .context("open the lock", &path)?;
        let file = File::from(file);
        loop {
            match rustix::fs::flock(&file, how) {
                Ok(()) => break,
                Err(Errno::INTR) => {}
                Err(Errno::WOULDBLOCK) => return Ok(None),
                Err(error) => return Err(error).context("lock", &path),
            }
        }
        let ours = file.metadata().context("look at the lock", &path)?.ino();
        match std::fs::metadata(&path) {
            Ok(meta) if meta.ino() == ours => Ok(Some(LayerLock { _file: file })),
            Ok(_) => Ok(None),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).context("look at the lock", &path),
        }
    }

    fn remove_free_locks(&self) -> Result<()> {
        let locks = self.dir.join("locks");
        for entry in std::fs::read_dir(&locks).context("list", &locks)? {
            let entry = entry.context("list", &locks)?;
            let Some(diff_id) = Sha256Digest::from_hex(&entry.file_name().to_string_lossy()) else {
                continue;
            };
            if let Some(_lock) = self.try_lock(&diff_id)? {
                std::fs::remove_file(entry.path()).context("remove the lock", entry.path())?;
            }
        }
        Ok(())
    }
}

fn open_dir(path: &Path) -> Result<std::os::fd::OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).context("open the directory", path)
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
