//! A layer's tar stream made into a directory of files.
//!
//! What is refused, and what is contained, follows docker and containerd:
//!
//! - `..` that climbs above the layer's root, in a name or in the target of a hard or relative symbolic
//!   link, is an error that names the entry.
//! - Absolute names and targets of hard links are taken relative to the layer's root.
//! - A symbolic link that a layer planted is followed for the parents of later entries, and ends inside
//!   the layer's root whatever it says, since the kernel resolves it as chroot would; it is replaced,
//!   never followed, where it is an entry's last component. One that leads nowhere is an error.
//! - A parent directory without an entry of its own is made with mode 0755, owned by root.
//! - Extended attributes are kept if they are `user.*`, `security.capability` or a POSIX ACL; those that
//!   overlayfs or the host's own security modules act on (`trusted.*`, other `security.*`) are dropped.

mod apply;
mod root;

use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::compression;
use super::digest::{Expected, Sha256Digest, Verifier};
use super::error::{Context, Error, Result};
use super::limits::Limits;
use super::tar_reader::{Skip, TarError, TarReader};

/// Unpacks the layer that `blob` is, compressed or not, into `fs`, an empty directory. `trash` is a
/// directory beside it for what one entry of the layer replaces of another; the caller removes both if
/// this fails. Every byte of the blob is read and checked, and what it says about itself is believed
/// only so far: see [`self`].
pub(super) fn unpack(
    blob: impl Read,
    expected: &Expected,
    diff_id: &Sha256Digest,
    (fs, trash): (&Path, &Path),
    limits: &Limits,
) -> Result<()> {
    let what = match &expected.digest {
        Some(digest) => format!("layer {digest}"),
        None => format!("layer {diff_id}"),
    };
    let cap = expected.size.unwrap_or(limits.layer_bytes);
    let blob = Verifier::new(blob, cap);
    let stream = compression::reader(blob).context("read", &what)?;
    let mut stream = Verifier::new(stream, limits.layer_bytes);
    let unpacked = unpack_entries(&mut stream, diff_id, fs, trash, limits);
    // Bytes that are not part of any entry belong to the digests, too. Their failure to decompress is
    // told below, if the blob itself is what it should be.
    let drained = std::io::copy(&mut stream, &mut std::io::sink());
    let uncompressed = stream.count();
    let (blob, found) = stream.into_parts();
    // A wrong blob explains whatever else failed, so that is the error to report.
    blob.into_inner().verify(&what, expected)?;
    if uncompressed > limits.layer_bytes {
        return Err(Error::limit(
            what,
            format!("{} bytes uncompressed", limits.layer_bytes),
        ));
    }
    if let Err(error) = &drained
        && unpacked.is_ok()
    {
        return Err(Error::malformed(
            what,
            format!("it cannot be decompressed: {error}"),
        ));
    }
    if drained.is_ok() && found != *diff_id {
        return Err(Error::Digest {
            what: format!("{what}, uncompressed,"),
            expected: diff_id.to_string(),
            found: found.to_string(),
        });
    }
    unpacked
}

/// Unpacks an uncompressed tar stream of unknown digest, as fuzzing wants it.
#[doc(hidden)]
pub fn unpack_stream(stream: impl Skip, fs: &Path, trash: &Path, limits: &Limits) -> Result<()> {
    unpack_entries(stream, &Sha256Digest::of(b""), fs, trash, limits)
}

fn unpack_entries(
    stream: impl Skip,
    diff_id: &Sha256Digest,
    fs: &Path,
    trash: &Path,
    limits: &Limits,
) -> Result<()> {
    let layer = diff_id.to_string();
    let mut unpacker = apply::Unpacker::new(fs, trash, &layer)?;
    let mut reader = TarReader::new(stream, limits);
    let mut count = 0u64;
    loop {
        let entry = match reader.next_entry() {
            Ok(Some(entry)) => entry,
            Ok(None) => return Ok(()),
            Err(error) => return Err(tar_error(&layer, error)),
        };
        count = count.saturating_add(1);
        if count > limits.layer_entries {
            let limit = format!("{} entries", limits.layer_entries);
            return Err(Error::limit(format!("layer {layer}"), limit));
        }
        unpacker.apply(&entry, &mut reader)?;
    }
}

fn tar_error(layer: &str, error: TarError) -> Error {
    match error {
        TarError::Limit(limit) => Error::limit(format!("layer {layer}"), limit),
        other => Error::malformed(format!("layer {layer}"), other.to_string()),
    }
}

/// Makes `paths` as directories beneath `rootfs`, where they are missing.
pub(super) fn make_directories(rootfs: &Path, paths: &[PathBuf]) -> Result<()> {
    let root = root::Root::open(rootfs)?;
    for path in paths {
        let what = format!("directory {}", path.display());
        let Some(components) = root::components(path.as_os_str().as_bytes()) else {
            return Err(Error::option(what, "it leads out of the root file system"));
        };
        root.make_directory(&components)
            .map_err(|refused| match refused {
                root::Refused::Layer(reason) => Error::option(what, reason),
                root::Refused::Host(action, source) => Error::Io {
                    action,
                    path: path.clone(),
                    source,
                },
            })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
