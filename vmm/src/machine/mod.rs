//! Memory, CPUs, interrupts and devices put together: the `Machine`.

pub mod bus;
pub mod worker;
