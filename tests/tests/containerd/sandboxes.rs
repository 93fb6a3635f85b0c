//! The sandbox service, and what a containerd of the second generation does otherwise.

use serde_json::json;

use super::with_pods;
use crate::pods::{Pod, sandbox_state};
use cella_tests::containerd::Containerd;
use cella_tests::skip;

/// The runtime handlers that a daemon has: the first generation has no sandbox service.
pub fn handlers(daemon: &Containerd) -> &'static [&'static str] {
    match daemon.major() {
        0 | 1 => &["cella"],
        _ => &["cella", "cella-sandbox"],
    }
}

#[test]
fn a_pod_by_the_sandbox_service() {
    let Some(mut daemon) = with_pods() else {
        return;
    };
    if handlers(&daemon).len() < 2 {
        skip("containerd 2 (CELLA_TEST_CONTAINERD)");
        return;
    }
    let pod = Pod::run_with(&daemon, "cella-sandbox", &json!({}));
    let one = pod.start("one", "sleep 1000", &json!({}));
    assert_eq!(
        pod.sh(&one, "hostname; cat /etc/hostname"),
        "pod-host\npod-host\n"
    );
    assert_eq!(
        pod.sh(&one, "cat /etc/resolv.conf"),
        "search test.local\nnameserver 10.1.2.3\n"
    );
    pod.sh(
        &one,
        "grep -q localhost /etc/hosts && ip -4 addr show dev eth0",
    );
    assert_eq!(sandbox_state(&daemon, &pod.id), "SANDBOX_READY");
    let (id, container) = (pod.id.clone(), one);
    std::mem::drop(pod);
    daemon.crash();
    assert_eq!(sandbox_state(&daemon, &id), "SANDBOX_READY");
    let status = daemon.cri("ContainerStatus", &json!({"container_id": container}));
    assert_eq!(status["status"]["state"], "CONTAINER_RUNNING");
    daemon.cri("StopPodSandbox", &json!({"pod_sandbox_id": id}));
    assert_eq!(sandbox_state(&daemon, &id), "SANDBOX_NOTREADY");
    daemon.cri("RemovePodSandbox", &json!({"pod_sandbox_id": id}));
    daemon.end();
}
