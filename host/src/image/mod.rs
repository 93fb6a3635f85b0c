//! Images: read from where they are, unpacked to a store of layers, mounted as root file systems.
//!
//! ```no_run
//! # fn main() -> Result<(), cella_host::image::Error> {
//! use cella_host::image::{ImageRef, Store};
//! let store = Store::open("/var/lib/cella")?;
//! let image = store.prepare(&ImageRef::parse("oci:/srv/images:busybox")?)?;
//! let rootfs = image.mount("/run/cella/demo/rootfs".as_ref(), "/run/cella/demo/scratch".as_ref())?;
//! rootfs.unmount()
//! # }
//! ```
//!
//! Everything here blocks; call it outside of an async task, or by `spawn_blocking`. Every blob is
//! compared with its digest and size while it is read, before anything of it can be used. How entries
//! of layers that try to leave their directory are treated is written down in `layer`.

pub mod bundle;
mod compression;
mod digest;
mod error;
mod layer;
mod limits;
mod mount;
mod reference;
mod source;
mod store;
mod tar_fields;
mod tar_reader;
mod tree;

use std::path::{Path, PathBuf};

pub use bundle::Bundle;
pub use digest::Sha256Digest;
pub use error::{Error, Result};
#[doc(hidden)]
pub use layer::unpack_stream;
pub use limits::Limits;
pub use mount::{RootfsMount, release, upper};
pub use oci_spec::image::ImageConfiguration;
pub use reference::{ImageRef, RegistryRef};
pub use store::{DEFAULT_DIR, Store};
pub use tar_reader::Skip;
pub use tree::remove_tree;

pub(crate) use error::Context;

pub use crate::error::ErrorKind;

/// An image whose content is on this host.
#[derive(Clone, Debug)]
pub struct Image {
    /// Its configuration; an empty one for a plain directory.
    pub config: ImageConfiguration,
    /// The digest of its manifest (of its configuration, from a docker archive); `None` for a plain
    /// directory.
    pub digest: Option<Sha256Digest>,
    content: Content,
}

/// A layer in the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerDir {
    /// The digest of the layer's uncompressed tar stream.
    pub diff_id: Sha256Digest,
    /// The directory with its files, in overlayfs's form. Never to be written to.
    pub path: PathBuf,
}

#[derive(Clone, Debug)]
enum Content {
    /// The lowest first.
    Layers(Vec<LayerDir>),
    Directory(PathBuf),
}

impl Image {
    /// An image that is a plain directory.
    pub(crate) fn from_rootfs(dir: &Path) -> Result<Self> {
        match std::fs::metadata(dir) {
            Ok(meta) if meta.is_dir() => Ok(Self {
                config: ImageConfiguration::default(),
                digest: None,
                content: Content::Directory(dir.to_path_buf()),
            }),
            Ok(_) => Err(Error::malformed(
                dir.display().to_string(),
                "it is not a directory",
            )),
            Err(error) => Err(error).context("open the root file system", dir),
        }
    }

    /// The layers, the lowest first; none for a plain directory.
    pub fn layers(&self) -> &[LayerDir] {
        match &self.content {
            Content::Layers(layers) => layers,
            Content::Directory(_) => &[],
        }
    }

    /// The digests of the layers, the lowest first.
    pub fn digests(&self) -> Vec<String> {
        let digest = |layer: &LayerDir| layer.diff_id.to_string();
        self.layers().iter().map(digest).collect()
    }

    /// Mounts the image read-write at `target`, by overlayfs; what is written goes to `scratch`, and
    /// the image's own files stay as they are. Both directories are made if they do not exist, in
    /// parents that do; both are removed with the mount.
    pub fn mount(&self, target: &Path, scratch: &Path) -> Result<RootfsMount> {
        let lower: Vec<&Path> = match &self.content {
            Content::Layers(layers) => layers.iter().map(|layer| layer.path.as_path()).collect(),
            Content::Directory(dir) => vec![dir],
        };
        RootfsMount::overlay(&lower, target, scratch)
    }
}

/// Makes `paths` as directories in the root file system at `rootfs`, with mode 0755, where they are
/// missing. Links are followed as in a chroot.
pub(crate) fn make_directories(rootfs: &Path, paths: &[PathBuf]) -> Result<()> {
    layer::make_directories(rootfs, paths)
}

#[cfg(test)]
mod testing;
