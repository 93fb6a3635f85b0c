//! The shim under a real containerd: with `ctr`, and pods through its CRI plugin. CELLA_TEST_CONTAINERD names another daemon
//! than Debian's, CELLA_TEST_HYPERVISOR another hypervisor than QEMU.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::too_many_lines,
    reason = "tests"
)]

#[path = "containerd/crashes.rs"]
mod crashes;
#[path = "containerd/crowd.rs"]
mod crowd;
#[path = "containerd/pods.rs"]
mod pods;
#[path = "containerd/sandboxes.rs"]
mod sandboxes;
#[path = "containerd/tasks.rs"]
mod tasks;
#[path = "containerd/templates.rs"]
mod templates;
#[path = "containerd/users.rs"]
mod users;

use cella_tests::containerd::{Containerd, containerd_is_missing, cri_is_missing};
use cella_tests::{missing_for, skip};

fn hypervisor_name() -> String {
    std::env::var("CELLA_TEST_HYPERVISOR").unwrap_or_else(|_| "qemu".into())
}

/// A containerd, unless the machine lacks something.
fn containerd() -> Option<Containerd> {
    containerd_on(&hypervisor_name())
}

fn containerd_on(hypervisor: &str) -> Option<Containerd> {
    match missing_for(hypervisor).or_else(containerd_is_missing) {
        Some(missing) => {
            skip(&missing);
            None
        }
        None => Some(Containerd::start(hypervisor)),
    }
}

/// A containerd that can be asked for pods, unless the machine lacks something.
fn with_pods() -> Option<Containerd> {
    with_pods_on(&hypervisor_name())
}

fn with_pods_on(hypervisor: &str) -> Option<Containerd> {
    if let Some(missing) = cri_is_missing() {
        skip(&missing);
        return None;
    }
    containerd_on(hypervisor)
}
