//! The agent as a whole, without a VM: PID 1 of fresh namespaces, called over unix sockets, with busybox's
//! containers. Needs root and a static busybox.

mod containers;
mod harness;
mod sandbox;
mod stdio;
mod syscalls;
