//! Templates: booted guests whose agent waits, saved once, from which sandboxes are cloned.
//!
//! A template is good for one guest kernel, guest image, VMM, shape and host processor; what it is good for is hashed into its
//! name. It is built by whoever needs it first, beside that one's own cold boot, and used from then on.
//!
//! | file | what lives there |
//! | --- | --- |
//! | [`key`] | what a template is good for |
//! | [`store`] | the templates on disk |
//! | [`build`] | how one is made |
//! | `rehearsal` | a container before the first |
//! | [`background`] | how one is made for the next sandbox |

pub mod background;
pub mod build;
pub mod key;
mod rehearsal;
pub mod store;

use std::path::PathBuf;

pub use build::{Built, build};
pub use key::{Key, Shape};
pub use store::{Listed, Store};

use crate::error::ErrorKind;
use crate::{hypervisor, sandbox};

/// Why there is no template.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or directory cannot be used.
    #[error("{action} {}: {source}", path.display())]
    File {
        /// What was being done.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// There is no template of that name.
    #[error("there is no template {0}")]
    NotFound(String),
    /// The machine to be saved could not be booted or saved.
    #[error("building a template: {0}")]
    Hypervisor(#[from] hypervisor::Error),
    /// Its directory or its agent failed.
    #[error("building a template: {0}")]
    Sandbox(#[from] sandbox::Error),
    /// It did not get as far as it should.
    #[error("building a template: {0}")]
    Guest(String),
}

impl Error {
    /// The kind of this failure.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::File { source, .. } => ErrorKind::from(source),
            Self::NotFound(_) => ErrorKind::NotFound,
            Self::Hypervisor(error) => error.kind(),
            Self::Sandbox(error) => error.kind(),
            Self::Guest(_) => ErrorKind::Unavailable,
        }
    }

    fn file(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::File {
            action,
            path,
            source,
        }
    }
}
