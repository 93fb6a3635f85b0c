//! QEMU in all the states that a host may have it in, and every death in the middle: one clear line, and nothing left.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use cella_tests::{Host, finish, missing_for, processes, skip, wait};

/// A caller learns of a death within this.
const NOTICE: Duration = Duration::from_secs(2);

fn host() -> Option<Host> {
    match missing_for("qemu") {
        Some(missing) => {
            skip(&missing);
            None
        }
        None => Some(Host::on("qemu")),
    }
}

/// Puts a program that is not quite QEMU where `--qemu` can name it.
fn fake(host: &Host, script: &str) -> String {
    let path = host.path("qemu-fake");
    fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path.to_str().unwrap().to_owned()
}

#[track_caller]
fn refused(host: &Host, qemu: &str, words: &[&str]) {
    let image = host.busybox();
    host.cella(&["run", "--qemu", qemu, &image, "true"])
        .expect_failure(words);
    host.assert_clean();
}

#[test]
fn there_is_no_qemu() {
    let Some(host) = host() else { return };
    refused(
        &host,
        "/nonexistent/qemu",
        &["/nonexistent/qemu", "qemu-system-x86"],
    );
    refused(&host, "no-such-qemu", &["no-such-qemu", "qemu-system-x86"]);
    let directory = host.path("");
    refused(
        &host,
        directory.to_str().unwrap(),
        &["looking for QEMU", "no file"],
    );
}

#[test]
fn qemu_is_too_old() {
    let Some(host) = host() else { return };
    let old = fake(
        &host,
        "[ \"$1\" = --version ] && { echo 'QEMU emulator version 4.1.0'; exit; }
         echo 'qemu: unsupported machine type' >&2; exit 1",
    );
    refused(&host, &old, &["QEMU 4.1 is too old", "5.2"]);
}

#[test]
fn what_is_no_qemu() {
    let Some(host) = host() else { return };
    refused(&host, "/bin/true", &["/bin/true"]);
    refused(&host, "/bin/false", &["/bin/false"]);
    let broken = fake(
        &host,
        "[ \"$1\" = --version ] && { echo 'QEMU emulator version 9.0.0'; exit; }
         echo one; echo 'the last words' >&2; exit 3",
    );
    refused(&host, &broken, &["status 3", "the last words"]);
    let killed = fake(
        &host,
        "[ \"$1\" = --version ] && { echo 'QEMU emulator version 9.0.0'; exit; }
         kill -SEGV $$",
    );
    refused(&host, &killed, &["signal 11"]);
}

#[test]
fn a_peer_that_speaks_rubbish() {
    let Some(host) = host() else { return };
    // The descriptors of the devices' sockets are 5 and 6.
    let rubbish = fake(
        &host,
        "[ \"$1\" = --version ] && { echo 'QEMU emulator version 9.0.0'; exit; }
         head -c 4096 /boot/kernel >&5; sleep 60",
    );
    refused(&host, &rubbish, &["device vsock", "cannot be done"]);
    let closes = fake(
        &host,
        "[ \"$1\" = --version ] && { echo 'QEMU emulator version 9.0.0'; exit; }
         exec 6>&-; sleep 60",
    );
    refused(&host, &closes, &["device fs", "closed"]);
}

/// A container that says when it runs and then sleeps.
fn running(host: &Host) -> Child {
    let image = host.busybox();
    let script = "echo up; sleep 1000";
    let mut child = host
        .command(&["run", "--name", "c", &image, "sh", "-c", script])
        .spawn()
        .unwrap();
    let mut said = [0; 3];
    child
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut said)
        .unwrap();
    child
}

fn pid_of(host: &Host, is: impl Fn(&str) -> bool) -> u32 {
    let all = host.processes();
    let vmm = all
        .iter()
        .find(|(_, line)| line.contains("cella-vmm --control"));
    let vmm = vmm.unwrap_or_else(|| panic!("no VMM in {all:?}")).0;
    if is("cella-vmm") {
        return vmm;
    }
    let children = fs::read_to_string(format!("/proc/{vmm}/task/{vmm}/children")).unwrap();
    children.split_whitespace().next().unwrap().parse().unwrap()
}

fn signal(pid: u32, signal: &str) {
    let status = Command::new("kill")
        .args([signal, &pid.to_string()])
        .status();
    assert!(status.unwrap().success());
}

fn gone(pid: u32) {
    let deadline = Instant::now() + NOTICE;
    while Path::new(&format!("/proc/{pid}")).exists() {
        assert!(Instant::now() < deadline, "process {pid} lives");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn qemu_is_killed() {
    let Some(host) = host() else { return };
    for (how, words) in [("-KILL", "signal 9"), ("-TERM", "told to end")] {
        let mut child = running(&host);
        let qemu = pid_of(&host, |name| name == "qemu");
        signal(qemu, how);
        assert_eq!(wait(&mut child, NOTICE), 125);
        finish(child, b"").expect_failure(&["virtual machine", words]);
        host.assert_clean();
    }
}

#[test]
fn the_end_of_one_is_the_end_of_the_other() {
    let Some(host) = host() else { return };
    let mut child = running(&host);
    let qemu = pid_of(&host, |name| name == "qemu");
    signal(pid_of(&host, |name| name == "cella-vmm"), "-KILL");
    gone(qemu);
    assert_eq!(wait(&mut child, NOTICE), 125);
    finish(child, b"").expect_failure(&["virtual machine"]);
    host.assert_clean();

    // The door is killed: both end, though nobody tells them.
    let mut child = running(&host);
    let qemu = pid_of(&host, |name| name == "qemu");
    let vmm = pid_of(&host, |name| name == "cella-vmm");
    child.kill().unwrap();
    child.wait().unwrap();
    gone(qemu);
    gone(vmm);
    let said = host.cella(&["gc"]).expect_status(0);
    assert!(said.stdout.contains("sandbox c"), "{said:?}");
    host.assert_clean();
}

/// The memory that a process has for itself, beside the guest's.
fn own_pss_kib(pid: u32) -> u64 {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let mut of_guest = false;
    let mut sum = 0;
    for line in smaps.lines() {
        if let Some(pss) = line.strip_prefix("Pss:") {
            let kib: u64 = pss.trim().trim_end_matches(" kB").parse().unwrap();
            sum += if of_guest { 0 } else { kib };
        } else if !line.split_whitespace().next().unwrap().ends_with(':') {
            of_guest = line.contains("/memfd:");
        }
    }
    sum
}

#[test]
fn qemu_is_jailed() {
    let Some(host) = host() else { return };
    let child = running(&host);
    let qemu = pid_of(&host, |name| name == "qemu");
    let status = fs::read_to_string(format!("/proc/{qemu}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name));
        let words = line
            .unwrap_or_else(|| panic!("no {name}"))
            .split_whitespace();
        words.skip(1).map(str::to_owned).collect::<Vec<_>>()
    };
    let ids = field("Uid:");
    assert!(ids.iter().all(|id| id != "0" && *id == ids[0]), "{ids:?}");
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(field(set), ["0000000000000000"], "{set}");
    }
    assert_eq!(field("NoNewPrivs:"), ["1"]);
    assert_eq!(field("Seccomp:"), ["2"]);
    for namespace in ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
        assert_ne!(of(&qemu.to_string()), of("self"), "{namespace}");
    }
    // What it sees of the host: programs and libraries, read-only, and the guest's kernel and image.
    let mounts = fs::read_to_string(format!("/proc/{qemu}/mountinfo")).unwrap();
    for line in mounts.lines() {
        let options = line.split_whitespace().nth(5).unwrap();
        assert!(options.split(',').any(|option| option == "ro"), "{line}");
    }
    for path in ["etc/passwd", "proc", "dev", "tmp", "root", "home", "var"] {
        let there = Path::new(&format!("/proc/{qemu}/root/{path}")).exists();
        assert!(!there, "/{path} is there");
    }
    let pss = own_pss_kib(qemu);
    println!("QEMU, its guest's memory apart: {pss} KiB");
    // Its program and libraries, which other machines share with it, are 21 MB of it, translated code 20 (docs/qemu.md).
    assert!(pss < 60_000, "{pss} KiB");
    host.cella(&["kill", "c", "KILL"]).expect_status(0);
    finish(child, b"").expect_status(128 + 9);
    host.assert_clean();
}

#[test]
fn dev_shm_is_full() {
    let Some(host) = host() else { return };
    let image = host.busybox();
    // In a mount namespace of its own: a /dev/shm of one page, taken.
    let script = "mount -t tmpfs -o size=4k none /dev/shm && head -c 4096 /dev/zero > /dev/shm/full && exec \"$@\"";
    let mut command = Command::new("unshare");
    command
        .args(["-m", "sh", "-c", script, "sh"])
        .arg(cella_tests::cella_binary())
        .args(["run", &image, "echo", "runs"]);
    host.on_this_host(&mut command);
    let said = finish(command.spawn().unwrap(), b"").expect_status(0);
    assert_eq!(said.stdout, "runs\n", "guest memory is no file of /dev/shm");
    host.assert_clean();
}

#[test]
fn auto_says_why_it_is_slow() {
    let Some(host) = host() else { return };
    let image = host.busybox();
    // In a mount namespace of its own: no /dev/kvm.
    let script = "mount -t tmpfs none /dev && mknod /dev/null c 1 3 && mknod /dev/urandom c 1 9 && exec \"$@\"";
    let run = |args: &[&str]| {
        let mut command = Command::new("unshare");
        command
            .args(["-m", "sh", "-c", script, "sh"])
            .arg(cella_tests::cella_binary())
            .args(args);
        host.on_this_host(&mut command);
        finish(command.spawn().unwrap(), b"")
    };
    let said = run(&["run", "--hypervisor", "auto", &image, "echo", "runs"]).expect_status(0);
    assert_eq!(said.stdout, "runs\n");
    assert_eq!(said.stderr.lines().count(), 1, "{said:?}");
    for word in [
        "/dev/kvm",
        "software emulation",
        "slow",
        "no security boundary",
    ] {
        assert!(said.stderr.contains(word), "{said:?}");
    }
    run(&["run", "--hypervisor", "kvm", &image, "true"]).expect_failure(&["/dev/kvm"]);
    let qemu = [
        "run",
        "--hypervisor",
        "auto",
        "--qemu",
        "/nonexistent",
        &image,
        "true",
    ];
    run(&qemu).expect_failure(&["no hypervisor", "/dev/kvm", "/nonexistent"]);
    let auto = host.path("auto.toml");
    fs::write(&auto, "hypervisor = \"auto\"").unwrap();
    let said = run(&["check", "--config", auto.to_str().unwrap()]).expect_status(0);
    for word in [
        "qemu by \"auto\"",
        "/dev/kvm",
        "better",
        "A sandbox can run here",
    ] {
        assert!(said.stdout.contains(word), "{word}: {said:?}");
    }
    host.assert_clean();
}

#[test]
fn killed_while_qemu_starts() {
    let Some(host) = host() else { return };
    let image = host.busybox();
    for delay in [20, 60, 120, 250] {
        let mut child = host
            .command(&["run", "--name", "c", &image, "true"])
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(delay));
        child.kill().unwrap();
        child.wait().unwrap();
        let name = host.path("run").display().to_string();
        let deadline = Instant::now() + NOTICE;
        while !processes(|line| line.contains(&name)).is_empty() {
            assert!(Instant::now() < deadline, "{:?}", host.processes());
            std::thread::sleep(Duration::from_millis(20));
        }
        host.cella(&["gc"]).expect_status(0);
        host.assert_clean();
    }
}
