//! What the shim costs under containerd: prints figures as JSON. Called by `make bench`.
//!
//!     bench-containerd [HYPERVISOR]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a measurement that cannot be made is to say so and end"
)]

use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use cella_tests::containerd::{Containerd, IMAGE, RUNTIME, containerd_is_missing};
use cella_tests::{missing_for, root, skip};
use serde_json::json;

/// Measurements of each kind; the median counts.
const TIMES: usize = 9;

fn main() -> ExitCode {
    let hypervisor = std::env::args().nth(1).unwrap_or_else(|| "qemu".into());
    if let Some(missing) = missing_for(&hypervisor).or_else(containerd_is_missing) {
        skip(&missing);
        return ExitCode::SUCCESS;
    }
    let daemon = Containerd::start(&hypervisor);
    let start = median(|_| start_cpu(&daemon));
    let (ctr, cella) = starts(&daemon);
    daemon.run_detached("held", &["sleep", "1000"]);
    let shim = daemon.shims()[0];
    let exec_cella = median(|number| exec(&daemon, "held", number));
    let (resident, threads) = (status(shim, "VmRSS:"), status(shim, "Threads:"));
    end(&daemon, "held");
    let exec_runc = exec_with_runc(&daemon);
    let figures = json!({
        "hypervisor": hypervisor,
        "containerd": daemon.major(),
        "shim_start_cpu_ms": start,
        "shim_resident_kib": resident,
        "shim_threads": threads,
        "ctr_run_ms": ctr,
        "cella_run_ms": cella,
        "ctr_exec_ms": exec_cella,
        "ctr_exec_runc_ms": exec_runc,
    });
    println!("{figures:#}");
    daemon.end();
    ExitCode::SUCCESS
}

/// The median of some measurements, milliseconds.
fn median(mut measure: impl FnMut(usize) -> Duration) -> f64 {
    let mut all: Vec<_> = (0..TIMES).map(&mut measure).collect();
    all.sort();
    all[TIMES / 2].as_secs_f64() * 1e3
}

fn timed(command: &mut Command) -> Duration {
    let begun = Instant::now();
    let said = command.output().unwrap();
    let took = begun.elapsed();
    assert!(said.status.success(), "{said:?}");
    took
}

/// A container in a new sandbox, by containerd and without.
fn starts(daemon: &Containerd) -> (f64, f64) {
    let image = daemon.host.busybox();
    // Alternating, so that both see the same host.
    let (mut ctr, mut cella) = (Vec::new(), Vec::new());
    for number in 0..TIMES {
        let id = format!("run-{number}");
        let run = ["run", "--rm", "--runtime", RUNTIME, IMAGE, &id, "true"];
        ctr.push(timed(&mut daemon.ctr_command(&run)));
        cella.push(timed(&mut daemon.host.command(&["run", &image, "true"])));
    }
    (median(|number| ctr[number]), median(|number| cella[number]))
}

fn exec(daemon: &Containerd, id: &str, number: usize) -> Duration {
    let name = format!("e{number}");
    timed(&mut daemon.ctr_command(&["task", "exec", "--exec-id", &name, id, "true"]))
}

fn exec_with_runc(daemon: &Containerd) -> Option<f64> {
    let run = [
        "run",
        "-d",
        "--runtime",
        "io.containerd.runc.v2",
        IMAGE,
        "plain",
        "sleep",
        "1000",
    ];
    let mut started = daemon.ctr_command(&run);
    if !started.stdout(Stdio::null()).status().unwrap().success() {
        return None;
    }
    let took = median(|number| exec(daemon, "plain", number));
    end(daemon, "plain");
    Some(took)
}

fn end(daemon: &Containerd, id: &str) {
    daemon
        .ctr(&["task", "kill", "-s", "SIGKILL", id])
        .expect_status(0);
    daemon.eventually("it ends", || {
        daemon.status(id).as_deref() == Some("STOPPED")
    });
    daemon.remove(id);
}

/// A number of /proc/PID/status.
fn status(pid: u32, name: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// CPU time of the shim from its start to its address, and of what it leaves in the background until it listens.
fn start_cpu(daemon: &Containerd) -> Duration {
    let bundle = daemon.host.path("bundle");
    fs::create_dir_all(&bundle).unwrap();
    fs::write(bundle.join("config.json"), r#"{"ociVersion":"1.0.2"}"#).unwrap();
    let before = children();
    let mut command = Command::new(root().join("target/release/containerd-shim-cella-v2"));
    command.args([
        "-namespace",
        "bench",
        "-address",
        "/nowhere",
        "-id",
        "bench",
        "start",
    ]);
    daemon.host.on_this_host(command.current_dir(&bundle));
    let said = command.output().unwrap();
    let mut took = children() - before;
    let address = String::from_utf8(said.stdout).unwrap();
    let socket = address.trim().trim_start_matches("unix://").to_owned();
    assert!(Path::new(&socket).exists(), "{address}");
    // Its background half is known by the bundle's id.
    let found = cella_tests::processes(|line| line.contains("-namespace bench -address /nowhere"));
    for (pid, _) in found {
        took += schedstat(pid);
        let _ = Command::new("kill").arg(pid.to_string()).status();
        while Path::new(&format!("/proc/{pid}")).exists() {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    let _ = fs::remove_file(socket);
    fs::remove_dir_all(&bundle).unwrap();
    took
}

/// CPU time of the children that this process has waited for.
fn children() -> Duration {
    // SAFETY: a structure of integers, for which zeros are values; the call fills it.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        assert_eq!(libc::getrusage(libc::RUSAGE_CHILDREN, &raw mut usage), 0);
        usage
    };
    let time = |time: libc::timeval| {
        let micros = time.tv_sec * 1_000_000 + time.tv_usec;
        Duration::from_micros(micros.unsigned_abs())
    };
    time(usage.ru_utime) + time(usage.ru_stime)
}

fn schedstat(pid: u32) -> Duration {
    let text = fs::read_to_string(format!("/proc/{pid}/schedstat")).unwrap_or_default();
    let ns = text.split(' ').next().and_then(|text| text.parse().ok());
    Duration::from_nanos(ns.unwrap_or(0))
}
