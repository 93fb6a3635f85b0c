//! What can go wrong while the jail is closed.

use std::io;

/// Why a process or a thread could not be jailed.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// The caller asked for a jail that cannot be.
    #[error("jail: {0}")]
    Invalid(String),
    /// The host refused a step.
    #[error("jail: {action}: {source}")]
    Host {
        /// What was being done, on what.
        action: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The host has Landlock but refused a rule.
    #[error("jail: restricting what may be opened with Landlock: {0}")]
    Landlock(#[from] landlock::RulesetError),
    /// The shared or the socket directory could not be opened for a Landlock rule.
    #[error("jail: opening a directory for a Landlock rule: {0}")]
    LandlockPath(#[from] landlock::PathFdError),
    /// A filter could not be built.
    #[error("jail: building the system call filter of a {kind:?} thread: {source}")]
    Filter {
        /// Whose filter.
        kind: super::ThreadKind,
        /// What is wrong with it.
        #[source]
        source: seccompiler::BackendError,
    },
    /// A filter could not be installed.
    #[error("jail: installing the system call filter of a {kind:?} thread: {source}")]
    Install {
        /// Whose filter.
        kind: super::ThreadKind,
        /// Why the kernel refused it.
        #[source]
        source: seccompiler::Error,
    },
}

/// Says what was being done when the host refused it.
pub(super) trait Doing<T> {
    /// Turns the error into a [`JailError::Host`].
    fn doing(self, action: impl Into<String>) -> Result<T, JailError>;
}

impl<T, E: Into<io::Error>> Doing<T> for Result<T, E> {
    fn doing(self, action: impl Into<String>) -> Result<T, JailError> {
        self.map_err(|source| JailError::Host {
            action: action.into(),
            source: source.into(),
        })
    }
}

/// The result of a C library call that returns -1 and sets `errno`.
pub(super) fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}
