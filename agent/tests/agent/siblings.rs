//! A container that is slow delays nobody but itself.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cella_proto::agent as proto;
use futures::future::join_all;
use rustix::fs::{CWD, FileType, Mode};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt as _;
use ttrpc::Code;

use crate::harness::{
    Sandbox, container_ref, create_request, process, process_ref, read_all, soon, status, stream,
};

/// Hooks that wait until they are let through, one after the other.
struct Gate {
    /// On this machine, in the containers' /tmp.
    path: PathBuf,
    fifo: File,
}

impl Gate {
    fn new(sandbox: &Sandbox) -> Self {
        let path = sandbox.dir.path().join("rootfs/tmp/gate");
        rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::RWXU, 0).unwrap();
        // Both ends, so that it opens at once and keeps what nobody has read yet.
        let fifo = File::options().read(true).write(true).open(&path).unwrap();
        Self { path, fifo }
    }

    /// `spec` with a hook at `point` that waits here; `id` is what it says when it does.
    fn hook(&self, mut spec: Value, point: &str, id: &str) -> Value {
        let gate = match point {
            "startContainer" => Path::new("/tmp/gate"),
            _ => &self.path,
        };
        let gate = gate.display();
        let script = format!("echo > {gate}.{id}; read line < {gate}");
        spec["hooks"][point] =
            json!([{ "path": "/bin/sh", "args": ["sh", "-c", script], "timeout": 600 }]);
        spec
    }

    /// Waits until hook `id` waits.
    async fn reached(&self, id: &str) {
        let sign = PathBuf::from(format!("{}.{id}", self.path.display()));
        for _ in 0..6000 {
            if sign.exists() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("hook {id} does not run");
    }

    /// Lets so many hooks through.
    fn open(&mut self, hooks: usize) {
        self.fifo.write_all("\n".repeat(hooks).as_bytes()).unwrap();
    }
}

/// Until nothing is left of what the agent has made.
async fn nothing_is_left(sandbox: &Sandbox) {
    let left = || {
        let cgroups = std::fs::read_dir(sandbox.cgroups().join("cella")).unwrap();
        let mut left = sandbox.children();
        left.extend(
            cgroups
                .flatten()
                .filter(|entry| entry.path().is_dir())
                .map(|entry| entry.path().display().to_string()),
        );
        left
    };
    for _ in 0..1000 {
        if left().is_empty() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("left over: {:?}", left());
}

/// Everything that can be done with a container is done with `id`, to its end.
async fn live_a_life(sandbox: &Sandbox, id: &str) {
    let mut events = sandbox.watch().await;
    let stdio = proto::Stdio {
        stdout: stream(7),
        ..Default::default()
    };
    let said = sandbox.spec(&["sh", "-c", "echo $0; exec sleep 1000", id]);
    sandbox.create(id, &said, stdio).await.unwrap();
    let [mut output] = sandbox.accept_all().await;
    sandbox.start_process(id, "").await.unwrap();
    let mut line = vec![0; id.len()];
    output.read_exact(&mut line).await.unwrap();
    assert_eq!(line, id.as_bytes());
    let command = process(&["sh", "-c", "exit 5"]);
    sandbox
        .exec(id, "e", &command, proto::Stdio::new())
        .await
        .unwrap();
    sandbox.start_process(id, "e").await.unwrap();
    assert_eq!(events.exit().await.exit_status, 5);
    sandbox
        .client
        .pause(soon(), &container_ref(id))
        .await
        .unwrap();
    sandbox
        .client
        .resume(soon(), &container_ref(id))
        .await
        .unwrap();
    let listed = sandbox
        .client
        .list_processes(soon(), &container_ref(id))
        .await
        .unwrap();
    assert_eq!(listed.processes.len(), 1, "{listed:?}");
    assert_eq!(sandbox.state(id).await, Some(proto::State::STATE_RUNNING));
    sandbox.signal(id, "", libc::SIGKILL).await.unwrap();
    let exit = events.exit().await;
    assert_eq!((exit.container_id.as_str(), exit.exit_status), (id, 137));
    assert_eq!(read_all(output).await, b"\n");
    assert_eq!(sandbox.delete(id, "").await.unwrap(), Some(exit));
}

#[tokio::test]
async fn a_container_whose_making_takes_long_delays_no_other() {
    let Some(sandbox) = Sandbox::start().await else {
        return;
    };
    let mut gate = Gate::new(&sandbox);
    for point in ["prestart", "createRuntime", "createContainer"] {
        let spec = gate.hook(sandbox.spec(&["sh", "-c", "exit 4"]), point, point);
        let slow = sandbox.begin_create("slow", &spec);
        gate.reached(point).await;
        live_a_life(&sandbox, "quick").await;
        assert_eq!(sandbox.state("slow").await, None);
        for refused in [
            sandbox.start_process("slow", "").await.map(drop),
            sandbox.delete("slow", "").await.map(drop),
        ] {
            let (code, message) = status(refused);
            assert_eq!(code, Code::FAILED_PRECONDITION);
            assert!(message.contains("being created"), "{message}");
        }
        assert!(!slow.is_finished());
        gate.open(1);
        slow.await.unwrap().unwrap();
        let mut events = sandbox.watch().await;
        sandbox.start_process("slow", "").await.unwrap();
        assert_eq!(events.exit().await.exit_status, 4);
        sandbox.delete("slow", "").await.unwrap();
    }
    nothing_is_left(&sandbox).await;
}

#[tokio::test]
async fn a_start_that_takes_long_delays_no_other_and_can_be_killed() {
    let Some(sandbox) = Sandbox::start().await else {
        return;
    };
    let gate = Gate::new(&sandbox);
    let spec = gate.hook(sandbox.spec(&["sleep", "1000"]), "startContainer", "a");
    sandbox
        .create("slow", &spec, proto::Stdio::new())
        .await
        .unwrap();
    let start = sandbox.begin_start("slow");
    gate.reached("a").await;
    live_a_life(&sandbox, "quick").await;
    assert_eq!(
        sandbox.state("slow").await,
        Some(proto::State::STATE_CREATED)
    );
    let (code, message) = status(sandbox.delete("slow", "").await);
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(message.contains("being started"), "{message}");
    // The gate stays shut: the hook goes with the init that it was for.
    let mut events = sandbox.watch().await;
    sandbox.signal("slow", "", libc::SIGKILL).await.unwrap();
    let exit = events.exit().await;
    assert_eq!(
        (exit.container_id.as_str(), exit.exit_status),
        ("slow", 137)
    );
    let (code, message) = status(start.await.unwrap());
    assert_eq!(code, Code::INTERNAL);
    assert!(message.contains("ended before"), "{message}");
    assert_eq!(sandbox.delete("slow", "").await.unwrap(), Some(exit));
    nothing_is_left(&sandbox).await;
}

#[tokio::test]
async fn a_container_can_be_killed_while_it_is_made() {
    let Some(sandbox) = Sandbox::start().await else {
        return;
    };
    let gate = Gate::new(&sandbox);
    let spec = gate.hook(sandbox.spec(&["true"]), "createRuntime", "a");
    let create = sandbox.begin_create("slow", &spec);
    gate.reached("a").await;
    sandbox.signal("slow", "", libc::SIGKILL).await.unwrap();
    let (_, message) = status(create.await.unwrap());
    assert!(message.contains("ended before"), "{message}");
    let gone = sandbox.signal("slow", "", libc::SIGKILL).await;
    assert_eq!(status(gone).0, Code::NOT_FOUND);
    nothing_is_left(&sandbox).await;
    // Its id is free again.
    live_a_life(&sandbox, "slow").await;
    nothing_is_left(&sandbox).await;
}

#[tokio::test]
async fn of_several_callers_one_succeeds() {
    let Some(sandbox) = Sandbox::start().await else {
        return;
    };
    let mut gate = Gate::new(&sandbox);
    let plain = sandbox.spec(&["sleep", "1000"]);
    let creates = join_all((0..4).map(|_| sandbox.create("a", &plain, proto::Stdio::new()))).await;
    one_succeeds(creates, Code::ALREADY_EXISTS);
    let starts = join_all((0..4).map(|_| sandbox.start_process("a", ""))).await;
    one_succeeds(starts, Code::FAILED_PRECONDITION);

    let spec = gate.hook(plain.clone(), "startContainer", "b");
    let spec = gate.hook(spec, "poststop", "b-end");
    sandbox
        .create("b", &spec, proto::Stdio::new())
        .await
        .unwrap();
    let first = sandbox.begin_start("b");
    gate.reached("b").await;
    let second = sandbox.start_process("b", "").await;
    assert_eq!(status(second).0, Code::FAILED_PRECONDITION);
    gate.open(1);
    first.await.unwrap().unwrap();

    let mut events = sandbox.watch().await;
    sandbox.signal("b", "", libc::SIGKILL).await.unwrap();
    assert_eq!(events.exit().await.exit_status, 137);
    let (client, request) = (sandbox.client.clone(), process_ref("b", ""));
    let first = tokio::spawn(async move { client.delete(soon(), &request).await });
    gate.reached("b-end").await;
    let (code, message) = status(sandbox.delete("b", "").await);
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(message.contains("being deleted"), "{message}");
    gate.open(1);
    first.await.unwrap().unwrap();
    assert_eq!(sandbox.state("b").await, None);
    sandbox.signal("a", "", libc::SIGKILL).await.unwrap();
    events.exit().await;
    let deletes = join_all((0..4).map(|_| sandbox.delete("a", ""))).await;
    assert_eq!(deletes.iter().filter(|result| result.is_ok()).count(), 1);
    nothing_is_left(&sandbox).await;
}

fn one_succeeds<T: std::fmt::Debug>(results: Vec<ttrpc::Result<T>>, code: Code) {
    let (won, lost): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
    assert_eq!(won.len(), 1, "{won:?}");
    for result in lost {
        assert_eq!(status(result).0, code);
    }
}

#[tokio::test]
async fn as_many_slow_containers_as_there_may_be_leave_room_for_the_others() {
    let Some(sandbox) = Sandbox::start().await else {
        return;
    };
    let mut gate = Gate::new(&sandbox);
    let ids: Vec<String> = (0..48).map(|number| format!("slow-{number}")).collect();
    let mut slow = Vec::new();
    // Eight at first, then as many as may be made at once.
    for part in [&ids[..8], &ids[8..]] {
        for id in part {
            let spec = gate.hook(sandbox.spec(&["true"]), "createRuntime", id);
            slow.push(sandbox.begin_create(id, &spec));
        }
        for id in part {
            gate.reached(id).await;
        }
        if slow.len() == 8 {
            live_a_life(&sandbox, "quick").await;
            sandbox.run("quick", &["sleep", "1000"]).await;
        }
    }
    let spec = sandbox.spec(&["true"]);
    let (code, message) = status(sandbox.create("more", &spec, proto::Stdio::new()).await);
    assert_eq!(code, Code::RESOURCE_EXHAUSTED);
    assert!(message.contains("48"), "{message}");
    let mut events = sandbox.watch().await;
    sandbox
        .exec("quick", "e", &process(&["true"]), proto::Stdio::new())
        .await
        .unwrap();
    sandbox.start_process("quick", "e").await.unwrap();
    assert_eq!(events.exit().await.exec_id, "e");
    sandbox.signal("quick", "", libc::SIGKILL).await.unwrap();
    assert_eq!(events.exit().await.exit_status, 137);
    sandbox.delete("quick", "").await.unwrap();
    gate.open(ids.len());
    for created in join_all(slow).await {
        created.unwrap().unwrap();
    }
    for deleted in join_all(ids.iter().map(|id| sandbox.delete(id, ""))).await {
        assert_eq!(deleted.unwrap().unwrap().exit_status, 137);
    }
    nothing_is_left(&sandbox).await;
}

#[tokio::test]
async fn a_storm_of_short_processes_loses_no_exit() {
    let Some(sandbox) = Sandbox::start().await else {
        return;
    };
    for id in ["a", "b"] {
        sandbox.run(id, &["sleep", "1000"]).await;
    }
    let mut events = sandbox.watch().await;
    let storm = (0..100).map(async |number: u32| {
        let (id, exec) = (["a", "b"][number as usize % 2], number.to_string());
        let command = process(&["sh", "-c", "exit $0", &exec]);
        sandbox
            .exec(id, &exec, &command, proto::Stdio::new())
            .await
            .unwrap();
        sandbox.start_process(id, &exec).await.unwrap();
    });
    let exits = async {
        let mut seen = Vec::new();
        for _ in 0..100 {
            let exit = events.exit().await;
            assert_eq!(exit.exec_id, exit.exit_status.to_string());
            seen.push(exit.exit_status);
        }
        seen.sort_unstable();
        seen
    };
    let (_, seen) = tokio::join!(join_all(storm), exits);
    assert!(seen.into_iter().eq(0..100));
    for id in ["a", "b"] {
        sandbox.signal(id, "", libc::SIGKILL).await.unwrap();
        events.exit().await;
        sandbox.delete(id, "").await.unwrap();
    }
    nothing_is_left(&sandbox).await;
}

#[tokio::test]
async fn what_a_caller_began_is_whole_though_it_is_gone() {
    let Some(sandbox) = Sandbox::start().await else {
        return;
    };
    let mut gate = Gate::new(&sandbox);
    let spec = gate.hook(sandbox.spec(&["sleep", "1000"]), "createRuntime", "a");
    let caller = sandbox.attach().await;
    let request = create_request("a", &spec, proto::Stdio::new());
    let create = tokio::spawn(async move { caller.create_container(soon(), &request).await });
    gate.reached("a").await;
    // With the only client of its connection.
    create.abort();
    assert!(create.await.unwrap_err().is_cancelled());
    gate.open(1);
    for _ in 0..6000 {
        if sandbox.state("a").await.is_some() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let mut events = sandbox.watch().await;
    sandbox.start_process("a", "").await.unwrap();
    sandbox.signal("a", "", libc::SIGKILL).await.unwrap();
    let exit = events.exit().await;
    assert_eq!(sandbox.delete("a", "").await.unwrap(), Some(exit));
    nothing_is_left(&sandbox).await;
}
