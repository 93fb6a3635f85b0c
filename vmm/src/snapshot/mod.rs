//! A machine on disk: the state file, whose content `snapshot.proto` describes, and the file of the guest's memory.
//!
//! | module | what lives there |
//! | --- | --- |
//! | [`file`] | the state file's frame: magic, version, digest |
//! | [`pages`] | which pages are written, and the samples by which a memory file is recognised |
//! | [`error`] | why a snapshot is refused |
//!
//! What the parts of a machine save is beside them: [`crate::vcpu::state`], [`crate::machine`], [`crate::transport::mmio`].

pub mod error;
pub mod file;
pub mod pages;

pub use error::SnapshotError;

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// The bytes of one of KVM's structures.
pub(crate) fn bytes<T: IntoBytes + Immutable>(value: &T) -> Vec<u8> {
    value.as_bytes().to_vec()
}

/// One of KVM's structures from its bytes; `what` names it.
pub(crate) fn value<T: FromBytes>(bytes: &[u8], what: &'static str) -> Result<T, SnapshotError> {
    T::read_from_bytes(bytes).map_err(|_| SnapshotError::Part { what })
}
