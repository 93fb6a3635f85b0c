//! The guest's PID 1: started by the kernel as /init, it dials the host and serves `agent.proto`.
//!
//! One thread serves every request, stream and event, and does nothing that waits for a container. What may take long
//! (a container's hooks, mounts, files and freezing) runs on threads of [`workers`]; the set-up itself is the work of a
//! forked child. State is behind plain mutexes that no await is under.

pub mod container;
pub mod cpus;
pub mod error;
pub mod events;
pub mod forward;
pub mod guest;
pub mod icount;
pub mod identity;
pub mod info;
pub mod memory;
pub mod network;
pub mod power;
pub mod ready;
pub mod reaper;
pub mod rpc;
pub mod sandbox;
pub mod server;
pub mod slots;
pub mod streams;
pub mod transport;
pub mod workers;
