//! What `docker save` writes: `manifest.json`, a configuration, and the layers, in a tar archive.

use oci_spec::image::ImageConfiguration;
use serde::Deserialize;

use super::{Files, Resolved, pair_layers, read_json};
use crate::image::digest::{Expected, Sha256Digest};
use crate::image::error::{Error, Result};
use crate::image::limits::Limits;

/// One image of `manifest.json`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Option<Vec<String>>,
}

/// Finds the image `tag` (any, if there is but one) and reads its configuration.
pub(super) fn resolve(files: &dyn Files, tag: Option<&str>, limits: &Limits) -> Result<Resolved> {
    let place = files.place();
    let what = format!("manifest.json in {place}");
    let any = Expected::default();
    let (images, _): (Vec<Saved>, _) =
        read_json(files, "manifest.json", &what, &any, limits.manifest_bytes)?;
    if images.len() > limits.index_entries {
        return Err(Error::limit(
            what,
            format!("{} images", limits.index_entries),
        ));
    }
    let image = choose(images, tag, &place)?;
    let what = format!("configuration {} in {place}", image.config);
    let expected = expected(&image.config);
    let (config, digest): (ImageConfiguration, _) =
        read_json(files, &image.config, &what, &expected, limits.config_bytes)?;
    let layers = image.layers.unwrap_or_default();
    let blobs = layers
        .into_iter()
        .map(|name| (name.clone(), self::expected(&name)))
        .collect();
    let layers = pair_layers(&config, &what, blobs, limits)?;
    Ok(Resolved {
        digest,
        config,
        layers,
    })
}

fn choose(images: Vec<Saved>, tag: Option<&str>, place: &str) -> Result<Saved> {
    let mut names: Vec<String> = images
        .iter()
        .flat_map(|image| image.repo_tags.iter().flatten().cloned())
        .collect();
    names.truncate(20);
    let known = format!("its images are {}", names.join(", "));
    let fits =
        |image: &Saved| match tag {
            None => true,
            Some(tag) => image.repo_tags.iter().flatten().any(|name| {
                name == tag || name.rsplit_once(':').is_some_and(|(_, last)| last == tag)
            }),
        };
    let mut fitting = images.into_iter().filter(fits);
    match (fitting.next(), fitting.next(), tag) {
        (Some(image), None, _) => Ok(image),
        (Some(_), Some(_), _) => Err(Error::malformed(
            place,
            format!("several images; name one by a tag: {known}"),
        )),
        (None, _, Some(tag)) => Err(Error::Missing {
            what: format!("the image {tag:?}"),
            place: format!("{place} ({known})"),
        }),
        (None, _, None) => Err(Error::Missing {
            what: "an image".to_owned(),
            place: place.to_owned(),
        }),
    }
}

/// The digest that a file's name gives: `blobs/sha256/DIGEST` since docker 25, `DIGEST.json` before.
/// Older layers have random names; their diff ids tell what they must be.
fn expected(name: &str) -> Expected {
    let hex = match name.strip_prefix("blobs/sha256/") {
        Some(hex) => Some(hex),
        None => name.strip_suffix(".json"),
    };
    Expected {
        digest: hex.and_then(Sha256Digest::from_hex),
        size: None,
    }
}
