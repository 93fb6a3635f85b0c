//! What can go wrong with a machine.

use super::State;
use super::bus::BusError;
use super::memory::MemoryError;
use crate::boot::BootError;
use crate::snapshot::SnapshotError;
use crate::vcpu::VcpuError;

/// Why the machine could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// Too few or too many vCPUs.
    #[error("a machine has 1 to 32 vCPUs, not {0}")]
    Vcpus(u32),
    /// The guest cannot be told of so many.
    #[error("the guest of a machine with {count} vCPUs is told of {count} to 32, not {possible}")]
    PossibleVcpus {
        /// How many there are.
        count: u32,
        /// How many the guest was to be told of.
        possible: u32,
    },
    /// KVM refused something.
    #[error("{action}: {source}")]
    Kvm {
        /// What was asked of KVM.
        action: &'static str,
        /// Why it refused.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// A system call failed.
    #[error("{action}: {source}")]
    Host {
        /// What was being done.
        action: &'static str,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// Guest memory could not be made.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Kernel, guest image or command line could not be loaded.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A vCPU failed.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// A device's place is taken.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The machine cannot be saved, or not go on from what was saved.
    #[error("snapshot: {0}")]
    Snapshot(#[from] SnapshotError),
    /// Every slot has its device.
    #[error("a machine has at most {0} devices")]
    Slots(u32),
    /// The call is not legal in this state.
    #[error("a machine that is {state:?} cannot {action}")]
    State {
        /// What was asked.
        action: &'static str,
        /// Where the machine is.
        state: State,
    },
}
