//! `kill -9` of whoever is in the middle: the caller learns it within two seconds, and what is left goes with the next `cella gc`.

use std::process::Child;
use std::time::{Duration, Instant};

use super::host;
use cella_tests::{Host, finish, processes, wait};

/// A caller learns of a death within this.
const NOTICE: Duration = Duration::from_secs(2);

/// A container in a sandbox of its own that says when it runs and then sleeps.
fn running(host: &Host) -> Child {
    use std::io::Read;
    let image = host.busybox();
    let mut child = host
        .command(&[
            "run",
            "--name",
            "c",
            &image,
            "sh",
            "-c",
            "echo up; sleep 1000",
        ])
        .spawn()
        .unwrap();
    let mut said = [0; 3];
    child
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut said)
        .unwrap();
    assert_eq!(&said, b"up\n");
    child
}

fn vmm(host: &Host) -> u32 {
    let share = host.path("run");
    let vmms =
        processes(|line| line.contains("cella-vmm") && line.contains(share.to_str().unwrap()));
    assert_eq!(vmms.len(), 1, "{vmms:?}");
    vmms[0].0
}

fn kill(pid: u32) {
    let status = std::process::Command::new("kill")
        .args(["-9", &pid.to_string()])
        .status();
    assert!(status.unwrap().success());
}

#[test]
fn the_vmm_is_killed() {
    let Some(host) = host() else { return };
    let mut child = running(&host);
    kill(vmm(&host));
    let begin = Instant::now();
    assert_eq!(wait(&mut child, NOTICE), 125);
    assert!(begin.elapsed() < NOTICE);
    finish(child, b"").expect_failure(&["virtual machine"]);
    host.assert_clean();
}

#[test]
fn the_command_is_killed() {
    let Some(host) = host() else { return };
    let mut child = running(&host);
    child.kill().unwrap();
    child.wait().unwrap();
    // The VMM ends by itself; the sandbox's directory is for gc, or for the next start of the same id.
    let deadline = Instant::now() + NOTICE;
    while !host.processes().is_empty() {
        assert!(Instant::now() < deadline, "{:?}", host.processes());
        std::thread::sleep(Duration::from_millis(20));
    }
    let said = host.cella(&["gc"]).expect_status(0);
    assert!(said.stdout.contains("sandbox c"), "{said:?}");
    assert!(said.stdout.contains("container c"), "{said:?}");
    host.assert_clean();
    assert_eq!(
        host.cella(&["gc"]).expect_status(0).stdout,
        "",
        "a second time there is nothing"
    );
}

#[test]
fn the_guest_panics() {
    let Some(host) = host() else { return };
    let image = host.busybox();
    // /proc/sysrq-trigger is read-only in a container: the panic is made from the host's side, by the guest kernel's own
    // command line, at a time when the agent has not called yet.
    host.configure("kernel_params = \"init=/nonexistent rdinit=/nonexistent\"\n");
    let begin = Instant::now();
    let said = host.cella(&["run", &image, "true"]);
    said.expect_failure(&["virtual machine"]);
    assert!(
        begin.elapsed() < Duration::from_secs(60),
        "a panic is not a time-out"
    );
    host.assert_clean();
}

#[test]
fn killed_while_it_boots() {
    let Some(host) = host() else { return };
    let image = host.busybox();
    for delay in [50, 400, 1500] {
        let mut child = host
            .command(&["run", "--name", "c", &image, "true"])
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(delay));
        child.kill().unwrap();
        child.wait().unwrap();
        host.cella(&["gc"]).expect_status(0);
        host.assert_clean();
    }
}

#[test]
fn interrupted_while_it_boots() {
    let Some(host) = host() else { return };
    let image = host.busybox();
    let mut child = host.command(&["run", &image, "true"]).spawn().unwrap();
    let boots = || {
        let processes = host.processes();
        processes.iter().any(|(_, line)| line.contains("cella-vmm"))
    };
    while !boots() {
        assert!(child.try_wait().unwrap().is_none(), "it has ended already");
        std::thread::sleep(Duration::from_millis(5));
    }
    let pid = child.id().to_string();
    std::process::Command::new("kill")
        .args(["-TERM", &pid])
        .status()
        .unwrap();
    assert_eq!(wait(&mut child, NOTICE), 128 + 15);
    host.assert_clean();
}
