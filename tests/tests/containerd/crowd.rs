//! Pods and containers beside each other: none waits for another, and many live and go at once.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::json;

use super::with_pods;
use crate::pods::{Pod, pod_config};
use cella_tests::containerd::{Containerd, IMAGE, RUNTIME};
use cella_tests::finish;

/// How long the stall lasts that nobody is to notice.
const STALL: Duration = Duration::from_secs(30);
/// No call takes longer, though guests are emulated.
const CALL: Duration = Duration::from_secs(10);

/// A file system that never answers, as of a server that is gone.
struct Silent {
    device: Option<File>,
    place: PathBuf,
}

impl Silent {
    fn mount(place: PathBuf) -> Self {
        std::fs::create_dir(&place).unwrap();
        let device = File::options()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .unwrap();
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0",
            device.as_raw_fd()
        );
        let target = CString::new(place.as_os_str().as_bytes()).unwrap();
        let options = CString::new(options).unwrap();
        // SAFETY: every argument is a C string that outlives the call.
        let mounted = unsafe {
            libc::mount(
                c"silent".as_ptr(),
                target.as_ptr(),
                c"fuse".as_ptr(),
                0,
                options.as_ptr().cast(),
            )
        };
        assert_eq!(mounted, 0, "{}", std::io::Error::last_os_error());
        Self {
            device: Some(device),
            place,
        }
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        // Whoever waits gets an error now.
        self.device = None;
        let _ = std::process::Command::new("umount")
            .arg("-l")
            .arg(&self.place)
            .status();
    }
}

/// Makes calls about `container` and its pod, each of which must be answered.
fn check_siblings(daemon: &Containerd, pod: &Pod<'_>, container: &str, round: usize) {
    let timed = |what: &str, call: &dyn Fn()| {
        let begun = Instant::now();
        call();
        assert!(begun.elapsed() < CALL, "{what} took {:?}", begun.elapsed());
    };
    timed("exec", &|| {
        assert_eq!(pod.sh(container, "echo here"), "here\n")
    });
    timed("stats", &|| {
        drop(daemon.cri("ContainerStats", &json!({"container_id": container})))
    });
    timed("status", &|| {
        assert_eq!(pod.status(container)["state"], "CONTAINER_RUNNING")
    });
    let name = format!("other-{round}");
    timed("create, start, stop, remove", &|| {
        let other = pod.start(&name, "exit 0", &json!({}));
        pod.wait_exited(&other);
        daemon.cri("RemoveContainer", &json!({"container_id": other}));
    });
}

#[test]
fn a_stalled_container_delays_no_sibling() {
    let Some(daemon) = with_pods() else { return };
    if !Path::new("/dev/fuse").exists() {
        cella_tests::skip("/dev/fuse");
        return;
    }
    let pod = Pod::run(&daemon, &json!({}));
    let quiet = pod.start("quiet", "sleep 1000", &json!({}));
    // Nobody reads what an attached exec writes: `ctr` is stopped in the middle of it.
    let mut loud = vec!["-n", "k8s.io", "task", "exec", "--exec-id", "loud", &quiet];
    loud.extend(["sh", "-c", "while :; do echo y; done"]);
    let mut loud = daemon.ctr_command(&loud).spawn().unwrap();
    // A container of the pod that is never made: its volume does not answer.
    let silent = Silent::mount(daemon.host.path("silent"));
    let mount = format!(
        "type=bind,src={},dst=/slow,options=rbind:ro",
        silent.place.display()
    );
    let of_pod = format!("io.kubernetes.cri.sandbox-id={}", pod.id);
    let mut slow = vec![
        "-n",
        "k8s.io",
        "run",
        "-d",
        "--runtime",
        RUNTIME,
        "--mount",
        &mount,
    ];
    slow.extend(["--annotation", "io.kubernetes.cri.container-type=container"]);
    slow.extend(["--annotation", &of_pod, IMAGE, "slow", "true"]);
    let mut slow = daemon.ctr_command(&slow).spawn().unwrap();
    let begun = Instant::now();
    std::thread::sleep(Duration::from_secs(2));
    for round in 0.. {
        check_siblings(&daemon, &pod, &quiet, round);
        if begun.elapsed() > STALL {
            break;
        }
    }
    assert!(slow.try_wait().unwrap().is_none(), "it was made");
    drop(silent);
    let said = finish(slow, &[]);
    assert!(
        said.status != 0 && said.stderr.contains("/silent"),
        "{said:?}"
    );
    daemon
        .ctr(&["-n", "k8s.io", "container", "rm", "slow"])
        .expect_status(0);
    loud.kill().unwrap();
    loud.wait().unwrap();
    pod.remove();
    daemon.end();
}

/// A number that a variable of the environment gives.
fn number(variable: &str, otherwise: usize) -> usize {
    std::env::var(variable).map_or(otherwise, |text| text.parse().unwrap())
}

#[test]
fn many_pods_at_once() {
    let Some(daemon) = with_pods() else { return };
    for round in 0..number("CELLA_TEST_ROUNDS", 2) {
        std::thread::scope(|scope| {
            let daemon = &daemon;
            for number in 0..number("CELLA_TEST_PODS", 20) {
                scope.spawn(move || {
                    let config = pod_config(daemon, &format!("many-{round}-{number}"), &json!({}));
                    let pod = Pod::run_config(daemon, "cella", config);
                    let name = format!("c-{round}-{number}");
                    let container = pod.start(&name, "echo done; sleep 1000", &json!({}));
                    assert_eq!(pod.sh(&container, "echo $((6*7))"), "42\n");
                    pod.remove();
                });
            }
        });
    }
    daemon.end();
}
