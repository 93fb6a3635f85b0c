//! The kinds of errors that cross module and process borders.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What sort of failure an error is: what a caller can do about it. Maps one to one to the ttrpc and
/// gRPC status codes of the same names, so that a kind survives from where it arises to the door.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum ErrorKind {
    /// What was named does not exist.
    NotFound,
    /// What was to be made exists already.
    AlreadyExists,
    /// The request is well formed, but the state of the host or of the object does not allow it.
    FailedPrecondition,
    /// The request, or a file that it names, is wrong in itself; trying again cannot help.
    InvalidArgument,
    /// A limit was reached: memory, disk space, file descriptors, or a cap of Cella's own.
    ResourceExhausted,
    /// The other side is not there now; trying again may help.
    Unavailable,
    /// It took longer than it was allowed to.
    DeadlineExceeded,
    /// Well formed and sensible, but not supported.
    Unimplemented,
    /// A fault of Cella or of the system below it.
    Internal,
}

impl ErrorKind {
    /// The name of the kind as users see it in JSON and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotFound => "NotFound",
            Self::AlreadyExists => "AlreadyExists",
            Self::FailedPrecondition => "FailedPrecondition",
            Self::InvalidArgument => "InvalidArgument",
            Self::ResourceExhausted => "ResourceExhausted",
            Self::Unavailable => "Unavailable",
            Self::DeadlineExceeded => "DeadlineExceeded",
            Self::Unimplemented => "Unimplemented",
            Self::Internal => "Internal",
        }
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl From<&std::io::Error> for ErrorKind {
    /// The kind of a system call's failure, for want of better knowledge of what was tried.
    fn from(error: &std::io::Error) -> Self {
        use std::io::ErrorKind as Io;
        match error.kind() {
            Io::NotFound => Self::NotFound,
            Io::AlreadyExists => Self::AlreadyExists,
            Io::PermissionDenied | Io::ReadOnlyFilesystem | Io::ResourceBusy => {
                Self::FailedPrecondition
            }
            Io::StorageFull | Io::QuotaExceeded | Io::OutOfMemory => Self::ResourceExhausted,
            Io::TimedOut => Self::DeadlineExceeded,
            Io::ConnectionRefused | Io::ConnectionReset | Io::BrokenPipe | Io::NotConnected => {
                Self::Unavailable
            }
            _ => match error.raw_os_error() {
                Some(libc::EMFILE | libc::ENFILE) => Self::ResourceExhausted,
                _ => Self::Internal,
            },
        }
    }
}

/// The whole chain of an error in one line: "what: why: why". Control characters, which a name in an
/// image or in a guest may have, are escaped: they would act on the reader's terminal.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let text = cause.to_string();
        // Some errors repeat their cause in their own message.
        if !line.ends_with(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        next = cause.source();
    }
    if !line.contains(char::is_control) {
        return line;
    }
    let mut escaped = String::with_capacity(line.len());
    for c in line.chars() {
        if c.is_control() {
            escaped.extend(c.escape_default());
        } else {
            escaped.push(c);
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Said(&'static str, #[source] std::io::Error);

    #[test]
    fn a_chain_is_one_line_that_acts_on_no_terminal() {
        let cause = || std::io::Error::other("no\nroom");
        assert_eq!(chain(&Said("write x", cause())), "write x: no\\nroom");
        assert_eq!(
            chain(&Said("a \u{1b}[2Jb", cause())),
            "a \\u{1b}[2Jb: no\\nroom"
        );
        // A cause that its effect repeats is said once.
        assert_eq!(chain(&Said("write: no\nroom", cause())), "write: no\\nroom");
    }
}
