//! Image references, as the command line has them.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use super::error::{Error, Result};

/// Where an image comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageRef {
    /// `oci:DIR[:TAG]`: a directory in the OCI image layout.
    Oci {
        /// The layout's directory.
        dir: PathBuf,
        /// Which of its images: the value of `org.opencontainers.image.ref.name`.
        tag: Option<String>,
    },
    /// `oci-archive:FILE[:TAG]`: a tar archive of an OCI image layout.
    OciArchive {
        /// The archive.
        file: PathBuf,
        /// Which of its images.
        tag: Option<String>,
    },
    /// `docker-archive:FILE[:TAG]`: what `docker save` writes.
    DockerArchive {
        /// The archive.
        file: PathBuf,
        /// Which of its images: `name:tag` as in `RepoTags`, or the tag alone.
        tag: Option<String>,
    },
    /// `rootfs:DIR`: a directory with a root file system, which is never changed.
    Rootfs(PathBuf),
    /// `bundle:DIR`: an OCI runtime bundle, whose root file system is used as it is.
    Bundle(PathBuf),
    /// An image in a registry.
    Registry(RegistryRef),
}

/// `[HOST[:PORT]/]NAME[/NAME]...[:TAG][@DIGEST]`, completed as docker does it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegistryRef {
    /// Host and port; `docker.io` where none is written.
    pub registry: String,
    /// The repository's name; `library/` is put before a plain name of docker.io.
    pub repository: String,
    /// The tag; `latest` where neither tag nor digest is written.
    pub tag: Option<String>,
    /// `sha256:` and 64 hexadecimal digits.
    pub digest: Option<String>,
}

/// Bytes of the longest reference that is looked at.
const REFERENCE_BYTES: usize = 8192;
/// Bytes of the longest repository name (the distribution specification's advice).
const REPOSITORY_BYTES: usize = 255;
/// Bytes of the longest tag (the distribution specification).
const TAG_BYTES: usize = 128;

impl ImageRef {
    /// Reads a reference. No file is looked at: whether it exists is known when it is used.
    ///
    /// A `DIR` or `FILE` that a tag can follow has no colon in it; the first one begins the tag,
    /// which may have colons itself (`oci:images:docker.io/library/busybox:1.36`).
    pub fn parse(text: &str) -> Result<Self> {
        let refuse = |reason: &str| Error::Reference {
            reference: text.chars().take(256).collect(),
            reason: reason.to_owned(),
        };
        if text.is_empty() {
            return Err(refuse("it is empty"));
        }
        if text.len() > REFERENCE_BYTES {
            return Err(refuse("it is too long"));
        }
        if text.chars().any(char::is_control) {
            return Err(refuse("it has a control character"));
        }
        let Some((scheme, rest)) = text.split_once(':') else {
            return RegistryRef::parse(text)
                .map(Self::Registry)
                .map_err(|reason| refuse(&reason));
        };
        let tagged = || -> Result<(PathBuf, Option<String>)> {
            let (path, tag) = match rest.split_once(':') {
                Some((_, "")) => return Err(refuse("the tag after the last colon is empty")),
                Some((path, tag)) => (path, Some(tag.to_owned())),
                None => (rest, None),
            };
            if path.is_empty() {
                return Err(refuse("the path is empty"));
            }
            Ok((PathBuf::from(path), tag))
        };
        let plain = || -> Result<PathBuf> {
            if rest.is_empty() {
                return Err(refuse("the path is empty"));
            }
            Ok(PathBuf::from(rest))
        };
        match scheme {
            "oci" => tagged().map(|(dir, tag)| Self::Oci { dir, tag }),
            "oci-archive" => tagged().map(|(file, tag)| Self::OciArchive { file, tag }),
            "docker-archive" => tagged().map(|(file, tag)| Self::DockerArchive { file, tag }),
            "rootfs" => plain().map(Self::Rootfs),
            "bundle" => plain().map(Self::Bundle),
            _ if rest.starts_with("//") => Err(refuse(
                "this scheme is not known; write oci:DIR[:TAG], oci-archive:FILE, \
                 docker-archive:FILE, rootfs:DIR, bundle:DIR or a registry's image without a scheme",
            )),
            _ => RegistryRef::parse(text)
                .map(Self::Registry)
                .map_err(|reason| refuse(&reason)),
        }
    }
}

impl FromStr for ImageRef {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::parse(text)
    }
}

impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scheme, path, tag) = match self {
            Self::Oci { dir, tag } => ("oci", dir, tag.as_deref()),
            Self::OciArchive { file, tag } => ("oci-archive", file, tag.as_deref()),
            Self::DockerArchive { file, tag } => ("docker-archive", file, tag.as_deref()),
            Self::Rootfs(dir) => ("rootfs", dir, None),
            Self::Bundle(dir) => ("bundle", dir, None),
            Self::Registry(registry) => return registry.fmt(f),
        };
        write!(f, "{scheme}:{}", path.display())?;
        tag.map_or(Ok(()), |tag| write!(f, ":{tag}"))
    }
}

impl RegistryRef {
    /// Reads and completes a reference; the error is the reason alone.
    fn parse(text: &str) -> std::result::Result<Self, String> {
        let (name, digest) = match text.split_once('@') {
            Some((name, digest)) => (name, Some(digest)),
            None => (text, None),
        };
        if let Some(digest) = digest {
            let hex = digest
                .strip_prefix("sha256:")
                .ok_or("its digest is not a sha256")?;
            if !super::digest::is_hex_sha256(hex) {
                return Err(
                    "its digest is not sha256: and 64 lower-case hexadecimal digits".into(),
                );
            }
        }
        // A colon after the last slash begins a tag; one before it, a port.
        let after_slash = name.rfind('/').map_or(0, |slash| slash.saturating_add(1));
        let (path, tag) = match name.rsplit_once(':') {
            Some((path, tag)) if path.len() >= after_slash => (path, Some(tag)),
            _ => (name, None),
        };
        if tag.is_some_and(|tag| !is_tag(tag)) {
            return Err("its tag is not letters, digits, '_', '.', '-' (at most 128)".into());
        }
        let (registry, repository) = split_registry(path);
        if repository.is_empty() || repository.len() > REPOSITORY_BYTES {
            return Err("its name has not 1 to 255 characters".into());
        }
        if !repository.split('/').all(is_name_component) {
            return Err(
                "its name is not lower-case letters and digits, parted by '/', '.', '_', \
                 '__' or '-'"
                    .into(),
            );
        }
        if !is_host(&registry) {
            return Err(format!("{registry:?} is not a registry's host"));
        }
        let tag = tag.map(str::to_owned);
        let tag = tag.or_else(|| digest.is_none().then(|| "latest".to_owned()));
        Ok(Self {
            registry,
            repository,
            tag,
            digest: digest.map(str::to_owned),
        })
    }
}

impl fmt::Display for RegistryRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

/// The first part is a registry's host if it looks like one: it has a dot or a port, or is localhost.
fn split_registry(path: &str) -> (String, String) {
    if let Some((host, rest)) = path.split_once('/')
        && (host.contains(['.', ':']) || host == "localhost")
    {
        if matches!(host, "docker.io" | "index.docker.io") {
            return ("docker.io".to_owned(), in_library(rest));
        }
        return (host.to_owned(), rest.to_owned());
    }
    ("docker.io".to_owned(), in_library(path))
}

fn in_library(name: &str) -> String {
    if name.contains('/') || name.is_empty() {
        name.to_owned()
    } else {
        format!("library/{name}")
    }
}

fn is_tag(tag: &str) -> bool {
    let word = |c: u8| c.is_ascii_alphanumeric() || c == b'_';
    tag.len() <= TAG_BYTES
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|c| word(c) || matches!(c, b'.' | b'-'))
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*` of the distribution specification.
fn is_name_component(name: &str) -> bool {
    let alnum = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    let ends = |c: Option<u8>| c.is_some_and(alnum);
    ends(name.bytes().next())
        && ends(name.bytes().next_back())
        && name
            .bytes()
            .all(|c| alnum(c) || matches!(c, b'.' | b'_' | b'-'))
        && name
            .split(|c: char| c.is_ascii_alphanumeric())
            .all(|separator| {
                matches!(separator, "" | "." | "_" | "__") || separator.bytes().all(|c| c == b'-')
            })
}

fn is_host(host: &str) -> bool {
    let (name, port) = match host.split_once(':') {
        Some((name, port)) => (name, Some(port)),
        None => (host, None),
    };
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|c| c.is_ascii_alphanumeric() || c == b'-')
    };
    name.len() <= 253
        && name.split('.').all(label)
        && port.is_none_or(|port| {
            port.bytes().all(|c| c.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|p| p != 0)
        })
}

#[cfg(test)]
#[path = "reference_tests.rs"]
mod tests;
