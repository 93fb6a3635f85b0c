//! Where an image's documents and blobs are read from.

mod archive;
mod docker;
mod oci;

use std::io::Read;
use std::path::Path;

use oci_spec::image::ImageConfiguration;

use super::digest::{Expected, Sha256Digest};
use super::error::{Context, Error, Result};
use super::limits::Limits;
use super::reference::ImageRef;

/// A set of named files: a directory, or the entries of a tar archive.
pub(crate) trait Files {
    /// Opens the file `name`; also says its size in bytes. [`Error::Missing`] if there is none.
    fn open(&self, name: &str) -> Result<(Box<dyn Read + '_>, u64)>;

    /// What the set is, for messages.
    fn place(&self) -> String;
}

/// An image's documents, read and checked; its layers, found.
pub(crate) struct Resolved {
    /// The digest of the manifest; of the configuration, where there is no manifest.
    pub digest: Sha256Digest,
    /// The configuration.
    pub config: ImageConfiguration,
    /// The layers, the lowest first.
    pub layers: Vec<LayerBlob>,
}

/// A layer as an image has it.
#[derive(Debug)]
pub(crate) struct LayerBlob {
    /// The blob's name among the [`Files`].
    pub name: String,
    /// What the blob must be.
    pub expected: Expected,
    /// The digest of the blob's uncompressed content.
    pub diff_id: Sha256Digest,
}

/// Opens what `reference` names and reads its documents. `scratch` is a directory for an archive that
/// has to be decompressed first (nothing stays in it).
pub(crate) fn resolve(
    reference: &ImageRef,
    scratch: &Path,
    limits: &Limits,
) -> Result<(Box<dyn Files>, Resolved)> {
    match reference {
        ImageRef::Oci { dir, tag } => {
            let files = oci::Directory::open(dir)?;
            let resolved = oci::resolve(&files, tag.as_deref(), limits)?;
            Ok((Box::new(files), resolved))
        }
        ImageRef::OciArchive { file, tag } => {
            let files = archive::Archive::open(file, scratch, limits)?;
            let resolved = oci::resolve(&files, tag.as_deref(), limits)?;
            Ok((Box::new(files), resolved))
        }
        ImageRef::DockerArchive { file, tag } => {
            let files = archive::Archive::open(file, scratch, limits)?;
            let resolved = docker::resolve(&files, tag.as_deref(), limits)?;
            Ok((Box::new(files), resolved))
        }
        ImageRef::Registry(registry) => Err(Error::Unsupported(format!(
            "{registry}: pulling from a registry is not supported yet"
        ))),
        ImageRef::Rootfs(_) | ImageRef::Bundle(_) => Err(Error::malformed(
            reference.to_string(),
            "it is a directory without layers, not an image to unpack",
        )),
    }
}

/// Opens a regular file for reading; never waits for the writer of a named pipe.
pub(crate) fn open_regular(path: &Path) -> Result<(std::fs::File, u64)> {
    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = rustix::fs::open(path, flags, Mode::empty()).context("open", path)?;
    let file = std::fs::File::from(file);
    let meta = file.metadata().context("look at", path)?;
    if !meta.is_file() {
        return Err(Error::malformed(
            path.display().to_string(),
            "it is not a regular file",
        ));
    }
    Ok((file, meta.len()))
}

/// Reads the JSON document `name`, checked against `expected`.
fn read_json<T: serde::de::DeserializeOwned>(
    files: &dyn Files,
    name: &str,
    what: &str,
    expected: &Expected,
    cap: u64,
) -> Result<(T, Sha256Digest)> {
    let (reader, _) = files.open(name)?;
    let (bytes, digest) = super::digest::read_verified(reader, what, expected, cap)?;
    let value = serde_json::from_slice(&bytes)
        .map_err(|error| Error::malformed(what, format!("not valid: {error}")))?;
    Ok((value, digest))
}

/// Checks a configuration's platform, and pairs its diff ids with the layers' blobs.
fn pair_layers(
    config: &ImageConfiguration,
    what: &str,
    blobs: Vec<(String, Expected)>,
    limits: &Limits,
) -> Result<Vec<LayerBlob>> {
    let (os, arch) = (config.os().to_string(), config.architecture().to_string());
    if (os.as_str(), arch.as_str()) != ("linux", "amd64") {
        return Err(Error::Unsupported(format!(
            "{what} is for {os}/{arch}, not linux/amd64"
        )));
    }
    if blobs.len() > limits.layers {
        return Err(Error::limit(what, format!("{} layers", limits.layers)));
    }
    let diff_ids = config.rootfs().diff_ids();
    if diff_ids.len() != blobs.len() {
        return Err(Error::malformed(
            what,
            format!(
                "it has {} layers, but {} diff ids",
                blobs.len(),
                diff_ids.len()
            ),
        ));
    }
    diff_ids
        .iter()
        .zip(blobs)
        .map(|(diff_id, (name, expected))| {
            let diff_id = Sha256Digest::parse(diff_id, &format!("{what}, rootfs.diff_ids"))?;
            Ok(LayerBlob {
                name,
                expected,
                diff_id,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests;
