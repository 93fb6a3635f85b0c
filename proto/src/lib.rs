//! What crosses a wire inside Cella: the messages of `vmm.proto` (a door and its VMM), of
//! `snapshot.proto` (a VMM and a later one) and, with feature
//! `agent`, the messages and the ttrpc service of `agent.proto` (a door and the guest's PID 1).
//!
//! Everything here is generated; the `.proto` files are the documentation.
#![allow(
    missing_docs,
    clippy::all,
    clippy::pedantic,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic
)]

mod vmm_generated {
    include!(concat!(env!("OUT_DIR"), "/vmm/mod.rs"));
}
/// Messages of `pod_sandbox.proto`.
pub use vmm_generated::pod_sandbox;
/// Messages of `snapshot.proto`, the content of a snapshot's state file.
pub use vmm_generated::snapshot;
/// Messages of `vmm.proto`.
pub use vmm_generated::vmm;

#[cfg(feature = "agent")]
mod agent_generated {
    include!(concat!(env!("OUT_DIR"), "/agent/mod.rs"));
}
/// Messages of `agent.proto`.
#[cfg(feature = "agent")]
pub use agent_generated::agent;
/// The service of `agent.proto`: `agent_ttrpc::AgentClient`, trait `agent_ttrpc::Agent` and
/// `agent_ttrpc::create_agent`.
#[cfg(feature = "agent")]
pub use agent_generated::agent_ttrpc;
