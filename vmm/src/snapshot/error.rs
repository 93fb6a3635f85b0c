//! Why a snapshot cannot be used here.

use std::io;

/// Why a snapshot cannot be read, written or used on this host for this machine.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// A file could not be read or written.
    #[error("{action}: {source}")]
    Io {
        /// What was being done, on which file.
        action: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// It does not begin as a state file does.
    #[error("it is no state file of a snapshot")]
    Magic,
    /// Another format.
    #[error("it has format {found}, and this VMM reads format {expected}")]
    Format {
        /// What the file says.
        found: u32,
        /// What is understood.
        expected: u32,
    },
    /// Shorter or longer than it says.
    #[error("it has {found} bytes where {expected} belong: it is truncated or something was added")]
    Length {
        /// Bytes of the file.
        found: u64,
        /// Bytes that it should have.
        expected: u64,
    },
    /// The memory file is of another length than the memory.
    #[error("its memory file has {found} bytes where {expected} belong")]
    MemoryLength {
        /// Bytes of the file.
        found: u64,
        /// Bytes of guest memory.
        expected: u64,
    },
    /// The content is not what was written.
    #[error("its digest does not match: it was altered")]
    Digest,
    /// The digest matches and the content is no message: nothing of ours wrote it.
    #[error("its content cannot be understood: {0}")]
    Content(#[source] protobuf::Error),
    /// Another build of the VMM wrote it.
    #[error("VMM {found} wrote it, and this is VMM {expected}")]
    Version {
        /// Who wrote it.
        found: String,
        /// Who reads it.
        expected: &'static str,
    },
    /// The machine is of another shape.
    #[error("the saved machine has {what} {saved}, and this one {wanted}")]
    Shape {
        /// Which property.
        what: &'static str,
        /// As saved.
        saved: String,
        /// As configured.
        wanted: String,
    },
    /// The processor is another one.
    #[error("it was made on another processor or KVM: {what}")]
    Processor {
        /// What differs.
        what: String,
    },
    /// The memory file is not the one that belongs to the state.
    #[error(
        "its memory file has another content at {offset:#x}: it was altered, or is of another snapshot"
    )]
    Memory {
        /// Where in the file.
        offset: u64,
    },
    /// A part is missing or of a wrong size.
    #[error("{what} is missing in it, or of a wrong size")]
    Part {
        /// Which part.
        what: &'static str,
    },
    /// The machine has something that cannot be saved.
    #[error("{0}")]
    Unsavable(&'static str),
    /// A device does not let itself be saved, or does not take its state back.
    #[error("device {name}: {source}")]
    Device {
        /// The kind of device.
        name: &'static str,
        /// Why.
        #[source]
        source: crate::device::DeviceError,
    },
}

impl SnapshotError {
    pub(crate) fn io(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, source }
    }
}
