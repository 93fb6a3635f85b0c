//! Starts that end early, in every other way than a signal to the door: what was wrong is said, and nothing is left.

use std::time::{Duration, Instant};

use super::host;
use super::isolation::bundle;
use cella_tests::image::{archive, entry, layout_of};
use cella_tests::{Host, finish, processes, wait};

/// A caller learns of a death within this.
const NOTICE: Duration = Duration::from_secs(2);

fn vmms(host: &Host) -> Vec<(u32, String)> {
    let run = host.path("run").display().to_string();
    processes(|line| line.contains("cella-vmm --control") && line.contains(&run))
}

#[test]
fn the_vmm_is_killed_while_it_boots() {
    let Some(host) = host() else { return };
    let image = host.busybox();
    for delay in [0, 30, 100, 300, 600] {
        let mut child = host
            .command(&["run", &image, "sleep", "1000"])
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while vmms(&host).is_empty() {
            assert!(Instant::now() < deadline, "no VMM");
            std::thread::sleep(Duration::from_millis(2));
        }
        std::thread::sleep(Duration::from_millis(delay));
        // At the very beginning there are two: the process that makes the jail, and the one in it.
        for (pid, _) in vmms(&host) {
            let _ = std::process::Command::new("kill")
                .args(["-9", &pid.to_string()])
                .status();
        }
        assert_eq!(wait(&mut child, NOTICE), 125, "after {delay} ms");
        finish(child, b"").expect_failure(&[]);
        host.assert_clean();
    }
}

#[test]
fn the_guest_panics_while_a_container_runs() {
    let Some(host) = host() else { return };
    host.configure("memory = \"64M\"\n");
    // A container that may: it takes all of the guest's memory, which the guest shall not survive.
    let script = "echo 2 > /proc/sys/vm/panic_on_oom && echo up && exec tail /dev/zero";
    let image = bundle(&host, &["sh", "-c", script], |_| ());
    let begin = Instant::now();
    let said = host.cella(&["run", &image]);
    assert_eq!(said.stdout, "up\n", "{said:?}");
    said.expect_failure(&["virtual machine"]);
    assert!(
        begin.elapsed() < Duration::from_secs(60),
        "a panic is no time-out"
    );
    host.assert_clean();
}

#[test]
fn a_user_whom_the_image_does_not_know() {
    let Some(host) = host() else { return };
    let layer = archive(&[
        entry("etc", b'5', "", b""),
        entry("etc/passwd", b'0', "", b"root:x:0:0::/:/bin/sh\n"),
    ]);
    for (number, user) in ["nobody-here", "0:no-such-group", "1:2:3"]
        .iter()
        .enumerate()
    {
        let config = format!("{{\"User\":\"{user}\"}}");
        let image = layout_of(&host.path(&format!("image-{number}")), &config, &layer);
        let word = user.trim_start_matches("0:");
        host.cella(&["run", &image, "true"]).expect_failure(&[word]);
        host.assert_clean();
    }
}

#[test]
fn an_id_in_use() {
    let Some(host) = host() else { return };
    let image = host.busybox();
    let mut first = host
        .command(&["run", "--name", "twice", &image, "sleep", "1000"])
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while !host.cella(&["ps"]).stdout.contains("running") {
        assert!(Instant::now() < deadline, "it does not run");
        std::thread::sleep(Duration::from_millis(50));
    }
    host.cella(&["run", "--name", "twice", &image, "true"])
        .expect_failure(&["twice", "exists already"]);
    host.cella(&["kill", "twice"]).expect_status(0);
    assert_eq!(wait(&mut first, Duration::from_secs(30)), 128 + 9);
    host.assert_clean();
}
