//! What a boot and a container's start cost in guest instructions, by phase, and the budget that they must keep.
//!
//! The counts are QEMU's (software emulation, `-icount`): the same on every machine and under any load. A plugin of ours
//! (`tests/boot/count.c`) notes them at the entry of the kernel's functions that begin a phase, and where the agent's
//! measuring mode (`agent/src/icount.rs`) marks a step.

pub mod budget;
pub mod container;
pub mod count;
mod error;
pub mod exits;
pub mod phases;
pub mod picture;
pub mod report;

pub use error::Error;

/// A part of a boot, or a step of the agent's, and what it costs.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Phase {
    /// firmware, kernel or agent.
    pub who: &'static str,
    /// Its name in `tests/budgets.toml`.
    pub name: String,
    /// Guest instructions.
    pub instructions: u64,
    /// Those of them that were not user mode's: what counts on KVM without hardware.
    pub kernel: u64,
}
