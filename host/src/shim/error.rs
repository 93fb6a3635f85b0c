//! Errors on their way to containerd: the kind as ttrpc's code, the whole chain as the message.

use ttrpc::{Code, get_status};

use crate::error::{ErrorKind, chain};
use crate::sandbox::Error;

/// The answer that a failed call gets.
pub fn status(error: &Error) -> ttrpc::Error {
    tracing::debug!("answering {}: {error}", error.kind());
    ttrpc::Error::RpcStatus(get_status(code(error.kind()), chain(error)))
}

/// A refusal of the shim's own.
pub fn refuse(kind: ErrorKind, message: impl Into<String>) -> Error {
    Error::state(kind, message)
}

fn code(kind: ErrorKind) -> Code {
    match kind {
        ErrorKind::NotFound => Code::NOT_FOUND,
        ErrorKind::AlreadyExists => Code::ALREADY_EXISTS,
        ErrorKind::FailedPrecondition => Code::FAILED_PRECONDITION,
        ErrorKind::InvalidArgument => Code::INVALID_ARGUMENT,
        ErrorKind::ResourceExhausted => Code::RESOURCE_EXHAUSTED,
        ErrorKind::Unavailable => Code::UNAVAILABLE,
        ErrorKind::DeadlineExceeded => Code::DEADLINE_EXCEEDED,
        ErrorKind::Unimplemented => Code::UNIMPLEMENTED,
        ErrorKind::Internal => Code::INTERNAL,
    }
}
