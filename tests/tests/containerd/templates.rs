//! Templates under containerd, on KVM alone.

use std::fs;
use std::time::{Duration, Instant};

use cella_tests::containerd::{Containerd, containerd, containerd_is_missing};
use cella_tests::{Host, missing_for, skip};
use serde_json::Value;

/// A build takes less than this, though it gives way to everything else.
const PATIENCE: Duration = Duration::from_secs(150);

/// The sandbox that misses a template is booted, and has one built by a process that nobody waits for; the next is a
/// clone of it.
#[test]
fn the_shim_has_the_template_built_that_it_misses() {
    if let Some(missing) = missing_for("kvm").or_else(containerd_is_missing) {
        skip(&missing);
        return;
    }
    let daemon = Containerd::start_on(Host::with_templates("kvm"), &containerd());
    let said = daemon.run(&[], "booted", &["echo", "booted"]);
    assert_eq!((said.status, said.stdout.as_str()), (0, "booted\n"));
    let deadline = Instant::now() + PATIENCE;
    let mut polite = false;
    while templates(&daemon).is_empty() {
        assert!(Instant::now() < deadline, "no template is built");
        polite |= builders(&daemon).iter().any(|pid| nice(*pid) == Some(19));
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(polite, "it gives way to others");
    daemon.eventually("the builder ends", || builders(&daemon).is_empty());
    // When it was used is noted to the second.
    std::thread::sleep(Duration::from_millis(1100));
    let said = daemon.run(&[], "cloned", &["echo", "cloned"]);
    assert_eq!((said.status, said.stdout.as_str()), (0, "cloned\n"));
    let listed = templates(&daemon);
    let number = |name: &str| listed[0][name].as_u64().unwrap();
    assert_eq!(listed.len(), 1, "one that does not serve is removed");
    assert!(number("used") > number("created"), "{listed:?}");
    daemon.end();
}

fn templates(daemon: &Containerd) -> Vec<Value> {
    let said = daemon.host.cella(&["template", "list", "--json"]);
    let listed: Value = serde_json::from_str(&said.expect_status(0).stdout).unwrap();
    listed.as_array().unwrap().clone()
}

fn builders(daemon: &Containerd) -> Vec<u32> {
    let processes = daemon.host.processes().into_iter();
    let builders = processes.filter(|(_, line)| line.contains("BuildTemplate"));
    builders.map(|(pid, _)| pid).collect()
}

/// Field 19 of /proc/PID/stat.
fn nice(pid: u32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(16)?.parse().ok()
}
