//! containerd, a shim or a VMM that dies at a bad moment; and what is left then.

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::json;

use super::{containerd, with_pods};
use crate::pods::{Pod, sandbox_state};
use cella_tests::containerd::{Cri, IMAGE};

fn kill(pids: &[u32]) {
    assert_eq!(pids.len(), 1, "{pids:?}");
    let pid = pids[0].to_string();
    assert!(
        Command::new("kill")
            .args(["-9", &pid])
            .status()
            .unwrap()
            .success()
    );
}

#[test]
fn containerd_dies_and_comes_back() {
    let Some(mut daemon) = containerd() else {
        return;
    };
    let script =
        "trap 'exit 4' TERM; i=0; while :; do echo $i; i=$((i+1)); sleep 0.1 & wait $!; done";
    daemon.run_detached("c", &["sh", "-c", script]);
    daemon.crash();
    assert_eq!(daemon.status("c").as_deref(), Some("RUNNING"));
    let said = daemon
        .ctr(&["task", "exec", "--exec-id", "e", "c", "echo", "again"])
        .expect_status(0);
    assert_eq!(said.stdout, "again\n");
    // It ends while containerd is away: the end is not lost.
    daemon
        .ctr(&["task", "kill", "-s", "SIGTERM", "c"])
        .expect_status(0);
    daemon.crash();
    daemon.eventually("it has ended", || {
        daemon.status("c").as_deref() == Some("STOPPED")
    });
    let said = daemon.ctr(&["task", "rm", "c"]);
    assert!(
        said.status == 4 || said.stderr.contains("exit code 4"),
        "{said:?}"
    );
    daemon.ctr(&["container", "rm", "c"]).expect_status(0);
    let log = std::fs::read_to_string(daemon.host.path("c.log")).unwrap();
    let numbers: Vec<usize> = log.lines().map(|line| line.parse().unwrap()).collect();
    assert!(numbers.iter().copied().eq(0..numbers.len()), "{log}");
    daemon.end();
}

#[test]
fn a_shim_dies() {
    let Some(daemon) = containerd() else { return };
    daemon.run_detached("c", &["sleep", "1000"]);
    kill(&daemon.shims());
    daemon.eventually("its machine ends", || daemon.vmms().is_empty());
    daemon.eventually("its task is gone", || {
        daemon.status("c").is_none_or(|status| status != "RUNNING")
    });
    daemon.ctr(&["task", "rm", "--force", "c"]);
    daemon.ctr(&["container", "rm", "c"]).expect_status(0);
    // The id is free for another.
    let said = daemon.run(&[], "c", &["echo", "new"]).expect_status(0);
    assert_eq!(said.stdout, "new\n");
    daemon.end();
}

#[test]
fn a_machine_dies() {
    let Some(daemon) = containerd() else { return };
    daemon.run_detached("c", &["sleep", "1000"]);
    kill(&daemon.vmms());
    daemon.eventually("its task has ended", || {
        daemon.status("c").as_deref() == Some("STOPPED")
    });
    let said = daemon.ctr(&["task", "rm", "c"]);
    assert!(
        said.status == 137 || said.stderr.contains("exit code 137"),
        "{said:?}"
    );
    daemon.ctr(&["container", "rm", "c"]).expect_status(0);
    daemon.end();
}

#[test]
fn a_pods_machine_dies() {
    let Some(daemon) = with_pods() else { return };
    for handler in super::sandboxes::handlers(&daemon) {
        let pod = Pod::run_with(&daemon, handler, &json!({}));
        let container = pod.start("c", "sleep 1000", &json!({}));
        kill(&daemon.vmms());
        daemon.eventually("the pod is not ready", || {
            sandbox_state(&daemon, &pod.id) == "SANDBOX_NOTREADY"
        });
        daemon.eventually("its container has ended", || {
            pod.status(&container)["state"] == "CONTAINER_EXITED"
        });
        assert_eq!(pod.status(&container)["exitCode"], 137);
        pod.remove();
    }
    daemon.end();
}

#[test]
fn a_pods_shim_dies() {
    let Some(daemon) = with_pods() else { return };
    for handler in super::sandboxes::handlers(&daemon) {
        let pod = Pod::run_with(&daemon, handler, &json!({}));
        let container = pod.start("c", "sleep 1000", &json!({}));
        kill(&daemon.shims());
        daemon.eventually("its machine ends", || daemon.vmms().is_empty());
        daemon.eventually("the pod is not ready", || {
            sandbox_state(&daemon, &pod.id) == "SANDBOX_NOTREADY"
        });
        daemon.eventually("its container has ended", || {
            pod.status(&container)["state"] == "CONTAINER_EXITED"
        });
        pod.remove();
        // The name is free for another.
        let pod = Pod::run_with(&daemon, handler, &json!({}));
        let container = pod.start("c", "sleep 1000", &json!({}));
        assert_eq!(pod.sh(&container, "echo new"), "new\n");
        pod.remove();
    }
    daemon.end();
}

/// Pods come, work and go while containerd is killed again and again. Each call may fail; in the end everything can be removed.
#[test]
fn containerd_dies_in_the_middle_of_everything() {
    let Some(mut daemon) = with_pods() else {
        return;
    };
    let client = daemon.cri_client();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for worker in 0..3 {
            let (client, done) = (&client, &done);
            scope.spawn(move || {
                for round in 0.. {
                    if done.load(Ordering::Relaxed) {
                        break;
                    }
                    // Whichever call it is that containerd dies in.
                    let _ = live_and_go(client, &format!("middle-{worker}-{round}"));
                }
            });
        }
        for _ in 0..3 {
            std::thread::sleep(Duration::from_secs(6));
            daemon.crash();
        }
        done.store(true, Ordering::Relaxed);
    });
    daemon.eventually("the CRI plugin answers", || {
        daemon.try_cri("ListPodSandbox", &json!({})).is_ok()
    });
    let pods = daemon.cri("ListPodSandbox", &json!({}));
    for pod in pods["items"].as_array().unwrap() {
        let id = json!({"pod_sandbox_id": pod["id"]});
        daemon.cri("StopPodSandbox", &id);
        daemon.cri("RemovePodSandbox", &id);
    }
    let left = daemon.cri("ListContainers", &json!({}));
    assert_eq!(left["containers"], json!([]));
    daemon.end();
}

fn live_and_go(client: &Cri, name: &str) -> Result<(), String> {
    let config =
        json!({"metadata": {"name": name, "namespace": "default", "uid": name}, "hostname": name});
    let request = json!({"runtime_handler": "cella", "config": config});
    let answer = client.call("RunPodSandbox", &request)?;
    let pod = &answer["podSandboxId"];
    let container =
        json!({"metadata": {"name": "c"}, "image": {"image": IMAGE}, "command": ["sleep", "1000"]});
    let request = json!({"pod_sandbox_id": pod, "config": container, "sandbox_config": config});
    let answer = client.call("CreateContainer", &request)?;
    let container = &answer["containerId"];
    client.call("StartContainer", &json!({"container_id": container}))?;
    client.call(
        "ExecSync",
        &json!({"container_id": container, "cmd": ["true"], "timeout": 60}),
    )?;
    client.call("StopContainer", &json!({"container_id": container}))?;
    client.call("StopPodSandbox", &json!({"pod_sandbox_id": pod}))?;
    client.call("RemovePodSandbox", &json!({"pod_sandbox_id": pod}))?;
    Ok(())
}
