//! What can go wrong with a machine.

/// Why the machine could not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MachineError {
    /// Skeleton.
    #[error("not yet")]
    NotYet,
}
