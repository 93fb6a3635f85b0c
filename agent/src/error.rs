//! The one place where an error gets its ttrpc code (docs/design.md, decision 8).

use std::error::Error as StdError;
use std::fmt::Write as _;
use std::io;

use ttrpc::Code;

use crate::container::{self, Kind};
use crate::{guest, network, sandbox, streams, workers};

/// Why a request could not be served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No container has this id.
    #[error("container {0:?} does not exist")]
    NoContainer(String),
    /// The container has no such process.
    #[error("container {container:?} has no process {exec:?}")]
    NoProcess {
        /// The container's id.
        container: String,
        /// The exec id.
        exec: String,
    },
    /// The id is in use.
    #[error("container {0:?} exists already")]
    ContainerExists(String),
    /// The exec id is in use.
    #[error("container {container:?} has a process {exec:?} already")]
    ProcessExists {
        /// The container's id.
        container: String,
        /// The exec id.
        exec: String,
    },
    /// The thing is not in the state that the operation takes.
    #[error("{operation} {what}: {state}")]
    State {
        /// What was asked for.
        operation: &'static str,
        /// Of what.
        what: String,
        /// Why it cannot be.
        state: &'static str,
    },
    /// The request does not make sense.
    #[error("{what}: {why}")]
    Invalid {
        /// Which part of it.
        what: String,
        /// What is wrong with it.
        why: String,
    },
    /// The process has ended, which is no longer there to be signalled.
    #[error("{0} has ended")]
    Ended(String),
    /// The container library.
    #[error("{what}")]
    Container {
        /// What was being done.
        what: String,
        /// Why it failed.
        source: container::Error,
    },
    /// No thread for it.
    #[error("{what}")]
    Workers {
        /// What was being done.
        what: String,
        /// Why there is none.
        source: workers::Error,
    },
    /// Standard streams.
    #[error("connecting the standard streams of {what}")]
    Streams {
        /// Of which process.
        what: String,
        /// Why.
        source: streams::Error,
    },
    /// The sandbox.
    #[error("setting the sandbox up")]
    Sandbox(#[from] sandbox::Error),
    /// The guest's own file systems.
    #[error(transparent)]
    Guest(#[from] guest::Error),
    /// Counters of the network.
    #[error("reading the network's counters")]
    Network(#[from] network::Error),
    /// The kernel refuses.
    #[error("{what}")]
    System {
        /// What was being done.
        what: String,
        /// What the kernel says.
        source: io::Error,
    },
}

impl Error {
    /// The ttrpc code of this kind of error.
    pub fn code(&self) -> Code {
        match self {
            Error::NoContainer(_) | Error::NoProcess { .. } | Error::Ended(_) => Code::NOT_FOUND,
            Error::ContainerExists(_) | Error::ProcessExists { .. } => Code::ALREADY_EXISTS,
            Error::State { .. } => Code::FAILED_PRECONDITION,
            Error::Invalid { .. } => Code::INVALID_ARGUMENT,
            Error::Container { source, .. } => container_code(source.kind()),
            Error::Workers { source, .. } => workers_code(source),
            Error::Streams { source, .. } => streams_code(source),
            Error::Sandbox(sandbox::Error::Invalid { .. }) => Code::INVALID_ARGUMENT,
            Error::Sandbox(sandbox::Error::System { source, .. }) => io_code(source),
            Error::Sandbox(sandbox::Error::Network(error)) | Error::Network(error) => {
                network_code(error)
            }
            Error::Guest(_) => Code::INTERNAL,
            Error::System { source, .. } => io_code(source),
        }
    }

    /// The message with its whole chain of causes: what was being done, on what, why it failed.
    pub fn message(&self) -> String {
        let mut message = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            // A String takes everything.
            let _ = write!(message, ": {error}");
            cause = error.source();
        }
        message
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        ttrpc::Error::RpcStatus(ttrpc::get_status(error.code(), error.message()))
    }
}

fn container_code(kind: Kind) -> Code {
    match kind {
        Kind::InvalidArgument => Code::INVALID_ARGUMENT,
        Kind::NotFound => Code::NOT_FOUND,
        Kind::PermissionDenied => Code::PERMISSION_DENIED,
        Kind::FailedPrecondition => Code::FAILED_PRECONDITION,
        Kind::DeadlineExceeded => Code::DEADLINE_EXCEEDED,
        Kind::ResourceExhausted => Code::RESOURCE_EXHAUSTED,
        Kind::Internal => Code::INTERNAL,
    }
}

fn workers_code(error: &workers::Error) -> Code {
    match error {
        workers::Error::Busy(_) | workers::Error::Thread(_) => Code::RESOURCE_EXHAUSTED,
        workers::Error::Lost => Code::INTERNAL,
    }
}

fn streams_code(error: &streams::Error) -> Code {
    match error {
        streams::Error::Invalid { .. } => Code::INVALID_ARGUMENT,
        streams::Error::Connect { .. } => Code::UNAVAILABLE,
        streams::Error::System { source, .. } => io_code(source),
    }
}

fn network_code(error: &network::Error) -> Code {
    match error {
        network::Error::Invalid { .. } => Code::INVALID_ARGUMENT,
        network::Error::NoDevice { .. } => Code::NOT_FOUND,
        network::Error::Kernel { source, .. } => io_code(source),
    }
}

/// The kind of a system call's failure, as far as its number tells.
fn io_code(error: &io::Error) -> Code {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ESRCH | libc::ENODEV | libc::ENXIO) => Code::NOT_FOUND,
        Some(libc::EEXIST) => Code::ALREADY_EXISTS,
        Some(libc::EINVAL | libc::ENAMETOOLONG | libc::ERANGE | libc::E2BIG) => {
            Code::INVALID_ARGUMENT
        }
        Some(libc::EBUSY | libc::ENOTEMPTY) => Code::FAILED_PRECONDITION,
        Some(libc::ENOMEM | libc::ENOSPC | libc::EMFILE | libc::ENFILE | libc::EDQUOT) => {
            Code::RESOURCE_EXHAUSTED
        }
        Some(libc::ETIMEDOUT) => Code::DEADLINE_EXCEEDED,
        _ => Code::INTERNAL,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_says_what_and_why() {
        let error = Error::from(sandbox::Error::System {
            doing: "mounting",
            what: "share (virtiofs) on /run/cella/share".to_owned(),
            source: io::Error::from_raw_os_error(libc::ENODEV),
        });
        assert_eq!(
            error.message(),
            "setting the sandbox up: mounting share (virtiofs) on /run/cella/share: No such device (os error 19)"
        );
        assert_eq!(error.code(), Code::NOT_FOUND);
    }
}
