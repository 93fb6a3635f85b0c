//! A virtual CPU: its thread and states, what each KVM exit means, and what KVM's emulator leaves to us.

mod stats;

pub use stats::ExitStats;
