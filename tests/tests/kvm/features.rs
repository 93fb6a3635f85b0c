//! What a container's processes are given, and how they end.

use std::time::{Duration, Instant};

use super::host;
use super::pod::Pod;

#[test]
fn a_container_alone() {
    let Some(host) = host() else { return };
    let image = host.busybox();
    let timeline = host.path("timeline.json");
    let file = timeline.to_str().unwrap();
    let said = host
        .cella(&[
            "run",
            "--timeline",
            file,
            "--memory",
            "128M",
            "-e",
            "A=b c",
            &image,
            "sh",
            "-c",
            "uname -r; echo $A >&2; exit 3",
        ])
        .expect_status(3);
    assert!(said.stdout.starts_with("6.12"), "{said:?}");
    assert_eq!(said.stderr, "b c\n");
    let text = std::fs::read_to_string(&timeline).unwrap();
    let phases: serde_json::Value = serde_json::from_str(&text).unwrap();
    let names: Vec<_> = phases["phases"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| p["who"].as_str().unwrap())
        .collect();
    for who in ["host", "vmm", "kernel", "agent", "container"] {
        assert!(names.contains(&who), "{who} is not in {text}");
    }
    host.assert_clean();
}

#[test]
fn what_processes_get() {
    let Some(pod) = Pod::boot("1") else { return };
    rights(&pod);
    terminal(&pod);
    statistics(&pod);
    vector_state(&pod);
    exit_statuses(&pod);
    standard_streams(&pod);
    pod.end();
}

fn exit_statuses(pod: &Pod) {
    for (command, status) in [
        (&["sh", "-c", "exit 42"][..], 42),
        (&["/no/such/command"], 127),
        (&["/etc/passwd"], 126),
    ] {
        let said = pod.run(&[], command);
        assert_eq!(said.status, status, "run {command:?}: {said:?}");
    }
    for (command, status) in [
        // Not as the init of the container, to which its own signals do nothing.
        (&["sh", "-c", "kill -KILL $$"][..], 128 + 9),
        (&["no-such-command"], 127),
        (&["/etc/passwd"], 126),
    ] {
        let args: Vec<_> = ["exec", "c"].iter().chain(command).copied().collect();
        let said = pod.host.cella(&args);
        assert_eq!(said.status, status, "exec {command:?}: {said:?}");
    }
}

fn standard_streams(pod: &Pod) {
    // 1 MiB; `everything/streams.rs` and `cella bench stdio` send more.
    let sent: Vec<u8> = (0..1 << 20)
        .map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let sum = "sha256sum | cut -d' ' -f1";
    let of_host = {
        use sha2::{Digest, Sha256};
        let digest = Sha256::digest(&sent);
        digest
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>()
    };
    let said = pod
        .host
        .cella_with_input(&["exec", "-i", "c", "sh", "-c", sum], &sent)
        .expect_status(0);
    assert_eq!(said.stdout.trim(), of_host, "what arrived in the container");
    let script = "i=0; while [ $i -lt 50 ]; do echo line $i; i=$((i+1)); done; echo end >&2";
    let said = pod.run(&[], &["sh", "-c", script]).expect_status(0);
    assert_eq!(
        said.stdout.lines().count(),
        50,
        "output of a process that has exited"
    );
    assert_eq!(said.stdout.lines().last(), Some("line 49"));
    assert_eq!(said.stderr, "end\n");
    // Without -i the input is empty at once.
    assert_eq!(pod.sh("cat | wc -c").trim(), "0");
}

fn rights(pod: &Pod) {
    let status = pod.sh("cat /proc/self/status");
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name));
        line.unwrap_or_else(|| panic!("no {name} in {status}"))
            .split_whitespace()
            .nth(1)
            .unwrap()
            .to_owned()
    };
    // Docker's default set: 14 capabilities.
    assert_eq!(field("CapEff:"), "00000000a80425fb");
    assert_eq!(field("CapBnd:"), "00000000a80425fb");
    assert_eq!(field("Seccomp:"), "2");
    // Seccomp refuses what the profile does not allow; capabilities what root may not do here.
    let said = pod
        .host
        .cella(&["exec", "c", "mount", "-t", "tmpfs", "none", "/tmp"]);
    assert_ne!(said.status, 0, "{said:?}");
    let said = pod
        .host
        .cella(&["exec", "c", "sh", "-c", "echo 1 > /proc/sys/kernel/panic"]);
    assert_ne!(said.status, 0, "/proc/sys is read-only: {said:?}");
}

fn terminal(pod: &Pod) {
    let said = pod
        .host
        .cella(&["exec", "-t", "c", "sh", "-c", "tty; stty size"])
        .expect_status(0);
    assert!(said.stdout.contains("/dev/pts/0"), "{said:?}");
    assert!(said.stdout.contains("24 80"), "{said:?}");
}

/// busybox's sha256sum uses the CPU's vector and SHA instructions: two at once, with signals between, must not
/// disturb each other's registers.
fn vector_state(pod: &Pod) {
    let script = "
        trap : USR1
        one() { head -c 50000 /dev/zero | tr '\\0' \"$1\" | sha256sum; }
        first=$(one a); second=$(one b)
        (sleep 1; kill -USR1 $$) &
        i=0
        while [ $i -lt 2 ]; do
            one a > /tmp/a & p=$!
            [ \"$(one b)\" = \"$second\" ] || exit 1
            wait $p
            [ \"$(cat /tmp/a)\" = \"$first\" ] || exit 1
            i=$((i+1))
        done";
    pod.sh(script);
}

fn statistics(pod: &Pod) {
    let said = pod.host.cella(&["stats", "--json", "c"]).expect_status(0);
    let stats: serde_json::Value = serde_json::from_str(&said.stdout).unwrap();
    assert!(stats["memory_current"].as_u64().unwrap() > 0, "{stats}");
    assert!(stats["cpu_usage_usec"].as_u64().unwrap() > 0, "{stats}");
    assert!(stats["pids_current"].as_u64().unwrap() >= 1, "{stats}");
}

#[test]
fn a_signal_ends_a_container() {
    let Some(pod) = Pod::boot("1") else { return };
    // A signal by name ends a container as OCI has it.
    let image = pod.host.busybox();
    pod.host
        .cella(&[
            "run", "--pod", "pod", "-d", "--name", "k", &image, "sleep", "1000",
        ])
        .expect_status(0);
    pod.host.cella(&["kill", "k", "KILL"]).expect_status(0);
    let deadline = Instant::now() + Duration::from_secs(20);
    while !pod
        .host
        .cella(&["ps", "--json"])
        .stdout
        .contains("\"code\":137")
    {
        assert!(Instant::now() < deadline, "the kill is not seen");
        std::thread::sleep(Duration::from_millis(100));
    }
    pod.host.cella(&["rm", "k"]).expect_status(0);
    pod.end();
}
