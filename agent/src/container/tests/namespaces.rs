//! Which namespaces are new, joined, shared; user and time namespaces.

use super::super::namespaces::IdMaps;
use super::support::*;
use serde_json::{Value, json};
use std::os::fd::OwnedFd;
use std::sync::Arc;

#[test]
fn new_namespaces_differ_and_the_pods_are_the_guests() {
    in_sandbox(|sandbox| {
        let boxed = sandbox.create("c1", &spec(&["true"]))?;
        let (own, pid) = (std::process::id(), boxed.container.pid());
        for name in ["mnt", "pid"] {
            assert_ne!(namespace_of(pid, name), namespace_of(own, name), "{name}");
        }
        for name in ["net", "ipc", "uts", "user", "cgroup", "time"] {
            assert_eq!(namespace_of(pid, name), namespace_of(own, name), "{name}");
        }
        boxed.delete()?;
        let shared = SharedNamespaces {
            ipc: Shared::None,
            uts: Shared::None,
            ..SharedNamespaces::default()
        };
        let mut spec = spec(&[
            "sh",
            "-c",
            "hostname; cat /proc/sys/kernel/shmmni /proc/sys/kernel/domainname",
        ]);
        spec["hostname"] = json!("box");
        spec["domainname"] = json!("example");
        spec["linux"]["sysctl"] = json!({"kernel.shmmni": "77"});
        let before = rustix::system::uname().nodename().to_owned();
        let mut boxed = sandbox.create_in("c1", &spec, &shared)?;
        for name in ["ipc", "uts"] {
            assert_ne!(
                namespace_of(boxed.container.pid(), name),
                namespace_of(own, name)
            );
        }
        boxed.container.start()?;
        assert_eq!(boxed.output(), "box\n77\nexample\n");
        boxed.wait();
        assert_eq!(rustix::system::uname().nodename(), before.as_c_str());
        boxed.delete()
    });
}

#[test]
fn namespaces_are_joined_by_path_and_by_descriptor() {
    in_sandbox(|sandbox| {
        let alone = SharedNamespaces {
            ipc: Shared::None,
            uts: Shared::None,
            ..SharedNamespaces::default()
        };
        let first = sandbox.create_in("first", &spec(&["true"]), &alone)?;
        let pid = first.container.pid();
        let open = |name: &str| -> OwnedFd {
            std::fs::File::open(format!("/proc/{pid}/ns/{name}"))
                .unwrap()
                .into()
        };
        let shared = SharedNamespaces {
            ipc: Shared::Fd(Arc::new(open("ipc"))),
            uts: Shared::Fd(Arc::new(open("uts"))),
            ..SharedNamespaces::default()
        };
        let second = sandbox.create_in("second", &spec(&["true"]), &shared)?;
        let mut by_path = spec(&["true"]);
        for (index, name) in [(0, "pid"), (2, "ipc"), (3, "uts")] {
            by_path["linux"]["namespaces"][index]["path"] = json!(format!("/proc/{pid}/ns/{name}"));
        }
        let third = sandbox.create("third", &by_path)?;
        for name in ["ipc", "uts"] {
            assert_eq!(
                namespace_of(second.container.pid(), name),
                namespace_of(pid, name)
            );
            assert_eq!(
                namespace_of(third.container.pid(), name),
                namespace_of(pid, name)
            );
        }
        assert_eq!(
            namespace_of(third.container.pid(), "pid"),
            namespace_of(pid, "pid")
        );
        assert_ne!(
            namespace_of(second.container.pid(), "pid"),
            namespace_of(pid, "pid")
        );
        third.delete()?;
        second.delete()?;
        first.delete()
    });
}

#[test]
fn a_pod_shares_its_pid_namespace_through_a_holder() {
    in_sandbox(|sandbox| {
        let holder = PidHolder::spawn(&crate::reaper::Reaper::default(), None)?;
        let shared = SharedNamespaces {
            pid: Shared::Fd(holder.namespace()),
            ..SharedNamespaces::default()
        };
        let mut first = sandbox.create_in("first", &spec(&["sleep", "100"]), &shared)?;
        first.container.start()?;
        let mut second = sandbox.create_in(
            "second",
            &spec(&["sh", "-c", "ps; sleep 0 & exit 0"]),
            &shared,
        )?;
        second.container.start()?;
        let output = second.output();
        assert!(output.contains("sleep 100"), "siblings are seen: {output}");
        assert_eq!(second.wait(), 0);
        second.delete()?;
        let mut process = spec(&["cat", "/proc/1/comm"])["process"].clone();
        assert_eq!(first.exec(process.clone())?.0, "pause\n");
        // The holder still has the guest's root: it must not be looked into.
        process["args"] = json!(["ls", "/proc/1/root/"]);
        assert_ne!(first.exec(process)?.1, 0);
        assert_eq!(
            namespace_of(std::process::id(), "pid_for_children"),
            namespace_of(std::process::id(), "pid")
        );
        holder.kill()?;
        assert_eq!(
            first.wait(),
            128 + libc::SIGKILL,
            "the namespace goes with its init"
        );
        assert_eq!(reap(holder.pidfd()), 128 + libc::SIGKILL);
        first.delete()
    });
}

/// In a user namespace /dev/mqueue is the host's own, which need not have one.
fn leave_missing_queues_out(spec: &mut Value) {
    if !std::path::Path::new("/dev/mqueue").exists() {
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.retain(|m| m["type"] != "mqueue");
    }
}

#[test]
fn a_pods_pids_belong_to_its_user_namespace() {
    in_sandbox(|sandbox| {
        let mut spec = spec(&[
            "sh",
            "-c",
            "cat /proc/1/comm; cat /proc/self/uid_map; echo x > /proc/self/comm",
        ]);
        let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.push(json!({"type": "user"}));
        let map = json!([{"containerID": 0, "hostID": 100000, "size": 65536}]);
        spec["linux"]["uidMappings"] = map.clone();
        spec["linux"]["gidMappings"] = map;
        for directory in [sandbox.root(), sandbox.root().join("dev")] {
            std::os::unix::fs::chown(directory, Some(100000), Some(100000))?;
        }
        leave_missing_queues_out(&mut spec);
        let maps = IdMaps::of(&serde_json::from_value(spec.clone()).unwrap())?;
        let holder = PidHolder::spawn(&crate::reaper::Reaper::default(), maps.clone())?;
        let mut shared = SharedNamespaces::default();
        holder.share(None, &mut shared);
        assert!(matches!(shared.user, Shared::None), "other ids");
        holder.share(maps.as_ref(), &mut shared);
        let mut boxed = sandbox.create_in("c1", &spec, &shared)?;
        boxed.container.start()?;
        let output = boxed.output();
        let words: Vec<_> = output.split_whitespace().collect();
        assert_eq!(words, ["pause", "0", "100000", "65536"]);
        assert_eq!(boxed.wait(), 0);
        boxed.delete()?;
        holder.kill()?;
        assert_eq!(reap(holder.pidfd()), 128 + libc::SIGKILL);
        Ok(())
    });
}

#[test]
fn a_user_namespace_maps_ids() {
    in_sandbox(|sandbox| {
        let script = "id -u; cat /proc/self/uid_map /proc/self/gid_map; mkdir /tmp/mine; stat -c %u /tmp/mine; \
            cat /proc/self/oom_score_adj; echo x > /dev/null && ls /dev/mqueue /sys/kernel > /dev/null && echo fine; \
            cat /volume/file";
        let mut spec = spec(&["sh", "-c", script]);
        let volume = sandbox.dir.join("volume");
        std::fs::create_dir(&volume)?;
        std::fs::write(volume.join("file"), "from the guest\n")?;
        // The source is where the mapped root could not go itself.
        std::fs::set_permissions(
            &sandbox.dir,
            std::os::unix::fs::PermissionsExt::from_mode(0o700),
        )?;
        spec["mounts"].as_array_mut().unwrap().push(json!(
            {"destination": "/volume", "type": "bind", "source": volume, "options": ["rbind", "ro"]}));
        spec["mounts"].as_array_mut().unwrap().push(json!(
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]}));
        spec["linux"]["namespaces"]
            .as_array_mut()
            .unwrap()
            .extend([json!({"type": "user"}), json!({"type": "cgroup"})]);
        spec["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": 100000, "size": 65536}]);
        spec["linux"]["gidMappings"] = json!([{"containerID": 0, "hostID": 200000, "size": 65536}]);
        spec["process"]["oomScoreAdj"] = json!(5);
        let tmp = sandbox.root().join("tmp");
        // Whoever unpacks an image for a user namespace makes its files the mapped ids'.
        for directory in [sandbox.root(), sandbox.root().join("dev"), tmp.clone()] {
            std::os::unix::fs::chown(directory, Some(100000), Some(200000))?;
        }
        leave_missing_queues_out(&mut spec);
        let mut boxed = sandbox.create("c1", &spec)?;
        let pid = boxed.container.pid();
        boxed.container.start()?;
        let output = boxed.output();
        let words: Vec<_> = output.split_whitespace().collect();
        assert_eq!(
            words[..7],
            ["0", "0", "100000", "65536", "0", "200000", "65536"],
            "{pid}: {output}"
        );
        assert_eq!(words[7..9], ["0", "5"], "{output}");
        assert!(output.contains("from the guest"), "{output}");
        assert_eq!(
            std::os::unix::fs::MetadataExt::uid(&tmp.join("mine").metadata()?),
            100000
        );
        assert_eq!(boxed.wait(), 0);
        boxed.delete()
    });
}

#[test]
fn exec_into_a_user_namespace() {
    in_sandbox(|sandbox| {
        let mut spec = spec(&["sleep", "100"]);
        spec["linux"]["namespaces"]
            .as_array_mut()
            .unwrap()
            .push(json!({"type": "user"}));
        spec["mounts"]
            .as_array_mut()
            .unwrap()
            .retain(|m| m["type"] != "mqueue");
        spec["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": 100000, "size": 65536}]);
        spec["linux"]["gidMappings"] = spec["linux"]["uidMappings"].clone();
        let mut boxed = sandbox.create("c1", &spec)?;
        boxed.container.start()?;
        let mut process = spec["process"].clone();
        process["args"] = json!(["id", "-u"]);
        process["user"] = json!({"uid": 33, "gid": 33});
        assert_eq!(boxed.exec(process)?, ("33\n".into(), 0));
        boxed.container.kill_all(libc::SIGKILL)?;
        boxed.wait();
        boxed.delete()
    });
}

#[test]
fn a_time_namespace_has_its_offsets() {
    in_sandbox(|sandbox| {
        let mut spec = spec(&["cat", "/proc/uptime"]);
        spec["linux"]["namespaces"]
            .as_array_mut()
            .unwrap()
            .push(json!({"type": "time"}));
        spec["linux"]["timeOffsets"] = json!({"boottime": {"secs": 1_000_000_000}});
        let (output, _) = sandbox.run(&spec)?;
        let uptime: f64 = output.split(' ').next().unwrap().parse()?;
        assert!(uptime > 1e9, "{uptime}");
        Ok(())
    });
}
