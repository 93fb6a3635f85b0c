//! The OCI image layout: `oci-layout`, `index.json`, `blobs/sha256/DIGEST`.

use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use oci_spec::image::{
    Arch, Descriptor, ImageConfiguration, ImageIndex, ImageManifest, MediaType, Os,
};
use serde::Deserialize;

use super::{Files, Resolved, open_regular, pair_layers, read_json};
use crate::image::digest::{Expected, Sha256Digest};
use crate::image::error::{Error, Result};
use crate::image::limits::Limits;

/// The annotation that holds an image's tag.
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// The annotation in which containerd and docker keep the full name.
const FULL_NAME: &str = "io.containerd.image.name";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// Bytes of the marker file `oci-layout`.
const MARKER_BYTES: u64 = 64 << 10;

/// A layout that is a directory.
pub(super) struct Directory {
    dir: PathBuf,
}

impl Directory {
    /// Looks whether `dir` is a directory.
    pub fn open(dir: &Path) -> Result<Self> {
        match std::fs::metadata(dir) {
            Ok(meta) if meta.is_dir() => Ok(Self {
                dir: dir.to_path_buf(),
            }),
            Ok(_) => Err(Error::malformed(
                dir.display().to_string(),
                "it is not a directory",
            )),
            Err(source) => Err(Error::Io {
                action: "open the image directory",
                path: dir.to_path_buf(),
                source,
            }),
        }
    }
}

impl Files for Directory {
    fn open(&self, name: &str) -> Result<(Box<dyn Read + '_>, u64)> {
        match open_regular(&self.dir.join(name)) {
            Ok((file, size)) => Ok((Box::new(file), size)),
            Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {
                Err(Error::Missing {
                    what: name.to_owned(),
                    place: self.place(),
                })
            }
            Err(error) => Err(error),
        }
    }

    fn place(&self) -> String {
        format!("the image directory {}", self.dir.display())
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Marker {
    image_layout_version: String,
}

/// Finds the image `tag` in a layout, and reads its manifest and configuration.
pub(super) fn resolve(files: &dyn Files, tag: Option<&str>, limits: &Limits) -> Result<Resolved> {
    let place = files.place();
    let what = format!("oci-layout in {place}");
    let any = Expected::default();
    let (marker, _): (Marker, _) = read_json(files, "oci-layout", &what, &any, MARKER_BYTES)?;
    if !marker.image_layout_version.starts_with("1.") {
        return Err(Error::Unsupported(format!(
            "{what}: the layout's version {:?} is not supported, only 1.x",
            marker.image_layout_version
        )));
    }
    let what = format!("index.json in {place}");
    let (index, _): (ImageIndex, _) =
        read_json(files, "index.json", &what, &any, limits.manifest_bytes)?;
    check_entries(&index, &what, limits)?;
    let named = by_tag(index.manifests(), tag, &place)?;
    let descriptor = select(files, named, limits, 0, &place)?;
    read_image(files, &descriptor, limits)
}

fn check_entries(index: &ImageIndex, what: &str, limits: &Limits) -> Result<()> {
    if index.manifests().len() > limits.index_entries {
        return Err(Error::limit(
            what,
            format!("{} manifests", limits.index_entries),
        ));
    }
    Ok(())
}

fn annotation<'a>(descriptor: &'a Descriptor, key: &str) -> Option<&'a str> {
    descriptor
        .annotations()
        .as_ref()?
        .get(key)
        .map(String::as_str)
}

fn has_tag(descriptor: &Descriptor, tag: &str) -> bool {
    [REF_NAME, FULL_NAME]
        .iter()
        .any(|key| annotation(descriptor, key) == Some(tag))
}

/// The entries that `tag` means. Without a tag: all of a layout that holds one name only, else
/// those with the name `latest`.
fn by_tag(all: &[Descriptor], tag: Option<&str>, place: &str) -> Result<Vec<Descriptor>> {
    let mut names: Vec<_> = all
        .iter()
        .filter_map(|entry| annotation(entry, REF_NAME))
        .collect();
    names.sort_unstable();
    names.dedup();
    let chosen: Vec<_> = match tag {
        Some(tag) => all
            .iter()
            .filter(|entry| has_tag(entry, tag))
            .cloned()
            .collect(),
        None if names.len() <= 1 => all.to_vec(),
        None => all
            .iter()
            .filter(|entry| has_tag(entry, "latest"))
            .cloned()
            .collect(),
    };
    if !chosen.is_empty() {
        return Ok(chosen);
    }
    let known = if names.is_empty() {
        "it has no tags".to_owned()
    } else {
        names.truncate(20);
        format!("its tags are {}", names.join(", "))
    };
    Err(match tag {
        Some(tag) => Error::Missing {
            what: format!("the tag {tag:?}"),
            place: format!("{place} ({known})"),
        },
        None if all.is_empty() => Error::Missing {
            what: "an image".to_owned(),
            place: place.to_owned(),
        },
        None => Error::malformed(
            place,
            format!("several images, and no tag was given; {known}"),
        ),
    })
}

/// Follows nested indexes to the manifest for linux/amd64.
fn select(
    files: &dyn Files,
    entries: Vec<Descriptor>,
    limits: &Limits,
    depth: usize,
    place: &str,
) -> Result<Descriptor> {
    if depth > limits.index_depth {
        return Err(Error::limit(
            place,
            format!("{} nested indexes", limits.index_depth),
        ));
    }
    let mut others = Vec::new();
    for entry in entries {
        match fits(&entry) {
            Fit::No(platform) => others.push(platform),
            Fit::Yes if is_index(&entry) => {
                let what = format!("index {}", entry.digest());
                let (name, expected) = blob(&entry, &what)?;
                let cap = limits.manifest_bytes;
                let (index, _): (ImageIndex, _) = read_json(files, &name, &what, &expected, cap)?;
                check_entries(&index, &what, limits)?;
                let nested = index.manifests().clone();
                // The first index that names our platform decides: one image, one index.
                return select(files, nested, limits, depth.saturating_add(1), place);
            }
            Fit::Yes if is_manifest(&entry) => return Ok(entry),
            Fit::Yes => others.push(entry.media_type().to_string()),
        }
    }
    others.sort_unstable();
    others.dedup();
    others.truncate(20);
    let place = match others.as_slice() {
        [] => place.to_owned(),
        others => format!("{place} (it has {})", others.join(", ")),
    };
    Err(Error::Missing {
        what: "an image for linux/amd64".to_owned(),
        place,
    })
}

enum Fit {
    Yes,
    /// The platform it is for.
    No(String),
}

/// Whether an entry can be for this platform. What says nothing can: the configuration decides then.
fn fits(entry: &Descriptor) -> Fit {
    match entry.platform() {
        None => Fit::Yes,
        Some(platform)
            if *platform.os() == Os::Linux && *platform.architecture() == Arch::Amd64 =>
        {
            // Variants v2 and up need instructions that the host may lack; v1 is the base line.
            match platform.variant().as_deref() {
                None | Some("" | "v1") => Fit::Yes,
                Some(variant) => Fit::No(format!("linux/amd64/{variant}")),
            }
        }
        Some(platform) => Fit::No(format!("{}/{}", platform.os(), platform.architecture())),
    }
}

fn is_index(entry: &Descriptor) -> bool {
    match entry.media_type() {
        MediaType::ImageIndex => true,
        other => other.to_string() == DOCKER_INDEX,
    }
}

fn is_manifest(entry: &Descriptor) -> bool {
    match entry.media_type() {
        MediaType::ImageManifest => true,
        other => other.to_string() == DOCKER_MANIFEST,
    }
}

/// A blob's name in the layout, and what it must be.
fn blob(descriptor: &Descriptor, what: &str) -> Result<(String, Expected)> {
    let digest = Sha256Digest::parse(descriptor.digest().as_ref(), what)?;
    let name = format!("blobs/sha256/{}", digest.hex());
    Ok((
        name,
        Expected {
            digest: Some(digest),
            size: Some(descriptor.size()),
        },
    ))
}

fn read_image(files: &dyn Files, descriptor: &Descriptor, limits: &Limits) -> Result<Resolved> {
    let what = format!("manifest {}", descriptor.digest());
    let (name, expected) = blob(descriptor, &what)?;
    let (manifest, digest): (ImageManifest, _) =
        read_json(files, &name, &what, &expected, limits.manifest_bytes)?;
    if manifest.layers().len() > limits.layers {
        return Err(Error::limit(what, format!("{} layers", limits.layers)));
    }
    let blobs = manifest
        .layers()
        .iter()
        .map(|layer| {
            let what = format!("layer {}", layer.digest());
            check_layer_type(layer, &what)?;
            blob(layer, &what)
        })
        .collect::<Result<Vec<_>>>()?;
    let what = format!("configuration {}", manifest.config().digest());
    let (name, expected) = blob(manifest.config(), &what)?;
    let (config, _): (ImageConfiguration, _) =
        read_json(files, &name, &what, &expected, limits.config_bytes)?;
    let layers = pair_layers(&config, &what, blobs, limits)?;
    Ok(Resolved {
        digest,
        config,
        layers,
    })
}

/// Layers are tar archives, plain or compressed by gzip or zstd; which of these, their first bytes say.
fn check_layer_type(layer: &Descriptor, what: &str) -> Result<()> {
    let media_type = layer.media_type().to_string();
    let known = [
        "application/vnd.oci.image.layer.v1.tar",
        "application/vnd.oci.image.layer.nondistributable.v1.tar",
        "application/vnd.docker.image.rootfs.diff.tar",
        "application/vnd.docker.image.rootfs.foreign.diff.tar",
    ];
    let base = ["+gzip", "+zstd", ".gzip", ".zstd"]
        .iter()
        .find_map(|suffix| media_type.strip_suffix(suffix))
        .unwrap_or(&media_type);
    if known.contains(&base) {
        return Ok(());
    }
    Err(Error::Unsupported(format!(
        "{what}: layers of type {media_type:?} are not supported"
    )))
}
