//! Digests of blobs, and readers that check them.

use std::fmt;
use std::io::{self, Read};

use sha2::{Digest as _, Sha256};

use super::error::{Error, Result};
use super::tar_reader::Skip;

/// A sha256 digest: the only algorithm that images in use have.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Sha256Digest {
    hex: String,
}

impl Sha256Digest {
    /// Reads `sha256:` and 64 lower-case hexadecimal digits. `what` names its owner in an error.
    pub fn parse(text: &str, what: &str) -> Result<Self> {
        let (algorithm, hex) = text
            .split_once(':')
            .ok_or_else(|| Error::malformed(what, format!("{text:?} is not a digest")))?;
        if algorithm != "sha256" {
            return Err(Error::Unsupported(format!(
                "{what}: digests by {algorithm:?} are not supported, only sha256"
            )));
        }
        Self::from_hex(hex).ok_or_else(|| {
            Error::malformed(
                what,
                format!("{text:?} is not sha256: and 64 hexadecimal digits"),
            )
        })
    }

    /// A digest from its hexadecimal digits alone, as file names have it.
    pub fn from_hex(hex: &str) -> Option<Self> {
        is_hex_sha256(hex).then(|| Self {
            hex: hex.to_owned(),
        })
    }

    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self::finish(Sha256::new_with_prefix(bytes))
    }

    /// The 64 hexadecimal digits; safe as a file's name.
    pub fn hex(&self) -> &str {
        &self.hex
    }

    fn finish(hasher: Sha256) -> Self {
        use std::fmt::Write as _;
        let mut hex = String::with_capacity(64);
        for byte in hasher.finalize() {
            // Writing to a String cannot fail.
            let _ = write!(hex, "{byte:02x}");
        }
        Self { hex }
    }
}

impl fmt::Display for Sha256Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex)
    }
}

/// Whether `text` is 64 lower-case hexadecimal digits.
pub(crate) fn is_hex_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f'))
}

/// What a blob must be.
#[derive(Clone, Debug, Default)]
pub(crate) struct Expected {
    /// Its digest, where what refers to it knows one.
    pub digest: Option<Sha256Digest>,
    /// Its size in bytes, likewise.
    pub size: Option<u64>,
}

/// A reader that hashes and counts what passes. It reads one byte past the expected size at most, so
/// that a blob longer than it should be costs nothing.
pub(crate) struct Verifier<R> {
    inner: R,
    hasher: Sha256,
    count: u64,
    cap: u64,
}

impl<R: Read> Verifier<R> {
    /// Wraps `inner`; no more than `cap` and one bytes are read from it.
    pub fn new(inner: R, cap: u64) -> Self {
        Self {
            inner,
            hasher: Sha256::new(),
            count: 0,
            cap,
        }
    }

    /// Bytes that passed.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The reader, and the digest of what passed.
    pub fn into_parts(self) -> (R, Sha256Digest) {
        (self.inner, Sha256Digest::finish(self.hasher))
    }

    /// Reads what is left, and compares the whole with `expected`.
    pub fn verify(mut self, what: &str, expected: &Expected) -> Result<Sha256Digest> {
        let rest = io::copy(&mut self, &mut io::sink());
        if let Err(source) = rest {
            return Err(Error::Io {
                action: "read",
                path: what.into(),
                source,
            });
        }
        if let Some(size) = expected.size
            && size != self.count
        {
            return Err(Error::Size {
                what: what.into(),
                expected: size,
                found: self.count,
            });
        }
        if self.count > self.cap {
            return Err(Error::limit(what, format!("{} bytes", self.cap)));
        }
        let found = Sha256Digest::finish(self.hasher);
        match &expected.digest {
            Some(digest) if *digest != found => Err(Error::Digest {
                what: what.into(),
                expected: digest.to_string(),
                found: found.to_string(),
            }),
            _ => Ok(found),
        }
    }
}

impl<R: Read> Read for Verifier<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.cap.saturating_add(1).saturating_sub(self.count);
        let room = usize::try_from(left)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let Some(window) = buffer.get_mut(..room) else {
            return Ok(0);
        };
        let read = self.inner.read(window)?;
        if let Some(bytes) = window.get(..read) {
            self.hasher.update(bytes);
        }
        self.count = self.count.saturating_add(read as u64);
        Ok(read)
    }
}

impl<R: Read> Skip for Verifier<R> {}
impl<R: Read> Skip for &mut Verifier<R> {}

/// Reads a small blob whole, and checks it. `cap` bounds its size whatever `expected` says.
pub(crate) fn read_verified(
    reader: impl Read,
    what: &str,
    expected: &Expected,
    cap: u64,
) -> Result<(Vec<u8>, Sha256Digest)> {
    if expected.size.is_some_and(|size| size > cap) {
        return Err(Error::limit(what, format!("{cap} bytes")));
    }
    let mut verifier = Verifier::new(reader, expected.size.unwrap_or(cap));
    let mut bytes = Vec::new();
    if let Err(source) = verifier.read_to_end(&mut bytes) {
        return Err(Error::Io {
            action: "read",
            path: what.into(),
            source,
        });
    }
    let digest = verifier.verify(what, expected)?;
    Ok((bytes, digest))
}
