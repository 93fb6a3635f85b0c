//! The guest's PID 1: started by the kernel as /init, it dials the host and serves `agent.proto`.
//!
//! One thread does everything: a request's work between two awaits is short, and what takes long (a container's
//! set-up) is the work of a forked child. State is behind plain mutexes that no await is under.

pub mod container;
pub mod error;
pub mod events;
pub mod forward;
pub mod guest;
pub mod icount;
pub mod info;
pub mod network;
pub mod power;
pub mod ready;
pub mod reaper;
pub mod rpc;
pub mod sandbox;
pub mod server;
pub mod streams;
pub mod transport;
