//! The telling part of everything on /dev/kvm with our own VMM. Where KVM has no hardware each boot takes seconds and each
//! process tenths of one, so most of it shares two pods: one of 1 CPU, one of 2.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

#[path = "kvm/faults.rs"]
mod faults;
#[path = "kvm/features.rs"]
mod features;
#[path = "kvm/isolation.rs"]
mod isolation;
#[path = "kvm/pod.rs"]
mod pod;

use cella_tests::{Host, missing_for, skip};

/// A host on which sandboxes run on KVM, unless the machine lacks something.
fn host() -> Option<Host> {
    match missing_for("kvm") {
        Some(missing) => {
            skip(&missing);
            None
        }
        None => Some(Host::on("kvm")),
    }
}
