//! Idle clones that wait for whoever needs one.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cella_host::sandbox::TemplateUse;
use cella_tests::{finish, processes};

use super::here::{Here, MEMORY_FLAG};

/// What the keeper needs to look again, and to make or end its idle clones.
const PATIENCE: Duration = Duration::from_secs(20);

/// The ids of the idle ones.
pub fn idle(here: &Here) -> Vec<String> {
    let entries = fs::read_dir(&here.paths.run_dir);
    let names = entries.into_iter().flatten().map(|entry| {
        let name = entry.unwrap().file_name();
        name.into_string().unwrap()
    });
    // With a state, it is ready.
    let ready = |name: &String| {
        let state = here.paths.run_dir.join(name).join("sandbox.json");
        name.starts_with("pool-") && state.exists()
    };
    names.filter(ready).collect()
}

#[track_caller]
pub fn wait_for(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "waiting for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// [`wait_for`] idle ones that can be claimed: a state is written just before the keeper has it among those to give.
#[track_caller]
pub fn wait_for_idle(what: &str, done: impl Fn() -> bool) {
    wait_for(what, done);
    std::thread::sleep(Duration::from_millis(200));
}

pub fn keeper(here: &Here) -> Option<u32> {
    let run = here.paths.run_dir.to_str().unwrap();
    let found = processes(|line| line.contains("KeepPool") && line.contains(run));
    assert!(found.len() <= 1, "{found:?}");
    found.first().map(|(pid, _)| *pid)
}

/// No pool is wanted any more.
pub fn end(here: &Here) {
    let drop_ins = here.host.path("config.d");
    fs::create_dir(&drop_ins).unwrap();
    fs::write(drop_ins.join("no-pool.toml"), "pool = 0\n").unwrap();
    wait_for("the keeper's end", || keeper(here).is_none());
}

pub async fn idle_clones_are_claimed_and_replaced(here: &Here) {
    here.host
        .configure(&format!("memory = \"{MEMORY_FLAG}\"\npool = 2\n"));
    let image = here.host.busybox();
    // Nobody claims what is not there yet; from then on somebody keeps it.
    here.host.cella(&["run", &image, "true"]).expect_status(0);
    wait_for_idle("two idle ones", || idle(here).len() == 2);
    let keeper_pid = keeper(here).unwrap();
    let (one, other) = (
        here.sandbox_with("one", |spec| spec.pool = true)
            .await
            .unwrap(),
        here.sandbox_with("other", |spec| spec.pool = true)
            .await
            .unwrap(),
    );
    for sandbox in [&one, &other] {
        assert_eq!(sandbox.template_use(), Some(&TemplateUse::Claimed));
    }
    let identities = [
        one.identity().await.unwrap(),
        other.identity().await.unwrap(),
    ];
    assert_eq!(identities[0].hostname, "host-one");
    assert_ne!(identities[0].boot_id, identities[1].boot_id);
    assert_ne!(identities[0].random, identities[1].random);
    assert_ne!(identities[0].tcp_starts, identities[1].tcp_starts);
    wait_for("two idle ones more", || idle(here).len() == 2);
    claimed_ones_count_where_their_claimer_does(here, &image);
    other.stop().await.unwrap();
    the_keeper_is_killed(here, keeper_pid);
    // What was claimed is nothing of the keeper's any more.
    assert!(one.info().await.unwrap().memory_total_kib > 0);
    one.discard().await.unwrap();
    here.host.cella(&["run", &image, "true"]).expect_status(0);
    wait_for("a new keeper's", || idle(here).len() == 2);
    end(here);
    here.host.assert_clean();
}

fn the_keeper_is_killed(here: &Here, pid: u32) {
    wait_for("two idle ones again", || idle(here).len() == 2);
    let waiting = idle(here);
    let killed = std::process::Command::new("kill")
        .args(["-9", &pid.to_string()])
        .status();
    assert!(killed.unwrap().success());
    let vmms = || {
        processes(|line| line.contains("cella-vmm") && waiting.iter().any(|id| line.contains(id)))
    };
    wait_for("the idle VMMs' end", || vmms().is_empty());
    let said = here.host.cella(&["gc"]).expect_status(0).stdout;
    assert_eq!(said.matches("sandbox pool-").count(), 2, "{said}");
    assert!(said.contains("pool: its keeper is dead"), "{said}");
    assert_eq!(idle(here), [""; 0]);
}

/// A cgroup of the test's own, removed with its owner; in the first hierarchy that has room for it.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new() -> Option<Self> {
        let name = format!("cella-test-{}", std::process::id());
        let roots = [
            "/sys/fs/cgroup/unified",
            "/sys/fs/cgroup/pids",
            "/sys/fs/cgroup",
        ];
        let mut dirs = roots.iter().map(|root| Path::new(root).join(&name));
        dirs.find(|dir| {
            let made = fs::create_dir(dir).is_ok();
            let is_cgroup = dir.join("cgroup.procs").exists();
            if made && !is_cgroup {
                let _ = fs::remove_dir(dir);
            }
            made && is_cgroup
        })
        .map(Self)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(2);
        while fs::remove_dir(&self.0).is_err() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn claimed_ones_count_where_their_claimer_does(here: &Here, image: &str) {
    let Some(cgroup) = Cgroup::new() else {
        cella_tests::skip("a cgroup hierarchy");
        return;
    };
    let procs = cgroup.0.join("cgroup.procs");
    let mut command = std::process::Command::new("sh");
    let script = "echo $$ > \"$0\" && exec \"$@\"";
    command.args(["-c", script, procs.to_str().unwrap()]);
    command.arg(cella_tests::cella_binary());
    command.args(["run", "--name", "counted", image]);
    command.args(["sh", "-c", "echo up; sleep 1000"]);
    here.host.on_this_host(&mut command);
    let mut child = command.spawn().unwrap();
    let mut up = [0; 3];
    let stdout = child.stdout.as_mut().unwrap();
    stdout.read_exact(&mut up).unwrap();
    let state = here.paths.run_dir.join("counted/sandbox.json");
    let state: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(state).unwrap()).unwrap();
    assert_eq!(state["id"], "counted");
    let pid = state["vmm"]["pid"].as_u64().unwrap().to_string();
    let cmdline = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
    assert!(cmdline.contains("pool-"), "it was claimed: {cmdline}");
    let inside = fs::read_to_string(&procs).unwrap();
    assert!(inside.lines().any(|line| line == pid), "{inside}");
    here.host
        .cella(&["kill", "counted", "KILL"])
        .expect_status(0);
    finish(child, b"").expect_status(137);
}
