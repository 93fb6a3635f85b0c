//! Why something of a sandbox failed.

use std::io;

use crate::error::ErrorKind;
use crate::{hypervisor, image, network};

/// A failure of a sandbox or of something in it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The caller's fault, or the state's: the message says which.
    #[error("{message}")]
    State {
        /// Its kind.
        kind: ErrorKind,
        /// What was being done, on what, and why it failed.
        message: String,
    },
    /// A system call on the host failed.
    #[error("{action}: {source}")]
    Host {
        /// What was being done, on what.
        action: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The hypervisor failed.
    #[error(transparent)]
    Hypervisor(#[from] hypervisor::Error),
    /// The network namespace is not usable.
    #[error(transparent)]
    Network(#[from] network::Error),
    /// The image or bundle is not usable.
    #[error(transparent)]
    Image(#[from] image::Error),
    /// A process could not be started because of its command.
    #[error("{message}")]
    Start {
        /// What is wrong with the command.
        failure: StartFailure,
        /// What was being done, on what, and why it failed.
        message: String,
    },
    /// The agent in the guest refused or could not do something.
    #[error("{action}: {message}")]
    Agent {
        /// What was being done, on what.
        action: String,
        /// The kind that the agent gave.
        kind: ErrorKind,
        /// Its reason.
        message: String,
    },
}

/// What is wrong with a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StartFailure {
    /// There is no such file.
    NotFound,
    /// The file cannot be executed.
    NotExecutable,
}

impl Error {
    /// The kind of this failure.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::State { kind, .. } | Self::Agent { kind, .. } => *kind,
            Self::Host { source, .. } => ErrorKind::from(source),
            Self::Start {
                failure: StartFailure::NotFound,
                ..
            } => ErrorKind::NotFound,
            Self::Start { .. } => ErrorKind::FailedPrecondition,
            Self::Hypervisor(error) => error.kind(),
            Self::Network(error) => error.kind(),
            Self::Image(error) => error.kind(),
        }
    }

    /// A failed system call.
    pub(crate) fn host(action: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Host {
            action: action.into(),
            source: source.into(),
        }
    }

    pub(crate) fn state(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self::State {
            kind,
            message: message.into(),
        }
    }

    /// Whether a process could not be started because of its command, as the shells and `docker run` tell it.
    pub fn start_failure(&self) -> Option<StartFailure> {
        match self {
            Self::Start { failure, .. } => Some(*failure),
            _ => None,
        }
    }

    /// What ttrpc says of a failed call that makes or starts a process. The agent answers `NOT_FOUND` and
    /// `PERMISSION_DENIED` to these for the command alone.
    pub(crate) fn starting(action: impl Into<String>, error: ttrpc::Error) -> Self {
        let failure = match &error {
            ttrpc::Error::RpcStatus(status) => match status.code() {
                ttrpc::Code::NOT_FOUND => Some(StartFailure::NotFound),
                ttrpc::Code::PERMISSION_DENIED => Some(StartFailure::NotExecutable),
                _ => None,
            },
            _ => None,
        };
        match (failure, Self::agent(action, error)) {
            (Some(failure), error) => Self::Start {
                failure,
                message: error.to_string(),
            },
            (None, error) => error,
        }
    }

    /// What ttrpc says of a failed call to the agent.
    pub(crate) fn agent(action: impl Into<String>, error: ttrpc::Error) -> Self {
        let action = action.into();
        match error {
            ttrpc::Error::RpcStatus(status) => Self::Agent {
                action,
                kind: kind_of(status.code()),
                message: status.message,
            },
            other => Self::Agent {
                action,
                kind: ErrorKind::Unavailable,
                message: format!("the agent is gone: {other}"),
            },
        }
    }
}

fn kind_of(code: ttrpc::Code) -> ErrorKind {
    match code {
        ttrpc::Code::NOT_FOUND => ErrorKind::NotFound,
        ttrpc::Code::ALREADY_EXISTS => ErrorKind::AlreadyExists,
        ttrpc::Code::FAILED_PRECONDITION => ErrorKind::FailedPrecondition,
        ttrpc::Code::INVALID_ARGUMENT | ttrpc::Code::OUT_OF_RANGE => ErrorKind::InvalidArgument,
        ttrpc::Code::RESOURCE_EXHAUSTED => ErrorKind::ResourceExhausted,
        ttrpc::Code::UNAVAILABLE | ttrpc::Code::CANCELLED => ErrorKind::Unavailable,
        ttrpc::Code::DEADLINE_EXCEEDED => ErrorKind::DeadlineExceeded,
        ttrpc::Code::UNIMPLEMENTED => ErrorKind::Unimplemented,
        _ => ErrorKind::Internal,
    }
}
