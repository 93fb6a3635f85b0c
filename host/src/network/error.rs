//! Why a sandbox has no network.

use std::io;
use std::path::PathBuf;

use crate::error::ErrorKind;

/// A network namespace cannot be used, or something in it failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The path leads to no network namespace.
    #[error("network namespace {}: {source}", path.display())]
    NoNamespace {
        /// As it was given.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The path leads to something else.
    #[error("network namespace {}: it is no network namespace", path.display())]
    NotANamespace {
        /// As it was given.
        path: PathBuf,
    },
    /// The path leads to the namespace that Cella itself runs in.
    #[error(
        "network namespace {}: it is the host's own; a sandbox has a network of its own and cannot use the host's",
        path.display()
    )]
    Host {
        /// As it was given.
        path: PathBuf,
    },
    /// Another sandbox has it.
    #[error("network namespace {}: another sandbox uses it", path.display())]
    InUse {
        /// As it was given.
        path: PathBuf,
    },
    /// It has something that a sandbox cannot have.
    #[error("network namespace {}: {what}", path.display())]
    Unsupported {
        /// As it was given.
        path: PathBuf,
        /// What that is.
        what: String,
    },
    /// An interface that is of no namespace yet could not be made.
    #[error("making a network interface: {0}")]
    Spare(#[source] io::Error),
    /// A system call failed.
    #[error("network namespace {}: {action}: {source}", path.display())]
    System {
        /// As it was given.
        path: PathBuf,
        /// What was being done, on what.
        action: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// The kind of this failure.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NoNamespace { source, .. }
            | Self::System { source, .. }
            | Self::Spare(source) => ErrorKind::from(source),
            Self::NotANamespace { .. } => ErrorKind::InvalidArgument,
            Self::Host { .. } | Self::Unsupported { .. } => ErrorKind::Unimplemented,
            Self::InUse { .. } => ErrorKind::FailedPrecondition,
        }
    }
}
