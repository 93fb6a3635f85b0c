//! The agent as a whole, without a VM: PID 1 of fresh namespaces, called over unix sockets, with busybox's
//! containers. Needs root and a static busybox.
// As in a unit test: what a helper cannot do fails the test that it helps.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod containers;
mod harness;
mod sandbox;
mod siblings;
mod stdio;
mod syscalls;
