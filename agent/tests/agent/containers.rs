//! The lives of containers and processes, and the kinds of what goes wrong.

use std::time::{Duration, Instant};

use cella_proto::agent as proto;
use serde_json::json;
use ttrpc::Code;

use crate::harness::{Sandbox, container_ref, process, read_all, soon, status, stream};

#[tokio::test]
async fn a_container_is_created_started_ended_and_deleted() {
    let Some(sandbox) = Sandbox::start().await else {
        return;
    };
    let spec = sandbox.spec(&["sh", "-c", "exit 7"]);
    let created = sandbox
        .create("a", &spec, proto::Stdio::new())
        .await
        .unwrap();
    assert!(created.pid > 1);
    assert_eq!(sandbox.state("a").await, Some(proto::State::STATE_CREATED));
    let mut events = sandbox.watch().await;
    assert_eq!(sandbox.start_process("a", "").await.unwrap(), created.pid);
    let exit = events.exit().await;
    assert_eq!(
        (exit.container_id.as_str(), exit.exec_id.as_str()),
        ("a", "")
    );
    assert_eq!(exit.exit_status, 7);
    assert!(exit.exited_at_ns > 0 && !exit.oom_killed);
    assert_eq!(sandbox.state("a").await, Some(proto::State::STATE_STOPPED));
    // Who watches from now on learns of it too.
    assert_eq!(sandbox.watch().await.exit().await, exit);
    let again = sandbox.start_process("a", "").await;
    assert_eq!(status(again).0, Code::FAILED_PRECONDITION);
    let signalled = sandbox.signal("a", "", libc::SIGTERM).await;
    assert_eq!(status(signalled).0, Code::NOT_FOUND);
    assert_eq!(sandbox.delete("a", "").await.unwrap(), Some(exit));
    assert_eq!(sandbox.state("a").await, None);
    assert_eq!(status(sandbox.delete("a", "").await).0, Code::NOT_FOUND);
}

#[tokio::test]
async fn signals_reach_a_process_and_its_status_says_so() {
    let Some(sandbox) = Sandbox::start().await else {
        return;
    };
    let mut events = sandbox.watch().await;
    let trap = "trap 'exit 9' TERM; while true; do sleep 0.05; done";
    sandbox.run("a", &["sh", "-c", trap]).await;
    let running = sandbox.delete("a", "").await;
    assert_eq!(status(running).0, Code::FAILED_PRECONDITION);
    tokio::time::sleep(Duration::from_millis(300)).await;
    sandbox.signal("a", "", libc::SIGTERM).await.unwrap();
    assert_eq!(events.exit().await.exit_status, 9);

    sandbox.run("b", &["sleep", "1000"]).await;
    let sleeper = process(&["sleep", "1000"]);
    sandbox
        .exec("b", "e", &sleeper, proto::Stdio::new())
        .await
        .unwrap();
    let unstarted = sandbox.signal("b", "e", libc::SIGKILL).await;
    assert_eq!(status(unstarted).0, Code::FAILED_PRECONDITION);
    sandbox.start_process("b", "e").await.unwrap();
    sandbox.signal("b", "e", libc::SIGKILL).await.unwrap();
    let exit = events.exit().await;
    assert_eq!((exit.exec_id.as_str(), exit.exit_status), ("e", 137));
    let bad = sandbox.signal("b", "", 65).await;
    assert_eq!(status(bad).0, Code::INVALID_ARGUMENT);
    sandbox.signal("b", "", libc::SIGKILL).await.unwrap();
    assert_eq!(events.exit().await.exit_status, 137);
}

#[tokio::test]
async fn every_process_of_a_container_is_killed_with_all() {
    let Some(sandbox) = Sandbox::start().await else {
        return;
    };
    let mut events = sandbox.watch().await;
    sandbox
        .run("a", &["sh", "-c", "sleep 1000 & sleep 1001 & wait"])
        .await;
    let sleeper = process(&["sleep", "1002"]);
    sandbox
        .exec("a", "e", &sleeper, proto::Stdio::new())
        .await
        .unwrap();
    let pid = sandbox.start_process("a", "e").await.unwrap();
    let processes = async || {
        let listed = sandbox
            .client
            .list_processes(soon(), &container_ref("a"))
            .await;
        listed.unwrap().processes
    };
    let mut listed = processes().await;
    for _ in 0..100 {
        if listed
            .iter()
            .filter(|process| process.command.starts_with("sleep"))
            .count()
            == 3
        {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        listed = processes().await;
    }
    assert_eq!(listed.len(), 4, "{listed:?}");
    let exec = listed.iter().find(|process| process.pid == pid).unwrap();
    assert_eq!(
        (exec.exec_id.as_str(), exec.command.as_str()),
        ("e", "sleep 1002")
    );
    let request = proto::SignalRequest {
        container_id: "a".to_owned(),
        signal: 9,
        all: true,
        ..Default::default()
    };
    sandbox.client.signal(soon(), &request).await.unwrap();
    let (first, second) = (events.exit().await, events.exit().await);
    let mut ended = [first, second].map(|exit| (exit.exec_id, exit.exit_status));
    ended.sort();
    assert_eq!(ended, [(String::new(), 137), ("e".to_owned(), 137)]);
}

#[tokio::test]
async fn a_paused_container_stands_still_and_cannot_be_deleted() {
    let Some(sandbox) = Sandbox::start().await else {
        return;
    };
    sandbox.run("a", &["sleep", "1000"]).await;
    sandbox
        .client
        .pause(soon(), &container_ref("a"))
        .await
        .unwrap();
    assert_eq!(sandbox.state("a").await, Some(proto::State::STATE_PAUSED));
    assert_eq!(
        status(sandbox.delete("a", "").await).0,
        Code::FAILED_PRECONDITION
    );
    sandbox
        .client
        .resume(soon(), &container_ref("a"))
        .await
        .unwrap();
    assert_eq!(sandbox.state("a").await, Some(proto::State::STATE_RUNNING));
}

#[tokio::test]
async fn a_container_that_was_never_started_can_be_deleted() {
    let Some(sandbox) = Sandbox::start().await else {
        return;
    };
    let spec = sandbox.spec(&["true"]);
    sandbox
        .create("a", &spec, proto::Stdio::new())
        .await
        .unwrap();
    let exit = sandbox.delete("a", "").await.unwrap().unwrap();
    assert_eq!(exit.exit_status, 137);
    assert_eq!(sandbox.state("a").await, None);
    let left = std::fs::read_dir(sandbox.cgroups().join("cella")).unwrap();
    let left: Vec<_> = left
        .flatten()
        .filter(|entry| entry.path().is_dir())
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test]
async fn orphans_of_a_container_are_reaped() {
    let Some(sandbox) = Sandbox::start().await else {
        return;
    };
    sandbox.run("a", &["sleep", "1000"]).await;
    // In the container's pid namespace its init would reap it; one that joined from outside falls to the agent.
    let daemon = process(&["sh", "-c", "(sleep 0.2; exit 3) & exit 0"]);
    sandbox
        .exec("a", "e", &daemon, proto::Stdio::new())
        .await
        .unwrap();
    let mut events = sandbox.watch().await;
    sandbox.start_process("a", "e").await.unwrap();
    assert_eq!(events.exit().await.exit_status, 0);
    tokio::time::sleep(Duration::from_millis(600)).await;
    for child in sandbox.children() {
        assert!(!child.contains(") Z "), "a zombie of the agent: {child}");
    }
}

#[tokio::test]
async fn what_cannot_be_executed_is_told_apart() {
    let Some(sandbox) = Sandbox::start().await else {
        return;
    };
    for (id, command, code, exit_status) in [
        ("missing", "/bin/none", Code::NOT_FOUND, 127),
        ("plain", "/bin/plain", Code::PERMISSION_DENIED, 126),
    ] {
        let spec = sandbox.spec(&[command]);
        let created = sandbox.create(id, &spec, proto::Stdio::new()).await;
        let unstarted = created.is_ok();
        let failed = match created {
            Ok(_) => sandbox.start_process(id, "").await.map(drop),
            Err(error) => Err(error),
        };
        let (failed, message) = status(failed);
        assert_eq!(failed, code, "{message}");
        assert!(message.contains(command), "{message}");
        if unstarted {
            let exit = sandbox.delete(id, "").await.unwrap().unwrap();
            assert_eq!(exit.exit_status, exit_status);
        }
        assert_eq!(sandbox.state(id).await, None);
    }
    sandbox.run("a", &["sleep", "1000"]).await;
    let missing = process(&["/bin/none"]);
    sandbox
        .exec("a", "e", &missing, proto::Stdio::new())
        .await
        .unwrap();
    assert_eq!(
        status(sandbox.start_process("a", "e").await).0,
        Code::NOT_FOUND
    );
    assert_eq!(
        sandbox.delete("a", "e").await.unwrap().unwrap().exit_status,
        127
    );
}

#[tokio::test]
async fn requests_that_make_no_sense_are_refused_by_their_kind() {
    let Some(sandbox) = Sandbox::start().await else {
        return;
    };
    let spec = sandbox.spec(&["sleep", "1000"]);
    for id in ["", "..", "a/b", "a b", &"x".repeat(129)] {
        let created = sandbox.create(id, &spec, proto::Stdio::new()).await;
        assert_eq!(status(created).0, Code::INVALID_ARGUMENT, "{id:?}");
    }
    let (code, message) = status(sandbox.create("a", &json!([1]), proto::Stdio::new()).await);
    assert_eq!(code, Code::INVALID_ARGUMENT, "{message}");
    let nobody = proto::Stdio {
        stdout: protobuf::MessageField::some(proto::Stream {
            port: 999,
            token: vec![1; 16],
            ..Default::default()
        }),
        ..Default::default()
    };
    let (code, message) = status(sandbox.create("a", &spec, nobody).await);
    assert_eq!(code, Code::UNAVAILABLE, "{message}");
    assert!(
        message.contains("stdout") && message.contains("999"),
        "{message}"
    );
    // None of them has taken the id.
    sandbox
        .create("a", &spec, proto::Stdio::new())
        .await
        .unwrap();
    let twice = sandbox.create("a", &spec, proto::Stdio::new()).await;
    assert_eq!(status(twice).0, Code::ALREADY_EXISTS);
    let command = process(&["true"]);
    sandbox
        .exec("a", "e", &command, proto::Stdio::new())
        .await
        .unwrap();
    let twice = sandbox.exec("a", "e", &command, proto::Stdio::new()).await;
    assert_eq!(status(twice).0, Code::ALREADY_EXISTS);
    let nowhere = sandbox.exec("b", "e", &command, proto::Stdio::new()).await;
    assert_eq!(status(nowhere).0, Code::NOT_FOUND);
    assert_eq!(
        status(sandbox.start_process("a", "f").await).0,
        Code::NOT_FOUND
    );
    let resize = proto::ResizeTerminalRequest {
        container_id: "a".to_owned(),
        rows: 1,
        columns: 1,
        ..Default::default()
    };
    let none = sandbox.client.resize_terminal(soon(), &resize).await;
    assert_eq!(status(none).0, Code::FAILED_PRECONDITION);
}

#[tokio::test]
async fn containers_of_a_pod_share_what_the_sandbox_says() {
    let Some(sandbox) = Sandbox::start().await else {
        return;
    };
    let request = proto::SetUpSandboxRequest {
        hostname: "pod".to_owned(),
        shared_pid_namespace: true,
        ..Default::default()
    };
    sandbox
        .client
        .set_up_sandbox(soon(), &request)
        .await
        .unwrap();
    sandbox.run("a", &["sleep", "4321"]).await;
    let see = "hostname; cat /proc/[0-9]*/cmdline | tr '\\0' ' '";
    let stdio = proto::Stdio {
        stdout: stream(2),
        ..Default::default()
    };
    sandbox
        .create("b", &sandbox.spec(&["sh", "-c", see]), stdio)
        .await
        .unwrap();
    let [output] = sandbox.accept_all().await;
    sandbox.start_process("b", "").await.unwrap();
    let seen = String::from_utf8(read_all(output).await).unwrap();
    assert!(seen.starts_with("pod\n"), "{seen}");
    assert!(seen.contains("sleep 4321"), "{seen}");
}

#[tokio::test]
async fn counters_are_answered_and_pushed() {
    let Some(sandbox) = Sandbox::start().await else {
        return;
    };
    sandbox
        .run("a", &["sh", "-c", "while true; do :; done"])
        .await;
    let request = proto::WatchRequest {
        stats_period_ms: 1,
        ..Default::default()
    };
    let mut events = sandbox.client.watch(soon(), &request).await.unwrap();
    let mut usage = Vec::new();
    let begin = Instant::now();
    while usage.len() < 3 {
        let event = events.recv().await.unwrap().unwrap();
        if event.has_stats() {
            let stats = &event.stats().containers;
            assert_eq!(stats.len(), 1);
            assert_eq!(stats[0].container_id, "a");
            usage.push(stats[0].cpu_usage_usec);
        }
    }
    assert!(
        begin.elapsed() >= Duration::from_millis(200),
        "100 ms is the shortest period"
    );
    assert!(usage[0] < usage[1] && usage[1] < usage[2], "{usage:?}");
    let stats = sandbox
        .client
        .stats(soon(), &container_ref("a"))
        .await
        .unwrap();
    assert!(stats.cpu_usage_usec >= usage[2]);
    let missing = sandbox.client.stats(soon(), &container_ref("b")).await;
    assert_eq!(status(missing).0, Code::NOT_FOUND);
}

#[tokio::test]
async fn an_update_is_an_oci_resources_object() {
    let Some(sandbox) = Sandbox::start().await else {
        return;
    };
    sandbox.run("a", &["sleep", "1000"]).await;
    let update = async |resources: &[u8]| {
        let request = proto::UpdateRequest {
            container_id: "a".to_owned(),
            resources: resources.to_vec(),
            ..Default::default()
        };
        sandbox.client.update(soon(), &request).await
    };
    update(b"{}").await.unwrap();
    let (code, message) = status(update(b"[").await);
    assert_eq!(code, Code::INVALID_ARGUMENT, "{message}");
    if !sandbox.has_controller("pids") {
        let (_, message) = status(update(br#"{"pids":{"limit":10}}"#).await);
        assert!(message.contains("pids"), "{message}");
        return;
    }
    update(br#"{"pids":{"limit":10}}"#).await.unwrap();
    let stats = sandbox
        .client
        .stats(soon(), &container_ref("a"))
        .await
        .unwrap();
    assert_eq!(stats.pids_max, 10);
}

#[tokio::test]
async fn a_container_out_of_memory_is_told_of() {
    let Some(sandbox) = Sandbox::start().await else {
        return;
    };
    if !sandbox.has_controller("memory") {
        println!("SKIPPED: the memory controller of cgroup v2");
        return;
    }
    // A greedy child, so that the kill and the container's end are two things.
    let greedy = "dd if=/dev/zero of=/dev/null bs=64M count=1; exec sleep 1000";
    let mut spec = sandbox.spec(&["sh", "-c", greedy]);
    spec["linux"]["resources"] = json!({ "memory": { "limit": 16 << 20, "swap": 16 << 20 } });
    sandbox
        .create("a", &spec, proto::Stdio::new())
        .await
        .unwrap();
    let mut events = sandbox.watch().await;
    sandbox.start_process("a", "").await.unwrap();
    let event = events.next().await;
    assert_eq!(event.oom().container_id, "a", "{event:?}");
    sandbox.signal("a", "", libc::SIGKILL).await.unwrap();
    let exit = events.exit().await;
    assert_eq!((exit.exit_status, exit.oom_killed), (137, true));
}
