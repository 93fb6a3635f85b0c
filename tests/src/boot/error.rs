//! Why nothing was measured, or nothing compared.

use std::io;
use std::path::PathBuf;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The machine lacks something: no failure, but a reason to skip.
    #[error("{0}")]
    Missing(String),
    /// A file or a program.
    #[error("{doing} {what}")]
    System {
        /// What was being done.
        doing: &'static str,
        /// On what.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// A program that ended badly.
    #[error("{what} failed: {said}")]
    Program {
        /// The program, and what for.
        what: &'static str,
        /// Its status and what it said.
        said: String,
    },
    /// The guest or the plugin did not tell what was expected.
    #[error("counting: {0}")]
    Count(String),
    /// The budget's file.
    #[error("the budget {}: {why}", path.display())]
    Budget {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The container's specification.
    #[error("making the measured container's specification")]
    Specification(#[from] cella_host::image::Error),
}

impl Error {
    /// For a file or a program.
    pub fn system<W: ToString>(
        doing: &'static str,
        what: W,
    ) -> impl FnOnce(io::Error) -> Self + use<W> {
        let what = what.to_string();
        move |source| Self::System {
            doing,
            what,
            source,
        }
    }
}
