//! Sandboxes cloned from templates on /dev/kvm: what clones may not have in common, what one costs, and what happens when
//! a template, its builder or the start of a clone goes wrong.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

#[path = "templates/builders.rs"]
mod builders;
#[path = "templates/clones.rs"]
mod clones;
#[path = "templates/cpus.rs"]
mod cpus;
#[path = "templates/faults.rs"]
mod faults;
#[path = "templates/here.rs"]
mod here;
#[path = "templates/network.rs"]
mod network;
#[path = "templates/pool.rs"]
mod pool;
#[path = "templates/snapshots.rs"]
mod snapshots;
