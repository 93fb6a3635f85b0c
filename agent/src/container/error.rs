//! What can go wrong with a container, kept by kind all the way to the caller.

use std::io;
use std::path::PathBuf;

/// The kinds of failure the server maps to ttrpc status codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The caller asked for something malformed or unsupported.
    InvalidArgument,
    /// The command does not exist in the container. Nothing else has this kind (exit status 127).
    NotFound,
    /// The command exists and cannot be executed. Nothing else has this kind (exit status 126).
    PermissionDenied,
    /// The container is not in a state that allows the operation.
    FailedPrecondition,
    /// Something took longer than its limit.
    DeadlineExceeded,
    /// Memory, pids or another limit is used up.
    ResourceExhausted,
    /// Anything else: the guest's fault, not the caller's.
    Internal,
}

/// Result of the container library.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a container operation failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A field of the OCI spec is malformed or contradicts another.
    #[error("invalid spec: {field}: {reason}")]
    InvalidSpec {
        /// The field, in the spec's JSON words.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The spec asks for something this runtime refuses.
    #[error("unsupported: {field}: {reason}")]
    Unsupported {
        /// The field, in the spec's JSON words.
        field: String,
        /// Why it is refused.
        reason: String,
    },
    /// `args[0]` names no file in the container.
    #[error("exec {command:?}: command not found in the container")]
    CommandNotFound {
        /// `args[0]`.
        command: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// `args[0]` names something that cannot be executed by the container's user.
    #[error("exec {command:?}: command is not executable")]
    NotExecutable {
        /// `args[0]`.
        command: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The working directory cannot be entered.
    #[error("entering working directory {}", path.display())]
    WorkingDirectory {
        /// `process.cwd`.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The user or its groups cannot be taken on.
    #[error("becoming user {uid}:{gid} ({step})")]
    User {
        /// `process.user.uid`.
        uid: u32,
        /// `process.user.gid`.
        gid: u32,
        /// The failing step.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// A mount of the spec failed.
    #[error("mounting {mount_source:?} on {} ({step})", destination.display())]
    Mount {
        /// `mounts[].source`.
        mount_source: String,
        /// `mounts[].destination`.
        destination: PathBuf,
        /// The failing step.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The root filesystem could not be set up.
    #[error("setting up root filesystem: {step} {}", path.display())]
    Rootfs {
        /// What was being done.
        step: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A namespace could not be made or joined.
    #[error("namespaces: {step}")]
    Namespace {
        /// What was being done, on what.
        step: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The system call filter could not be built or loaded.
    #[error("seccomp: {step}")]
    Seccomp {
        /// What was being done.
        step: String,
        /// The cause.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A cgroup file could not be read or written.
    #[error("cgroup: {step} {}", path.display())]
    Cgroup {
        /// What was being done.
        step: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A hook failed.
    #[error("{name} hook {}: {reason}", path.display())]
    Hook {
        /// `createRuntime`, `poststop`...
        name: &'static str,
        /// The hook's program.
        path: PathBuf,
        /// How it failed.
        reason: String,
        /// It ran into its timeout.
        timed_out: bool,
    },
    /// The container's terminal could not be made.
    #[error("terminal: {step}")]
    Terminal {
        /// What was being done.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// A process attribute (capability, rlimit, sysctl...) could not be set, or a process not made.
    #[error("process: {step}")]
    Process {
        /// What was being done, on what.
        step: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The operation needs another state of the container.
    #[error("container {id}: cannot {action}: it is {state}")]
    State {
        /// The container.
        id: String,
        /// What was asked.
        action: &'static str,
        /// What the container is.
        state: &'static str,
    },
    /// Something did not happen in time.
    #[error("container {id}: {action} took longer than {limit_ms} ms")]
    Timeout {
        /// The container.
        id: String,
        /// What was being waited for.
        action: &'static str,
        /// The limit.
        limit_ms: u64,
    },
    /// The new process died before it could say why.
    #[error("the new process ended before its command was executed")]
    Died,
}

impl Error {
    /// The failure's kind, for the wire.
    pub fn kind(&self) -> Kind {
        match self {
            Self::InvalidSpec { .. }
            | Self::Unsupported { .. }
            | Self::WorkingDirectory { .. }
            | Self::User { .. } => Kind::InvalidArgument,
            Self::CommandNotFound { .. } => Kind::NotFound,
            Self::NotExecutable { .. } => Kind::PermissionDenied,
            Self::State { .. } => Kind::FailedPrecondition,
            Self::Timeout { .. } => Kind::DeadlineExceeded,
            Self::Hook {
                timed_out: true, ..
            } => Kind::DeadlineExceeded,
            Self::Mount { source, .. } => match source.raw_os_error() {
                Some(libc::ENOMEM | libc::ENOSPC) => Kind::ResourceExhausted,
                _ => Kind::InvalidArgument,
            },
            Self::Process { source, .. } | Self::Cgroup { source, .. } => {
                match source.raw_os_error() {
                    Some(libc::EAGAIN | libc::ENOMEM | libc::EMFILE | libc::ENFILE) => {
                        Kind::ResourceExhausted
                    }
                    Some(libc::EINVAL | libc::ERANGE | libc::EPERM) => Kind::InvalidArgument,
                    _ => Kind::Internal,
                }
            }
            Self::Rootfs { .. }
            | Self::Namespace { .. }
            | Self::Seccomp { .. }
            | Self::Hook { .. }
            | Self::Terminal { .. }
            | Self::Died => Kind::Internal,
        }
    }

    pub(crate) fn invalid(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::InvalidSpec {
            field: field.into(),
            reason: reason.into(),
        }
    }

    pub(crate) fn unsupported(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Unsupported {
            field: field.into(),
            reason: reason.into(),
        }
    }
}
