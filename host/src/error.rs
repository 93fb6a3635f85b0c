//! The kinds that an error keeps from where it happened to whoever asked (docs/errors.md).

/// What kind of failure an error is, whichever module it comes from. The words are those of gRPC's status codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// What was asked for does not exist.
    NotFound,
    /// The id is in use.
    AlreadyExists,
    /// The system is not in the state that the call needs.
    FailedPrecondition,
    /// The caller's input is wrong, whatever the state.
    InvalidArgument,
    /// A limit is reached: memory, descriptors, space.
    ResourceExhausted,
    /// The other side is gone; trying again may help.
    Unavailable,
    /// It took longer than allowed.
    DeadlineExceeded,
    /// Cella does not do this.
    Unimplemented,
    /// Anything else: a failing host, a bug.
    Internal,
}

impl ErrorKind {
    /// The kind of a failed system call.
    pub fn of_io(error: &std::io::Error) -> Self {
        use std::io::ErrorKind as Io;
        match error.kind() {
            Io::NotFound => Self::NotFound,
            Io::AlreadyExists | Io::AddrInUse => Self::AlreadyExists,
            Io::InvalidInput | Io::InvalidData => Self::InvalidArgument,
            Io::OutOfMemory | Io::StorageFull | Io::QuotaExceeded => Self::ResourceExhausted,
            Io::ConnectionRefused | Io::ConnectionReset | Io::BrokenPipe | Io::UnexpectedEof => {
                Self::Unavailable
            }
            Io::TimedOut => Self::DeadlineExceeded,
            Io::Unsupported => Self::Unimplemented,
            _ => Self::Internal,
        }
    }
}

/// The whole chain of an error in one line: "what: why: why".
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let text = cause.to_string();
        // Some crates repeat their cause in their own message.
        if !line.ends_with(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        next = cause.source();
    }
    line
}
