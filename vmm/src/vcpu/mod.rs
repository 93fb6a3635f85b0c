//! A virtual CPU: its thread and states, what each KVM exit means, and what KVM's emulator leaves to us.

pub mod cpuid;
pub mod emulate;
pub mod exit;
pub mod kick;
pub mod setup;
pub mod state;
pub mod thread;

mod stats;

pub use stats::{ExitReason, ExitStats};

/// Why a vCPU could not be made, or not be commanded.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// KVM refused something.
    #[error("vCPU {index}: {action}: {source}")]
    Kvm {
        /// The vCPU.
        index: u32,
        /// What was asked of KVM.
        action: &'static str,
        /// Why it refused.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM did not take a model-specific register.
    #[error("vCPU {index}: KVM does not take its model-specific registers")]
    Msrs {
        /// The vCPU.
        index: u32,
    },
    /// KVM did not take back a model-specific register that it gave.
    #[error(
        "vCPU {index}: KVM does not take the value {value:#x} of model-specific register {msr:#x}"
    )]
    Msr {
        /// The vCPU.
        index: u32,
        /// The register.
        msr: u32,
        /// What it should hold.
        value: u64,
    },
    /// A saved state is not one.
    #[error("vCPU {index}: {source}")]
    Snapshot {
        /// The vCPU.
        index: u32,
        /// Why not.
        #[source]
        source: crate::snapshot::SnapshotError,
    },
    /// What completes instructions for KVM cannot work on this host.
    #[error("vCPU {index}: {source}")]
    Emulator {
        /// The vCPU.
        index: u32,
        /// Why not.
        #[source]
        source: emulate::EmulateError,
    },
    /// The thread could not be made, or not be confined.
    #[error("vCPU {index}: making its thread: {source}")]
    Thread {
        /// The vCPU.
        index: u32,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The thread does not do what it was told.
    #[error("vCPU {index}: it did not answer {command} within {seconds} s")]
    Deaf {
        /// The vCPU.
        index: u32,
        /// What it was told.
        command: &'static str,
        /// How long was waited.
        seconds: u64,
    },
}
