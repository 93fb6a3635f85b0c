//! The whole of the end-to-end suite: what `kvm.rs` tells of, and what takes more processes than a guest can have where KVM
//! has no hardware. It runs on the hypervisor that CELLA_TEST_HYPERVISOR names, `qemu` by default.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

#[path = "everything/ends.rs"]
mod ends;
#[path = "kvm/faults.rs"]
mod faults;
#[path = "kvm/features.rs"]
mod features;
#[path = "everything/hypervisor.rs"]
mod hypervisor;
#[path = "kvm/isolation.rs"]
mod isolation;
#[path = "kvm/pod.rs"]
mod pod;
#[path = "everything/specification.rs"]
mod specification;
#[path = "everything/streams.rs"]
mod streams;
#[path = "everything/terminal.rs"]
mod terminal;
#[path = "everything/volumes.rs"]
mod volumes;

use cella_tests::{Host, missing_for, skip};

fn hypervisor_name() -> String {
    std::env::var("CELLA_TEST_HYPERVISOR").unwrap_or_else(|_| "qemu".into())
}

/// A host on which sandboxes run on that hypervisor, unless the machine lacks something.
fn host() -> Option<Host> {
    let name = hypervisor_name();
    match missing_for(&name) {
        Some(missing) => {
            skip(&missing);
            None
        }
        None => Some(Host::on(&name)),
    }
}
