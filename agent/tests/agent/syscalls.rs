//! The cost of a container, counted in the agent's system calls.

use std::path::Path;
use std::process::{Command, Stdio as ChildStdio};
use std::time::Duration;

use cella_proto::agent as proto;

use crate::harness::{Sandbox, stream};

/// System calls of the agent for create and start together, streams and events included (issue 2).
const BUDGET: usize = 120;

#[tokio::test]
async fn create_and_start_stay_within_their_budget_of_system_calls() {
    if !Path::new("/usr/bin/strace").exists() {
        println!("SKIPPED: strace");
        return;
    }
    let Some(sandbox) = Sandbox::start().await else {
        return;
    };
    // The first container pays for what is made once.
    sandbox.run("first", &["sleep", "1000"]).await;
    let agent = sandbox.agent_pid();
    let log = sandbox.dir.path().join("strace");
    let mut tracer = Command::new("strace")
        .args(["-f".as_ref(), "-o".as_ref(), log.as_os_str(), "-p".as_ref()])
        .arg(agent.to_string())
        .stderr(ChildStdio::null())
        .spawn()
        .unwrap();
    wait_for_tracer(agent).await;
    let stdio = proto::Stdio {
        stdin: stream(1),
        stdout: stream(2),
        stderr: stream(3),
        ..Default::default()
    };
    let spec = sandbox.spec(&["sleep", "1000"]);
    sandbox.create("a", &spec, stdio).await.unwrap();
    let _streams: [_; 3] = sandbox.accept_all().await;
    sandbox.start_process("a", "").await.unwrap();
    // The children's calls are not the agent's; those of its threads are.
    let threads: Vec<String> = std::fs::read_dir(format!("/proc/{agent}/task"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    rustix::process::kill_process(
        rustix::process::Pid::from_child(&tracer),
        rustix::process::Signal::INT,
    )
    .unwrap();
    tracer.wait().unwrap();
    let log = std::fs::read_to_string(log).unwrap();
    let of_agent = |line: &&str| {
        let thread = line.split(' ').next().unwrap();
        threads.iter().any(|id| id == thread)
    };
    let log: Vec<&str> = log.lines().filter(of_agent).collect();
    let calls = log
        .iter()
        .filter(|line| !line.contains(" --- ") && !line.contains("resumed>") && line.contains('('))
        .count();
    println!("create and start: {calls} system calls of the agent");
    assert!(
        (20..=BUDGET).contains(&calls),
        "{calls} system calls:\n{}",
        log.join("\n")
    );
}

async fn wait_for_tracer(pid: u32) {
    for _ in 0..500 {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let tracer = status
            .lines()
            .find_map(|line| line.strip_prefix("TracerPid:"));
        if tracer.is_some_and(|tracer| tracer.trim() != "0") {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("strace does not attach");
}
