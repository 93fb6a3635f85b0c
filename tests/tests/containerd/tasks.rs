//! Tasks by `ctr`: each in a sandbox of its own.

use std::fs;
use std::process::Stdio;

use super::containerd;
use cella_tests::containerd::Containerd;
use cella_tests::finish;

/// Ends with 9 on SIGTERM.
const TRAP: &str =
    "echo started; trap 'echo term; exit 9' TERM; while :; do sleep 1 & wait $!; done";

#[test]
fn a_container_runs_to_its_end() {
    let Some(daemon) = containerd() else { return };
    let said = daemon.run(
        &[],
        "one",
        &["sh", "-c", "echo out; echo err >&2; uname -r; exit 7"],
    );
    assert_eq!(said.status, 7, "{said:?}");
    assert!(
        said.stdout.starts_with("out\n") && said.stdout.contains("cella"),
        "{said:?}"
    );
    assert_eq!(said.stderr, "err\n");

    let said = daemon.run(&[], "none", &["/no/such/command"]);
    assert_ne!(said.status, 0);
    assert!(said.stderr.contains("/no/such/command"), "{said:?}");

    let many = daemon.run(&[], "many", &["sh", "-c", "seq 1 20000"]);
    let lines: Vec<_> = many.stdout.lines().collect();
    assert_eq!(
        (lines.len(), lines.last()),
        (20000, Some(&"20000")),
        "no output is lost"
    );

    let src = daemon.host.path("volume");
    fs::create_dir(&src).unwrap();
    fs::write(src.join("in"), "from the host\n").unwrap();
    let mount = |options: &str, dst: &str| {
        format!(
            "type=bind,src={},dst={dst},options={options}",
            src.display()
        )
    };
    let (rw, ro) = (mount("rbind:rw", "/rw"), mount("rbind:ro", "/ro"));
    let options = ["--mount", &rw, "--mount", &ro, "--memory-limit", "33554432"];
    let script = "cat /ro/in; echo x > /rw/out; echo y 2>/dev/null > /ro/no && exit 5; awk '/MemTotal/ { print ($2 < 131072) }' /proc/meminfo";
    let said = daemon.run(&options, "volumes", &["sh", "-c", script]);
    assert_eq!(
        (said.status, said.stdout.as_str()),
        (0, "from the host\n1\n"),
        "{said:?}"
    );
    assert_eq!(fs::read_to_string(src.join("out")).unwrap(), "x\n");
    assert!(!src.join("no").exists());

    let shared = mount("rbind:rshared", "/shared");
    for (options, word) in [
        (&["--mount", shared.as_str()][..], "bidirectional"),
        (&["--net-host"][..], "network namespace"),
        (
            &["--annotation", "io.cella.memroy=1G"][..],
            "io.cella.memory",
        ),
        (
            &["--annotation", "io.cella.hypervisor=kvm"][..],
            "does not allow",
        ),
    ] {
        let said = daemon.run(options, "refused", &["true"]);
        assert_ne!(said.status, 0);
        assert!(said.stderr.contains(word), "no '{word}': {said:?}");
    }
    daemon.end();
}

#[test]
fn a_task_and_its_processes_from_create_to_delete() {
    let Some(daemon) = containerd() else { return };
    let events = daemon
        .ctr_command(&["events"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    daemon.run_detached("task", &["sh", "-c", TRAP]);
    assert_eq!(daemon.status("task").as_deref(), Some("RUNNING"));

    check_execs(&daemon);
    check_cost(daemon.shims()[0]);
    let said = daemon.ctr(&["task", "ps", "task"]).expect_status(0);
    assert!(said.stdout.lines().count() >= 2, "{said:?}");
    let said = daemon.ctr(&["task", "metrics", "task"]).expect_status(0);
    assert!(
        said.stdout.contains("memory") && said.stdout.contains("pids"),
        "{said:?}"
    );
    daemon.ctr(&["task", "pause", "task"]).expect_status(0);
    assert_eq!(daemon.status("task").as_deref(), Some("PAUSED"));
    daemon.ctr(&["task", "resume", "task"]).expect_status(0);
    assert_eq!(daemon.status("task").as_deref(), Some("RUNNING"));

    let said = daemon.ctr(&["task", "checkpoint", "task"]);
    assert!(said.status != 0, "{said:?}");
    let said = daemon.ctr(&["task", "rm", "task"]);
    assert!(said.status != 0, "a running task is not deleted: {said:?}");
    daemon
        .ctr(&["task", "kill", "-s", "SIGTERM", "task"])
        .expect_status(0);
    daemon.eventually("it ends", || {
        daemon.status("task").as_deref() == Some("STOPPED")
    });
    let said = daemon.ctr(&["task", "kill", "task"]);
    // Each generation of ctr says NotFound in its own way.
    let gone = ["not found", "finished already"]
        .iter()
        .any(|word| said.stderr.contains(word));
    assert!(said.status != 0 && gone, "{said:?}");
    let said = daemon.ctr(&["task", "rm", "task"]);
    assert!(
        said.stderr.contains("exit code 9") || said.status == 9,
        "{said:?}"
    );
    let log = fs::read_to_string(daemon.host.path("task.log")).unwrap();
    assert_eq!(log, "started\nterm\n");

    // The same container once more.
    daemon
        .ctr(&["task", "start", "-d", "task"])
        .expect_status(0);
    assert_eq!(daemon.status("task").as_deref(), Some("RUNNING"));
    daemon
        .ctr(&["task", "kill", "-s", "SIGKILL", "task"])
        .expect_status(0);
    daemon.eventually("it ends", || {
        daemon.status("task").as_deref() == Some("STOPPED")
    });
    daemon.remove("task");
    check_events(events);
    daemon.end();
}

fn check_execs(daemon: &Containerd) {
    let exec = |id: &str, script: &str| {
        daemon.ctr(&["task", "exec", "--exec-id", id, "task", "sh", "-c", script])
    };
    let said = exec("e1", "echo out; echo err >&2; exit 3");
    assert_eq!(
        (said.status, said.stdout.as_str(), said.stderr.as_str()),
        (3, "out\n", "err\n")
    );
    let cat = ["task", "exec", "--exec-id", "e2", "task", "cat"];
    let input = "0123456789\n".repeat(20_000);
    let said = daemon
        .ctr_with_input(&cat, input.as_bytes())
        .expect_status(0);
    assert!(
        said.stdout == input,
        "{} bytes of {}",
        said.stdout.len(),
        input.len()
    );
    let said = daemon.ctr(&["task", "exec", "--exec-id", "e3", "task", "/nonexistent"]);
    assert!(
        said.status != 0 && said.stderr.contains("/nonexistent"),
        "{said:?}"
    );
}

/// Of the first life of the task: complete and in order.
fn check_events(mut events: std::process::Child) {
    events.kill().unwrap();
    let text = finish(events, &[]).stdout;
    let topics: Vec<(&str, &str)> = text
        .lines()
        .filter_map(|line| {
            let topic = line
                .split_whitespace()
                .find(|word| word.starts_with("/tasks/"))?;
            Some((topic, line))
        })
        .collect();
    let position = |topic: &str, word: &str| {
        topics
            .iter()
            .position(|(t, line)| *t == topic && line.contains(word))
            .unwrap_or_else(|| panic!("no {topic} with {word} in {topics:#?}"))
    };
    let order = [
        position("/tasks/create", "task"),
        position("/tasks/start", "task"),
        position("/tasks/exec-added", "e1"),
        position("/tasks/exec-started", "e1"),
        position("/tasks/exit", "\"id\":\"e1\""),
        position("/tasks/paused", "task"),
        position("/tasks/resumed", "task"),
        position("/tasks/exit", "\"id\":\"task\""),
        position("/tasks/delete", "task"),
    ];
    assert!(order.is_sorted(), "{order:?} in {topics:#?}");
}

#[test]
fn a_terminal_and_a_logger() {
    let Some(daemon) = containerd() else { return };
    daemon.run_detached("host", &["sleep", "1000"]);
    // ctr wants a terminal of its own for -t: script(1) gives it one.
    let ctr = format!(
        "ctr --address {} task exec -t --exec-id tty host sh -c 'tty; test -t 0 && exit 6'",
        daemon.socket().display()
    );
    let mut script = std::process::Command::new("script");
    script.args(["-qec", &ctr, "/dev/null"]);
    daemon.host.on_this_host(&mut script);
    let said = finish(script.spawn().unwrap(), &[]);
    assert!(
        said.status == 6 && said.stdout.contains("/dev/pts/"),
        "{said:?}"
    );
    daemon
        .ctr(&["task", "kill", "-s", "SIGKILL", "host"])
        .expect_status(0);
    daemon.eventually("it ends", || {
        daemon.status("host").as_deref() == Some("STOPPED")
    });
    daemon.remove("host");

    let logger = daemon.host.path("logger.sh");
    let log = daemon.host.path("logged");
    fs::write(
        &logger,
        "#!/bin/sh\nexec 5>&-\n{ echo \"$CONTAINER_NAMESPACE/$CONTAINER_ID $*\"; cat <&3; cat <&4; } > \"$2\"\n",
    )
    .unwrap();
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(&logger, fs::Permissions::from_mode(0o755)).unwrap();
    let uri = format!("binary://{}?file={}", logger.display(), log.display());
    daemon
        .ctr(&[
            "run",
            "-d",
            "--log-uri",
            &uri,
            "--runtime",
            cella_tests::containerd::RUNTIME,
            cella_tests::containerd::IMAGE,
            "logged",
            "sh",
            "-c",
            "echo one; echo two >&2",
        ])
        .expect_status(0);
    daemon.eventually("it ends", || {
        daemon.status("logged").as_deref() == Some("STOPPED")
    });
    daemon.remove("logged");
    let expected = format!("default/logged file {}\none\ntwo\n", log.display());
    daemon.eventually("the logger ends", || {
        fs::read_to_string(&log).is_ok_and(|text| text == expected)
    });
    daemon.end();
}

/// One thread, and at most 8 MiB of resident memory.
fn check_cost(shim: u32) {
    let status = fs::read_to_string(format!("/proc/{shim}/status")).unwrap();
    let number = |name: &str| -> u64 {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    assert_eq!(number("Threads:"), 1);
    assert!(number("VmRSS:") <= 8 << 10, "{} KiB", number("VmRSS:"));
}

#[test]
fn the_runtimes_own_options() {
    let Some(daemon) = containerd() else { return };
    let own = daemon.host.path("own.toml");
    let hypervisor = super::hypervisor_name();
    fs::write(&own, format!("hypervisor = \"{hypervisor}\"\ncpus = 2\n")).unwrap();
    let options = ["--runtime-config-path", own.to_str().unwrap()];
    let said = daemon.run(&options, "own", &["nproc"]).expect_status(0);
    assert_eq!(said.stdout, "2\n");
    fs::write(&own, "hypervsor = \"kvm\"\n").unwrap();
    let said = daemon.run(&options, "wrong", &["true"]);
    assert!(
        said.status != 0 && said.stderr.contains("did you mean 'hypervisor'"),
        "{said:?}"
    );
    daemon.end();
}

/// The telling part on KVM, where the rest of the suite is on QEMU: emulated guests take long to boot.
#[test]
fn a_container_on_kvm() {
    if super::hypervisor_name() == "kvm" {
        return; // as every test
    }
    let Some(daemon) = super::containerd_on("kvm") else {
        return;
    };
    daemon.run_detached("task", &["sh", "-c", TRAP]);
    let exec = [
        "task",
        "exec",
        "--exec-id",
        "e",
        "task",
        "sh",
        "-c",
        "echo out; exit 3",
    ];
    let said = daemon.ctr(&exec);
    assert_eq!(
        (said.status, said.stdout.as_str()),
        (3, "out\n"),
        "{said:?}"
    );
    check_cost(daemon.shims()[0]);
    daemon
        .ctr(&["task", "kill", "-s", "SIGTERM", "task"])
        .expect_status(0);
    daemon.eventually("it ends", || {
        daemon.status("task").as_deref() == Some("STOPPED")
    });
    daemon.remove("task");
    let log = fs::read_to_string(daemon.host.path("task.log")).unwrap();
    assert_eq!(log, "started\nterm\n");
    daemon.end();
}
