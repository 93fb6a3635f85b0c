//! Pods through containerd's CRI plugin.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use super::with_pods;
use cella_tests::containerd::{Containerd, IMAGE};

/// A running pod.
pub struct Pod<'a> {
    daemon: &'a Containerd,
    /// Its sandbox's id.
    pub id: String,
    config: Value,
}

/// What CRI says of a sandbox.
pub fn sandbox_state(daemon: &Containerd, id: &str) -> String {
    let status = daemon.cri("PodSandboxStatus", &json!({"pod_sandbox_id": id}));
    status["status"]["state"].as_str().unwrap().to_owned()
}

/// `base` with the fields of `more` over it, at every depth.
fn merge(base: &mut Value, more: &Value) {
    match (base, more) {
        (Value::Object(base), Value::Object(more)) => {
            for (key, value) in more {
                merge(base.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
        (base, more) => *base = more.clone(),
    }
}

pub fn pod_config(daemon: &Containerd, name: &str, more: &Value) -> Value {
    let mut config = json!({
        "metadata": {"name": name, "namespace": "default", "uid": name},
        "hostname": "pod-host",
        "log_directory": daemon.host.path("logs"),
        "dns_config": {"servers": ["10.1.2.3"], "searches": ["test.local"]},
        "linux": {"security_context": {"namespace_options": {"pid": "CONTAINER"}}},
    });
    merge(&mut config, more);
    config
}

impl<'a> Pod<'a> {
    pub fn run(daemon: &'a Containerd, more: &Value) -> Self {
        Self::run_with(daemon, "cella", more)
    }

    pub fn run_with(daemon: &'a Containerd, handler: &str, more: &Value) -> Self {
        let config = pod_config(daemon, &format!("pod-{handler}"), more);
        Self::run_config(daemon, handler, config)
    }

    pub fn run_config(daemon: &'a Containerd, handler: &str, config: Value) -> Self {
        let request = json!({"runtime_handler": handler, "config": config});
        let answer = daemon.cri("RunPodSandbox", &request);
        Self {
            daemon,
            id: answer["podSandboxId"].as_str().unwrap().to_owned(),
            config,
        }
    }

    fn create(&self, name: &str, script: &str, more: &Value) -> Result<String, String> {
        let mut config = json!({
            "metadata": {"name": name},
            "image": {"image": IMAGE},
            "command": ["sh", "-c", script],
            "log_path": format!("{name}.log"),
            "linux": {"security_context": {"namespace_options": {"pid": "CONTAINER"}}},
        });
        merge(&mut config, more);
        let request =
            json!({"pod_sandbox_id": self.id, "config": config, "sandbox_config": self.config});
        let answer = self.daemon.try_cri("CreateContainer", &request)?;
        Ok(answer["containerId"].as_str().unwrap().to_owned())
    }

    /// Creates and starts a container.
    #[track_caller]
    pub fn start(&self, name: &str, script: &str, more: &Value) -> String {
        let id = self
            .create(name, script, more)
            .unwrap_or_else(|error| panic!("{error}"));
        self.daemon
            .cri("StartContainer", &json!({"container_id": id}));
        id
    }

    /// What CRI says of a container.
    pub fn status(&self, id: &str) -> Value {
        self.daemon
            .cri("ContainerStatus", &json!({"container_id": id}))["status"]
            .clone()
    }

    /// What `sh -c script` prints in a container, which must succeed.
    #[track_caller]
    pub fn sh(&self, id: &str, script: &str) -> String {
        let answer = self.exec(id, script);
        assert_eq!(answer["exitCode"], 0, "{script}: {answer}");
        decode(answer["stdout"].as_str().unwrap())
    }

    fn exec(&self, id: &str, script: &str) -> Value {
        let request = json!({"container_id": id, "cmd": ["sh", "-c", script], "timeout": 60});
        self.daemon.cri("ExecSync", &request)
    }

    pub fn wait_exited(&self, id: &str) -> Value {
        self.daemon.eventually("the container ends", || {
            self.status(id)["state"] == "CONTAINER_EXITED"
        });
        self.status(id)
    }

    fn remove_container(&self, id: &str) {
        self.daemon
            .cri("RemoveContainer", &json!({"container_id": id}));
    }

    pub fn log(&self, name: &str) -> String {
        let log = self.daemon.host.path("logs").join(format!("{name}.log"));
        fs::read_to_string(log).unwrap_or_default()
    }

    /// Stops it, which may be done twice, and removes it.
    pub fn remove(self) {
        for _ in 0..2 {
            self.daemon
                .cri("StopPodSandbox", &json!({"pod_sandbox_id": self.id}));
        }
        self.daemon
            .cri("RemovePodSandbox", &json!({"pod_sandbox_id": self.id}));
    }
}

/// Base64, as JSON has protobuf's bytes.
fn decode(text: &str) -> String {
    let value = |byte: u8| match byte {
        b'A'..=b'Z' => byte - b'A',
        b'a'..=b'z' => byte - b'a' + 26,
        b'0'..=b'9' => byte - b'0' + 52,
        b'+' => 62,
        _ => 63,
    };
    let bytes: Vec<u8> = text.bytes().filter(|byte| *byte != b'=').collect();
    let mut out = Vec::new();
    for group in bytes.chunks(4) {
        let bits = group
            .iter()
            .fold(0_u32, |bits, byte| bits << 6 | u32::from(value(*byte)));
        let bits = bits << (6 * (4 - group.len()));
        out.extend_from_slice(&bits.to_be_bytes()[1..group.len()]);
    }
    String::from_utf8(out).unwrap()
}

#[test]
fn containers_of_a_pod() {
    let Some(daemon) = with_pods() else { return };
    let pod = Pod::run(
        &daemon,
        &json!({"linux": {"sysctls": {"net.core.somaxconn": "777"}}}),
    );
    let trap = "echo up; trap 'echo bye; exit 5' TERM; while :; do sleep 1 & wait $!; done";
    let one = pod.start("one", trap, &json!({}));
    let two = pod.start("two", "sleep 1000", &json!({}));
    assert_eq!(daemon.shims().len(), 1, "one shim for a pod");
    assert_eq!(daemon.vmms().len(), 1, "one machine for a pod");

    assert_eq!(
        pod.sh(&one, "hostname; cat /proc/sys/net/core/somaxconn"),
        "pod-host\n777\n"
    );
    assert_eq!(
        pod.sh(&one, "cat /etc/resolv.conf"),
        "search test.local\nnameserver 10.1.2.3\n"
    );
    for kind in ["net", "ipc", "uts"] {
        let link = format!("readlink /proc/self/ns/{kind}");
        assert_eq!(pod.sh(&one, &link), pod.sh(&two, &link));
    }
    pod.sh(&one, "echo shared > /dev/shm/x");
    assert_eq!(pod.sh(&two, "cat /dev/shm/x"), "shared\n");
    assert_ne!(
        pod.sh(&one, "readlink /proc/self/ns/pid"),
        pod.sh(&two, "readlink /proc/self/ns/pid")
    );
    let answer = pod.exec(&one, "echo no >&2; exit 3");
    assert_eq!(
        (
            answer["exitCode"].as_i64(),
            decode(answer["stderr"].as_str().unwrap()).as_str()
        ),
        (Some(3), "no\n")
    );

    check_network(&daemon, &pod, &two);
    check_restart(&daemon, &pod, &one);
    pod.remove();
    daemon.end();
}

fn check_network(daemon: &Containerd, pod: &Pod<'_>, two: &str) {
    // The pod's address is its namespace's, and the host reaches it.
    let status = daemon.cri("PodSandboxStatus", &json!({"pod_sandbox_id": pod.id}));
    let ip = status["status"]["network"]["ip"]
        .as_str()
        .unwrap()
        .to_owned();
    assert!(pod.sh(two, "ip -4 addr show dev eth0").contains(&ip));
    let gateway = format!("{}.1", ip.rsplit_once('.').unwrap().0);
    pod.sh(two, &format!("ping -c 1 -W 5 {gateway}"));
}

fn check_restart(daemon: &Containerd, pod: &Pod<'_>, one: &str) {
    // Stopped gracefully, and restarted in the living sandbox.
    daemon.cri(
        "StopContainer",
        &json!({"container_id": one, "timeout": 30}),
    );
    let ended = pod.wait_exited(one);
    assert_eq!(
        ended["exitCode"], 5,
        "SIGTERM came once and was handled: {ended}"
    );
    let log = pod.log("one");
    assert!(
        log.contains("stdout F up\n") && log.contains("stdout F bye\n"),
        "{log}"
    );
    pod.remove_container(one);
    let again = pod.start(
        "one",
        "echo second; exit 0",
        &json!({"metadata": {"attempt": 1}}),
    );
    let ended = pod.wait_exited(&again);
    assert_eq!(
        (&ended["exitCode"], &ended["reason"]),
        (&json!(0), &json!("Completed"))
    );
    assert_eq!(sandbox_state(daemon, &pod.id), "SANDBOX_READY");
    let missing = pod
        .create("missing", "", &json!({"command": ["/no/such"]}))
        .unwrap();
    let error = daemon
        .try_cri("StartContainer", &json!({"container_id": missing}))
        .unwrap_err();
    assert!(error.contains("/no/such"), "{error}");
}

#[test]
fn limits_and_statistics() {
    let Some(daemon) = with_pods() else { return };
    let annotations = json!({"annotations": {"io.cella.memory": "192M", "io.cella.cpus": "2"}});
    let pod = Pod::run(&daemon, &annotations);
    let limit = |bytes: u64| json!({"linux": {"resources": {"memory_limit_in_bytes": bytes}}});
    let one = pod.start("one", "sleep 1000", &limit(64 << 20));
    assert_eq!(
        pod.sh(&one, "nproc; cat /sys/fs/cgroup/memory.max"),
        "2\n67108864\n"
    );
    let total: u64 = pod
        .sh(&one, "awk '/MemTotal/ {print $2}' /proc/meminfo")
        .trim()
        .parse()
        .unwrap();
    assert!((128 << 10..192 << 10).contains(&total), "{total} KiB");

    let update = json!({"container_id": one, "linux": {"memory_limit_in_bytes": 32 << 20}});
    daemon.cri("UpdateContainerResources", &update);
    assert_eq!(pod.sh(&one, "cat /sys/fs/cgroup/memory.max"), "33554432\n");
    let stats = daemon.cri("ContainerStats", &json!({"container_id": one}));
    let number = |value: &Value| value["value"].as_str().unwrap().parse::<u64>().unwrap();
    assert!(
        number(&stats["stats"]["cpu"]["usageCoreNanoSeconds"]) > 0,
        "{stats}"
    );
    assert!(
        number(&stats["stats"]["memory"]["workingSetBytes"]) > 0,
        "{stats}"
    );

    check_metrics(&daemon, &pod, &one);

    let hungry = "x=$(head -c 50000000 /dev/zero | tr '\\0' x); echo ${#x}";
    let hungry = pod.start("hungry", hungry, &limit(16 << 20));
    let ended = pod.wait_exited(&hungry);
    assert_eq!(
        (&ended["exitCode"], &ended["reason"]),
        (&json!(137), &json!("OOMKilled")),
        "{ended}"
    );
    pod.remove();
    daemon.end();
}

/// What containerd itself gets: of the version of the host's cgroups, with the pod's network.
fn check_metrics(daemon: &Containerd, pod: &Pod<'_>, container: &str) {
    let gateway = "$(ip route | awk '/default/ {print $3}')";
    pod.sh(container, &format!("ping -c 1 -W 5 {gateway}"));
    let metrics = [
        "-n", "k8s.io", "task", "metrics", "--format", "json", container,
    ];
    let said = daemon.ctr(&metrics).expect_status(0);
    let metrics: Value = serde_json::from_str(&said.stdout).unwrap();
    let unified = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let kills = if unified {
        "memory_events"
    } else {
        "memory_oom_control"
    };
    assert!(metrics.get(kills).is_some(), "no {kills} in {metrics}");
    let network = &metrics["network"][0];
    assert_eq!(network["name"], "eth0", "{metrics}");
    for counter in ["rx_bytes", "rx_packets", "tx_bytes", "tx_packets"] {
        assert!(
            network[counter].as_u64() > Some(0),
            "no {counter} in {metrics}"
        );
    }
}

#[test]
fn volumes_of_a_pod() {
    let Some(daemon) = with_pods() else { return };
    let dir = daemon.host.path("volumes");
    // A ConfigMap as kubelet writes one: links to a directory that is replaced as a whole.
    let config = dir.join("config");
    for version in ["1", "2"] {
        fs::create_dir_all(config.join(version)).unwrap();
        fs::write(config.join(version).join("key"), version).unwrap();
    }
    symlink("1", config.join("..data")).unwrap();
    symlink("..data/key", config.join("key")).unwrap();
    let empty = dir.join("empty");
    fs::create_dir_all(&empty).unwrap();
    let termination = dir.join("termination");
    fs::write(&termination, "").unwrap();
    let mounts = json!({"mounts": [
        {"container_path": "/config", "host_path": config, "readonly": true},
        {"container_path": "/empty", "host_path": empty},
        {"container_path": "/dev/termination-log", "host_path": termination},
    ]});
    let pod = Pod::run(&daemon, &json!({}));
    let one = pod.start("one", "sleep 1000", &mounts);
    let two = pod.start(
        "two",
        "echo ended well > /dev/termination-log; cat > /empty/two </config/key",
        &mounts,
    );
    pod.wait_exited(&two);
    assert_eq!(fs::read_to_string(&termination).unwrap(), "ended well\n");
    assert_eq!(pod.sh(&one, "cat /empty/two /config/key"), "11");
    assert_ne!(pod.exec(&one, "echo x > /config/new")["exitCode"], 0);
    check_changes(&daemon, &pod, &config, &mounts);
    check_submounts(&daemon, &pod);

    // Made after the pod: a volume needs no restart of it.
    let late = dir.join("late");
    fs::create_dir(&late).unwrap();
    fs::write(late.join("f"), "late").unwrap();
    let mounts =
        json!({"mounts": [{"container_path": "/late", "host_path": late, "readonly": true}]});
    let three = pod.start("three", "sleep 1000", &mounts);
    assert_eq!(pod.sh(&three, "cat /late/f"), "late");
    pod.remove();
    daemon.end();
}

/// Read-only is a volume, not what is mounted below it.
fn check_submounts(daemon: &Containerd, pod: &Pod<'_>) {
    let volume = daemon.host.path("submounts");
    let below = volume.join("below");
    fs::create_dir_all(&below).unwrap();
    let mount = |args: &[&str]| {
        assert!(
            Command::new(args[0])
                .args(&args[1..])
                .arg(&below)
                .status()
                .unwrap()
                .success()
        )
    };
    mount(&["mount", "-t", "tmpfs", "none"]);
    let mounts =
        json!({"mounts": [{"container_path": "/v", "host_path": volume, "readonly": true}]});
    let one = pod.start("submounts", "sleep 1000", &mounts);
    mount(&["umount"]);
    pod.sh(&one, "touch /v/below/x");
    let said = pod.exec(&one, "touch /v/x");
    let stderr = decode(said["stderr"].as_str().unwrap());
    assert!(stderr.contains("Read-only file system"), "{said}");
    // What the container has mounted is no matter of the host's: nothing is busy.
    fs::remove_dir(&below).unwrap();
}

/// A ConfigMap that kubelet changes is changed within a second. CRI's log has the host's time of each line.
fn check_changes(daemon: &Containerd, pod: &Pod<'_>, config: &Path, mounts: &Value) {
    // Nothing but opening and reading: other commands would take their own time in an emulated guest.
    let script = "read k </config/key; echo key $k; while [ $k != 2 ]; do read k </config/key; done; echo key $k";
    pod.start("watcher", script, mounts);
    daemon.eventually("the watcher reads", || pod.log("watcher").contains("key 1"));
    symlink("2", config.join("..new")).unwrap();
    fs::rename(config.join("..new"), config.join("..data")).unwrap();
    let latest = Command::new("date")
        .args(["-u", "-d", "+1 second", "+%Y-%m-%dT%H:%M:%S.%N"])
        .output()
        .unwrap();
    let latest = String::from_utf8(latest.stdout).unwrap();
    daemon.eventually("the ConfigMap changes", || {
        pod.log("watcher").contains("key 2")
    });
    let log = pod.log("watcher");
    let line = log.lines().find(|line| line.ends_with("key 2")).unwrap();
    assert!(line < latest.trim(), "{line}, not by {latest}");
}

#[test]
fn what_a_container_may_do() {
    let Some(daemon) = with_pods() else { return };
    let config = json!({"linux": {"security_context": {"privileged": true}}});
    let pod = Pod::run(&daemon, &config);
    let with = |context: Value| json!({"linux": {"security_context": context}});
    let user = pod.start("user", "sleep 1000", &with(json!({
        "run_as_user": {"value": 1000}, "run_as_group": {"value": 1000}, "supplemental_groups": [2000, 3000],
        "readonly_rootfs": true, "no_new_privs": true,
        "capabilities": {"drop_capabilities": ["ALL"]},
        "seccomp": {"profile_type": "RuntimeDefault"},
    })));
    let id = pod.sh(&user, "id");
    assert!(
        id.contains("uid=1000") && id.contains("2000") && id.contains("3000"),
        "{id}"
    );
    assert_ne!(
        pod.exec(&user, "echo x > /x")["exitCode"],
        0,
        "its root is read-only"
    );
    let status = pod.sh(
        &user,
        "grep -E '^(CapEff|NoNewPrivs|Seccomp):' /proc/self/status",
    );
    assert_eq!(
        status
            .split_whitespace()
            .skip(1)
            .step_by(2)
            .collect::<Vec<_>>(),
        ["0000000000000000", "1", "2"]
    );

    let privileged = pod.start(
        "privileged",
        "sleep 1000",
        &with(json!({"privileged": true})),
    );
    pod.sh(&privileged, "mkdir /m && mount -t tmpfs t /m && touch /m/x");
    // Another container's pids, as an ephemeral container sees them.
    let target = with(json!({"namespace_options": {"pid": "TARGET", "target_id": user}}));
    let debug = pod.start("debug", "sleep 1001", &target);
    assert!(pod.sh(&debug, "ps").contains("sleep 1000"));
    pod.remove();

    check_shared_pids(&daemon);
    for (options, word) in [
        (json!({"network": "NODE"}), "network namespace"),
        (json!({"ipc": "NODE"}), "IPC namespace"),
    ] {
        let config = json!({"linux": {"security_context": {"namespace_options": options}}});
        let config = pod_config(&daemon, "host", &config);
        let request = json!({"runtime_handler": "cella", "config": config});
        let error = daemon.try_cri("RunPodSandbox", &request).unwrap_err();
        assert!(error.contains(word), "{error}");
    }
    daemon.end();
}

fn check_shared_pids(daemon: &Containerd) {
    // A pid namespace for the whole pod.
    let shared = json!({"linux": {"security_context": {"namespace_options": {"pid": "POD"}}}});
    let pod = Pod::run(daemon, &shared);
    let one = pod.start("one", "sleep 1001", &shared);
    let two = pod.start("two", "sleep 1002", &shared);
    let ps = pod.sh(&two, "ps");
    assert!(
        ps.contains("sleep 1001") && ps.contains("sleep 1002"),
        "{ps}"
    );
    daemon.cri("StopContainer", &json!({"container_id": one, "timeout": 0}));
    assert_eq!(pod.wait_exited(&one)["exitCode"], 137);
    assert!(!pod.sh(&two, "ps").contains("sleep 1001"));
    pod.remove();
}

/// The telling part on KVM, where the rest of the suite is on QEMU.
#[test]
fn a_pod_on_kvm() {
    if super::hypervisor_name() == "kvm" {
        return; // as every test
    }
    let Some(daemon) = super::with_pods_on("kvm") else {
        return;
    };
    let pod = Pod::run(&daemon, &json!({}));
    let one = pod.start("one", "sleep 1000", &json!({}));
    let two = pod.start("two", "sleep 1000", &json!({}));
    pod.sh(&one, "echo shared > /dev/shm/x");
    assert_eq!(pod.sh(&two, "cat /dev/shm/x"), "shared\n");
    check_network(&daemon, &pod, &two);
    daemon.cri("StopContainer", &json!({"container_id": one, "timeout": 0}));
    assert_eq!(pod.wait_exited(&one)["exitCode"], 137);
    pod.remove();
    daemon.end();
}
