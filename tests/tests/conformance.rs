//! CRI's own conformance suite, critest, against containerd 2 with Cella as its runtime. `make conformance` builds what this
//! needs, and runs all of it (CELLA_CONFORMANCE_ALL); `make test` runs a part where that has been built.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

use std::path::PathBuf;

use cella_tests::conformance::{self, Registry, Spec, binaries, crictl, critest};
use cella_tests::containerd::{Containerd, cri_is_missing};
use cella_tests::{Host, finish, missing_for, skip};

/// What is run where not all is: one spec of each thing that is hard for a virtual machine.
const PART: &str =
    "HostNetwork is false|support portforward \\[Conf|with 'rslave'|OOMKilled|support attach";
/// What is run once more on sandboxes that the shim makes.
const SHIMS_PART: &str = "PodSandbox|portforward \\[Conf|DNS config|set hostname|PodPID|multiple containers|metrics operations|sysctl";

fn everything() -> bool {
    std::env::var_os("CELLA_CONFORMANCE_ALL").is_some()
}

/// A containerd 2 that pulls the stand-ins, unless the machine lacks something.
fn daemon() -> Option<(Containerd, Registry, PathBuf)> {
    let hypervisor = std::env::var("CELLA_TEST_HYPERVISOR").unwrap_or_else(|_| "qemu".into());
    let missing = missing_for(&hypervisor).or_else(cri_is_missing);
    let missing = missing.or_else(|| match binaries() {
        Some(_) => None,
        None => Some("containerd 2 and critest (make conformance)".into()),
    });
    if let Some(missing) = missing {
        skip(&missing);
        return None;
    }
    let binaries = binaries().unwrap();
    let registry = Registry::start(&binaries);
    let host = Host::on(&hypervisor);
    registry.mirror(&host);
    let daemon = Containerd::start_on(host, &binaries.join("containerd"));
    Some((daemon, registry, binaries))
}

fn alternatives(patterns: &[String]) -> String {
    patterns.join("|")
}

fn failures(specs: &[Spec]) -> Vec<String> {
    let failed = specs
        .iter()
        .filter(|spec| !matches!(spec.state.as_str(), "passed" | "skipped" | "pending"));
    failed
        .map(|spec| format!("{}: {}", spec.name, spec.message))
        .collect()
}

/// Runs a part of critest, which must pass; says what skipped itself.
fn passes(daemon: &Containerd, binaries: &std::path::Path, handler: &str, focus: Option<&str>) {
    let kinds = ["vm", "machine"];
    let patterns: Vec<_> = kinds.into_iter().flat_map(conformance::not_run).collect();
    let mut options = vec![format!("-ginkgo.skip={}", alternatives(&patterns))];
    match focus {
        Some(focus) => options.push(format!("-ginkgo.focus={focus}")),
        None => options.push(format!(
            "-nri-socket={}",
            daemon.host.path("nri.sock").display()
        )),
    }
    if let Ok(more) = std::env::var("CELLA_CRITEST") {
        options.extend(more.split_whitespace().map(str::to_owned));
    }
    let specs = critest(daemon, binaries, handler, &options);
    let count = |state: &str| specs.iter().filter(|spec| spec.state == state).count();
    println!(
        "critest with {handler}: {} passed, {} failed",
        count("passed"),
        failures(&specs).len()
    );
    for spec in specs
        .iter()
        .filter(|spec| spec.state == "skipped" && !spec.message.is_empty())
    {
        skip(&format!("critest: {}: {}", spec.name, spec.message));
    }
    assert_eq!(failures(&specs), [] as [String; 0]);
    assert!(count("passed") >= 5, "{} specs ran", count("passed"));
}

#[test]
fn critest_passes() {
    let Some((daemon, _registry, binaries)) = daemon() else {
        return;
    };
    passes(&daemon, &binaries, "cella", (!everything()).then_some(PART));
    daemon.end();
}

#[test]
fn critest_passes_with_the_shims_sandboxes() {
    if !everything() {
        skip("critest on the shim's sandboxes (make conformance)");
        return;
    }
    let Some((daemon, _registry, binaries)) = daemon() else {
        return;
    };
    passes(&daemon, &binaries, "cella-sandbox", Some(SHIMS_PART));
    daemon.end();
}

/// What is not run for the machine's sake fails with runc here, too: otherwise it is to be run.
#[test]
fn what_is_not_run_fails_with_runc() {
    if !everything() {
        skip("critest with runc (make conformance)");
        return;
    }
    let Some((daemon, _registry, binaries)) = daemon() else {
        return;
    };
    let patterns = conformance::not_run("machine");
    let options = [format!("-ginkgo.focus={}", alternatives(&patterns))];
    let specs = critest(&daemon, &binaries, "runc", &options);
    assert_eq!(
        failures(&specs).len(),
        patterns.len(),
        "{:#?}",
        failures(&specs)
    );
    daemon.end();
}

#[test]
fn crictl_pulls_by_digest() {
    let Some((daemon, registry, binaries)) = daemon() else {
        return;
    };
    let image = format!(
        "gcr.io/k8s-staging-cri-tools/test-image-digest@{}",
        registry.digest
    );
    let run = |args: &[&str]| {
        let child = crictl(&daemon, &binaries, args).spawn().unwrap();
        finish(child, &[]).expect_status(0).stdout
    };
    run(&["pull", &image]);
    let status: serde_json::Value = serde_json::from_str(&run(&["inspecti", &image])).unwrap();
    assert_eq!(status["status"]["repoDigests"], serde_json::json!([image]));
    assert_eq!(status["status"]["repoTags"], serde_json::json!([]));
    run(&["rmi", &image]);
    let list: serde_json::Value = serde_json::from_str(&run(&["images", "-o", "json"])).unwrap();
    assert!(!list.to_string().contains(&registry.digest), "{list}");
    daemon.end();
}
