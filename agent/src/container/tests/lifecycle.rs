//! Create, start, exec, signals, freezing, removal, hooks.

use super::support::*;
use serde_json::json;

fn exec_process(args: &[&str]) -> serde_json::Value {
    let mut process = spec(args)["process"].clone();
    process["args"] = json!(args);
    process
}

#[test]
fn a_container_runs_and_its_exit_status_arrives() {
    in_sandbox(|sandbox| {
        let mut boxed = sandbox.create("c1", &spec(&["sh", "-c", "echo hello; exit 7"]))?;
        assert_eq!(boxed.container.status(), Status::Created);
        assert_eq!(boxed.container.pids()?, [boxed.container.pid()]);
        boxed.container.start()?;
        assert_eq!(boxed.container.status(), Status::Running);
        assert_eq!(boxed.output(), "hello\n");
        assert_eq!(boxed.wait(), 7);
        boxed.delete()
    });
}

#[test]
fn nothing_of_the_agents_is_open_in_a_container() {
    in_sandbox(|sandbox| {
        let waiting = sandbox.create("waits", &spec(&["true"]))?;
        let open = std::fs::read_dir(format!("/proc/{}/fd", waiting.container.pid()))?.count();
        assert_eq!(open, 4, "a created init holds its streams and its socket");
        let (output, _) = sandbox.run(&spec(&["sh", "-c", "ls /proc/$$/fd; true"]))?;
        // busybox's shell keeps a copy of its script's descriptor at 10, if any.
        assert_eq!(
            output.lines().filter(|fd| *fd != "10").collect::<Vec<_>>(),
            ["0", "1", "2"]
        );
        waiting.delete()
    });
}

#[test]
fn a_created_container_can_be_deleted_without_a_start() {
    in_sandbox(|sandbox| {
        let boxed = sandbox.create("c1", &spec(&["true"]))?;
        let pid = boxed.container.pid();
        boxed.delete()?;
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
        assert!(!sandbox.cgroup("c1").exists());
        Ok(())
    });
}

#[test]
fn signals_reach_one_or_all_and_late_ones_do_no_harm() {
    in_sandbox(|sandbox| {
        let mut boxed =
            sandbox.create("c1", &spec(&["sh", "-c", "sleep 100 & sleep 100 & wait"]))?;
        boxed.container.start()?;
        while boxed.container.pids()?.len() < 3 {
            std::thread::yield_now();
        }
        assert!(boxed.container.signal(0).is_err(), "0 is no signal");
        assert!(boxed.container.signal(65).is_err());
        boxed.container.kill_all(libc::SIGKILL)?;
        assert_eq!(boxed.wait(), 128 + libc::SIGKILL);
        boxed.container.signal(libc::SIGTERM)?;
        boxed.container.kill_all(libc::SIGTERM)?;
        assert!(
            boxed.container.start().is_err(),
            "a stopped container does not start"
        );
        boxed.delete()
    });
}

#[test]
fn exec_joins_everything() {
    in_sandbox(|sandbox| {
        let mut spec = spec(&["sleep", "100"]);
        spec["linux"]["namespaces"]
            .as_array_mut()
            .unwrap()
            .extend([json!({"type": "cgroup"}), json!({"type": "time"})]);
        let mut boxed = sandbox.create("c1", &spec)?;
        boxed.container.start()?;
        let script =
            "for n in mnt pid ipc uts net cgroup time user; do readlink /proc/self/ns/$n; done";
        let (output, status) = boxed.exec(exec_process(&["sh", "-c", script]))?;
        assert_eq!(status, 0, "{output}");
        let pid = boxed.container.pid();
        let init: Vec<_> = ["mnt", "pid", "ipc", "uts", "net", "cgroup", "time", "user"]
            .map(|name| namespace_of(pid, name))
            .into();
        assert_eq!(output.lines().collect::<Vec<_>>(), init);
        let (cgroup, _) = boxed.exec(exec_process(&["cat", "/proc/self/cgroup"]))?;
        assert!(
            cgroup.lines().any(|line| line == "0::/"),
            "in the container's cgroup: {cgroup}"
        );
        let (_, status) = boxed.exec(exec_process(&["sh", "-c", "kill -TERM $$; sleep 9"]))?;
        assert_eq!(status, 128 + libc::SIGTERM);
        let left = boxed.exec(exec_process(&["no-such-command"])).unwrap_err();
        assert_eq!(left.kind(), Kind::NotFound);
        assert_eq!(
            boxed.container.pids()?,
            [pid],
            "a failed exec leaves no process"
        );
        boxed.container.kill_all(libc::SIGKILL)?;
        boxed.wait();
        let late = boxed.exec(exec_process(&["true"])).unwrap_err();
        assert_eq!(late.kind(), Kind::FailedPrecondition);
        boxed.delete()
    });
}

#[test]
fn exec_follows_an_init_that_moved_to_a_cgroup_of_its_own() {
    in_sandbox(|sandbox| {
        let mut boxed = sandbox.create("c1", &spec(&["sleep", "100"]))?;
        boxed.container.start()?;
        let cgroup = sandbox.cgroup("c1");
        std::fs::create_dir(cgroup.join("init"))?;
        std::fs::write(
            cgroup.join("init/cgroup.procs"),
            boxed.container.pid().to_string(),
        )?;
        let text = std::fs::read_to_string(cgroup.join("cgroup.controllers"))?;
        if let Some(name) = text.split_whitespace().next() {
            std::fs::write(cgroup.join("cgroup.subtree_control"), format!("+{name}"))?;
        }
        let (_, status) = boxed.exec(exec_process(&["true"]))?;
        assert_eq!(status, 0);
        assert_eq!(
            boxed.container.pids()?,
            [boxed.container.pid()],
            "processes below are seen"
        );
        boxed.container.kill_all(libc::SIGKILL)?;
        boxed.wait();
        boxed.delete()
    });
}

#[test]
fn freezing_stops_and_thawing_continues() {
    in_sandbox(|sandbox| {
        let mut boxed = sandbox.create("c1", &spec(&["sh", "-c", "while :; do :; done"]))?;
        assert!(boxed.container.freeze().is_err(), "not yet running");
        boxed.container.start()?;
        boxed.container.freeze()?;
        assert_eq!(boxed.container.status(), Status::Paused);
        let ticks = |pid| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
            stat.split(' ').nth(13).unwrap().to_owned()
        };
        let before = ticks(boxed.container.pid());
        std::thread::sleep(std::time::Duration::from_millis(100));
        assert_eq!(
            ticks(boxed.container.pid()),
            before,
            "frozen processes use no time"
        );
        assert_eq!(
            boxed.exec(exec_process(&["true"])).unwrap_err().kind(),
            Kind::FailedPrecondition
        );
        assert!(boxed.container.freeze().is_err());
        boxed.container.thaw()?;
        boxed.container.freeze()?;
        boxed.container.kill_all(libc::SIGKILL)?;
        assert_eq!(
            boxed.wait(),
            128 + libc::SIGKILL,
            "frozen processes can be killed"
        );
        boxed.delete()
    });
}

#[test]
fn processes_left_by_a_dead_init_end_with_the_removal() {
    in_sandbox(|sandbox| {
        let mut spec = spec(&["sh", "-c", "sleep 100 & exit 0"]);
        // Without a pid namespace nothing kills them along with the init.
        spec["linux"]["namespaces"]
            .as_array_mut()
            .unwrap()
            .remove(0);
        spec["mounts"].as_array_mut().unwrap().remove(0);
        let mut boxed = sandbox.create("c1", &spec)?;
        boxed.container.start()?;
        assert_eq!(boxed.wait(), 0);
        let left = boxed.container.pids()?;
        assert_eq!(left.len(), 1);
        boxed.delete()?;
        let pid = left[0] as i32;
        // It became this process's child, as it would the agent's.
        let mut status = 0;
        // SAFETY: reaps a child of this test.
        assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
        assert!(libc::WIFSIGNALED(status));
        Ok(())
    });
}

#[test]
fn statistics_and_limits_without_controllers() {
    in_sandbox(|sandbox| {
        let mut boxed = sandbox.create("c1", &spec(&["sleep", "100"]))?;
        boxed.container.start()?;
        let stats = boxed.container.stats()?;
        assert_eq!(stats.container_id, "c1");
        assert_eq!(boxed.container.oom_kills()?, 0);
        let resources = serde_json::from_value(json!({"unified": {"no.such": "1"}}))?;
        let error = boxed.container.update(&resources).unwrap_err();
        assert!(error.to_string().contains("no.such"), "{error}");
        boxed.container.kill_all(libc::SIGKILL)?;
        boxed.wait();
        boxed.delete()
    });
}

#[test]
fn the_device_filter_holds_and_can_be_replaced() {
    in_sandbox(|sandbox| {
        let mut spec = spec(&["sleep", "100"]);
        for set in ["bounding", "effective", "permitted"] {
            let caps = spec["process"]["capabilities"][set].as_array_mut().unwrap();
            caps.push(json!("CAP_MKNOD"));
        }
        spec["linux"]["resources"] = json!({"devices": [{"allow": false, "access": "rwm"}]});
        let mut boxed = sandbox.create("c1", &spec)?;
        boxed.container.start()?;
        let mut process = spec["process"].clone();
        // /dev/net/tun: a character device that anyone may open.
        let script =
            "test -e /dev/k || mknod /dev/k c 10 200; head -c 1 /dev/null && head -c 0 /dev/k";
        process["args"] = json!(["sh", "-c", script]);
        let (output, status) = boxed.exec(process.clone())?;
        assert_ne!(status, 0, "{output}");
        assert!(output.contains("not permitted"), "{output}");
        let resources = serde_json::from_value(
            json!({"devices": [{"allow": true, "type": "c", "major": 10, "minor": 200, "access": "r"}]}),
        )?;
        boxed.container.update(&resources)?;
        let (output, status) = boxed.exec(process)?;
        assert_eq!(status, 0, "{output}");
        boxed.container.kill_all(libc::SIGKILL)?;
        boxed.wait();
        boxed.delete()
    });
}

#[test]
fn hooks_run_in_order_and_place() {
    in_sandbox(|sandbox| {
        let log = sandbox.dir.join("log");
        let hook = |name: &str, container: bool| {
            // In the container the file is its own /tmp's.
            let target = if container {
                "/tmp/log".into()
            } else {
                log.display().to_string()
            };
            let script = format!("cat >/dev/null; echo {name} $(hostname) >> {target}");
            json!([{"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin"]}])
        };
        let mut spec = spec(&["cat", "/tmp/log"]);
        spec["hostname"] = json!("inside");
        spec["hooks"] = json!({
            "prestart": hook("prestart", false),
            "createRuntime": hook("createRuntime", false),
            "createContainer": hook("createContainer", false),
            "startContainer": hook("startContainer", true),
            "poststart": hook("poststart", false),
            "poststop": hook("poststop", false),
        });
        let shared = SharedNamespaces {
            uts: Shared::None,
            ..SharedNamespaces::default()
        };
        let mut boxed = sandbox.create_in("c1", &spec, &shared)?;
        boxed.container.start()?;
        boxed.container.run_poststart_hooks()?;
        assert_eq!(boxed.output(), "startContainer inside\n");
        assert_eq!(boxed.wait(), 0);
        boxed.delete()?;
        let log = std::fs::read_to_string(log)?;
        let names: Vec<_> = log.lines().map(|l| l.split(' ').next().unwrap()).collect();
        let order = [
            "prestart",
            "createRuntime",
            "createContainer",
            "poststart",
            "poststop",
        ];
        assert_eq!(names, order);
        assert!(log.contains("createContainer inside"), "{log}");
        assert!(!log.contains("createRuntime inside"), "{log}");
        Ok(())
    });
}

#[test]
fn a_failing_hook_leaves_nothing() {
    in_sandbox(|sandbox| {
        let failing = json!([{"path": "/bin/false"}]);
        for point in ["prestart", "createRuntime", "createContainer"] {
            let mut spec = spec(&["true"]);
            spec["hooks"] = json!({point: failing});
            let error = sandbox.create("c1", &spec).err().unwrap();
            assert!(matches!(error, Error::Hook { .. }), "{point}: {error}");
            assert!(!sandbox.cgroup("c1").exists(), "{point}");
        }
        let mut spec = spec(&["true"]);
        spec["hooks"] = json!({"startContainer": failing});
        let error = sandbox.run(&spec).unwrap_err();
        assert!(matches!(error, Error::Hook { .. }), "{error}");
        Ok(())
    });
}
