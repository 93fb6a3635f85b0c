//! What can go wrong with an image, and of what kind that is.

use std::io;
use std::path::{Path, PathBuf};

use crate::error::ErrorKind;

/// The result of this module's functions.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an image, a bundle or a root file system could not be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The text is not an image reference.
    #[error("image reference {reference:?}: {reason}")]
    Reference {
        /// The text as it was given.
        reference: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A thing that was named, or that the image itself names, is not there.
    #[error("{what} is not in {place}")]
    Missing {
        /// What was looked for.
        what: String,
        /// Where.
        place: String,
    },
    /// A document (manifest, index, configuration, archive) is not what it should be.
    #[error("{what}: {reason}")]
    Malformed {
        /// Which document, of which image.
        what: String,
        /// What is wrong with it, with the field where there is one.
        reason: String,
    },
    /// A blob's content has another digest than the one it is known by.
    #[error("{what} is corrupt: its content has the digest {found}, not {expected}")]
    Digest {
        /// Which blob.
        what: String,
        /// The digest it must have.
        expected: String,
        /// The digest it has.
        found: String,
    },
    /// A blob is shorter or longer than what refers to it says.
    #[error("{what} is corrupt: it has {found} bytes, not {expected}")]
    Size {
        /// Which blob.
        what: String,
        /// Bytes it must have.
        expected: u64,
        /// Bytes it has; for a blob that is too long, the count at which reading stopped.
        found: u64,
    },
    /// One of Cella's caps on sizes and counts was passed.
    #[error("{what} has more than {limit}")]
    Limit {
        /// What is too large.
        what: String,
        /// The cap, with its unit.
        limit: String,
    },
    /// An entry of a layer cannot be unpacked because of what it asks for.
    #[error("layer {layer}: entry {entry:?}: {reason}")]
    Entry {
        /// The layer's diff id.
        layer: String,
        /// The entry's name as it is in the archive.
        entry: String,
        /// Why it was refused.
        reason: String,
    },
    /// The host failed to make what an entry of a layer asks for.
    #[error("layer {layer}: entry {entry:?}: {action}")]
    EntryIo {
        /// The layer's diff id.
        layer: String,
        /// The entry's name as it is in the archive.
        entry: String,
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// Nothing is wrong with it, but Cella cannot do it.
    #[error("{0}")]
    Unsupported(String),
    /// The user or group that a process is to run as cannot be found out.
    #[error("user {user:?}: {reason}")]
    User {
        /// The user as it was given.
        user: String,
        /// What is wrong with it.
        reason: String,
        /// Whether the user is well formed and just does not exist.
        missing: bool,
    },
    /// An option of the container is wrong.
    #[error("{what}: {reason}")]
    Option {
        /// Which option.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A system call failed.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried, as a verb: `read`, `make the directory`.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

impl Error {
    /// What kind of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Missing { .. } | Self::User { missing: true, .. } => ErrorKind::NotFound,
            Self::Reference { .. }
            | Self::Malformed { .. }
            | Self::Digest { .. }
            | Self::Size { .. }
            | Self::Entry { .. }
            | Self::Option { .. }
            | Self::User { .. } => ErrorKind::InvalidArgument,
            Self::Limit { .. } => ErrorKind::ResourceExhausted,
            Self::Unsupported(_) => ErrorKind::Unimplemented,
            Self::Io { source, .. } | Self::EntryIo { source, .. } => ErrorKind::from(source),
        }
    }

    /// The message with those of all its causes, on one line.
    pub fn chain(&self) -> String {
        crate::error::chain(self)
    }

    pub(crate) fn malformed(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Malformed {
            what: what.into(),
            reason: reason.into(),
        }
    }

    pub(crate) fn limit(what: impl Into<String>, limit: impl Into<String>) -> Self {
        Self::Limit {
            what: what.into(),
            limit: limit.into(),
        }
    }

    pub(crate) fn option(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Option {
            what: what.into(),
            reason: reason.into(),
        }
    }
}

/// Gives a failed system call its words: what was tried, and on what.
pub(crate) trait Context<T> {
    /// Names the action and its object.
    fn context(self, action: &'static str, path: impl AsRef<Path>) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn context(self, action: &'static str, path: impl AsRef<Path>) -> Result<T> {
        self.map_err(|error| Error::Io {
            action,
            path: path.as_ref().to_path_buf(),
            source: error.into(),
        })
    }
}
