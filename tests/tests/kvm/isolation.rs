//! What holds a container in: memory limits, user namespaces, seccomp, all from a bundle's own specification.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use serde_json::{Value, json};

use super::pod::Pod;
use cella_tests::{Host, Said};

/// Runs a bundle of the host's busybox whose specification `edit` has changed, in the pod.
fn run(pod: &Pod, args: &[&str], edit: impl FnOnce(&mut Value)) -> Said {
    let image = bundle(&pod.host, args, edit);
    pod.host.cella(&["run", "--pod", "pod", &image])
}

/// Makes that bundle: its reference.
pub fn bundle(host: &Host, args: &[&str], edit: impl FnOnce(&mut Value)) -> String {
    let bundle = host.path("bundle");
    let rootfs = bundle.join("rootfs");
    fs::create_dir_all(&rootfs).unwrap();
    let image = host.busybox();
    let blobs = format!("{}/blobs/sha256", image.strip_prefix("oci:").unwrap());
    let layer = fs::read_dir(blobs)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .max_by_key(|path| fs::metadata(path).unwrap().len())
        .unwrap();
    let unpacked = Command::new("tar")
        .args(["-xf", layer.to_str().unwrap(), "-C"])
        .arg(&rootfs)
        .status();
    assert!(unpacked.unwrap().success());
    fs::set_permissions(&rootfs, fs::Permissions::from_mode(0o755)).unwrap();
    let namespaces: Vec<_> = ["pid", "mount", "ipc", "uts", "cgroup"]
        .iter()
        .map(|kind| json!({ "type": kind }))
        .collect();
    let mut spec = json!({
        "ociVersion": "1.0.2",
        "root": { "path": "rootfs" },
        "process": {
            "user": { "uid": 0, "gid": 0 },
            "args": args,
            "env": ["PATH=/bin"],
            "cwd": "/",
        },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs" },
            { "destination": "/tmp", "type": "tmpfs", "source": "tmpfs" },
        ],
        "linux": { "namespaces": namespaces },
    });
    edit(&mut spec);
    fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
    format!("bundle:{}", bundle.display())
}

#[test]
fn what_a_container_is_held_to() {
    let Some(pod) = Pod::boot("1") else { return };
    the_memory_that_it_may_have(&pod);
    the_users_that_it_has(&pod);
    the_calls_that_it_may_make(&pod);
    everything_else(&pod);
    pod.end();
}

/// Who exceeds a limit is ended, and nobody else.
fn the_memory_that_it_may_have(pod: &Pod) {
    // `tail` of what has no line's end keeps all of it.
    let script = "tail /dev/zero; echo status $?";
    let said = run(pod, &["sh", "-c", script], |spec| {
        spec["linux"]["resources"] = json!({ "memory": { "limit": 16 << 20, "swap": 16 << 20 } });
    });
    assert_eq!(said.stdout, "status 137\n", "{said:?}");
    let said = run(pod, &["tail", "/dev/zero"], |spec| {
        spec["linux"]["resources"] = json!({ "memory": { "limit": 16 << 20, "swap": 16 << 20 } });
    });
    assert_eq!(said.status, 137, "{said:?}");
}

/// Root of a user namespace is nobody outside.
fn the_users_that_it_has(pod: &Pod) {
    let script = "cat /proc/self/uid_map; id -u; touch /new 2>/dev/null; echo $?; touch /tmp/new && stat -c %u /tmp/new";
    let said = run(pod, &["sh", "-c", script], |spec| {
        let map = json!([{ "containerID": 0, "hostID": 100_000, "size": 65_536 }]);
        let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.push(json!({ "type": "user" }));
        spec["linux"]["uidMappings"] = map.clone();
        spec["linux"]["gidMappings"] = map;
    })
    .expect_status(0);
    let lines: Vec<_> = said.stdout.lines().map(str::trim).collect();
    let map: Vec<_> = lines[0].split_whitespace().collect();
    assert_eq!(map, ["0", "100000", "65536"], "{said:?}");
    assert_eq!(lines[1..], ["0", "1", "0"], "{said:?}");
}

fn the_calls_that_it_may_make(pod: &Pod) {
    let said = run(pod, &["mkdir", "/tmp/new"], |spec| {
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [{
                "names": ["mkdir", "mkdirat"],
                "action": "SCMP_ACT_KILL_PROCESS",
            }],
        });
    });
    assert_eq!(said.status, 128 + 31, "SIGSYS: {said:?}");
}

/// What a specification asks for beside, all at once, with the guest's own kernel and controllers.
fn everything_else(pod: &Pod) {
    let script = "id -u; id -G; umask; ulimit -n; ulimit -Hn
        cat /proc/self/oom_score_adj
        grep NoNewPrivs /proc/self/status | cut -f2; [ $(cut -d. -f1 /proc/uptime) -ge 1000000 ]; echo $?
        touch /x 2> /dev/null; echo $?; cat /tmp/hook; pwd; echo $VARIABLE
        cd /cg; cat pids.max memory.max memory.low cpu.max cpuset.cpus
        echo 0 2> /dev/null > pids.max; echo $?; grep -c . cgroup.procs";
    let said = run(pod, &["sh", "-c", script], |spec| {
        let process = &mut spec["process"];
        process["user"] =
            json!({ "uid": 1000, "gid": 1001, "umask": 0o027, "additionalGids": [2000, 3000] });
        process["rlimits"] = json!([{ "type": "RLIMIT_NOFILE", "soft": 100, "hard": 200 }]);
        process["oomScoreAdj"] = json!(77);
        process["noNewPrivileges"] = json!(true);
        process["cwd"] = json!("/tmp");
        process["env"] = json!(["PATH=/bin", "VARIABLE=a value"]);
        spec["root"]["readonly"] = json!(true);
        let hook = ["sh", "-c", "echo hooked > /tmp/hook"];
        spec["hooks"] =
            json!({ "startContainer": [{ "path": "/bin/sh", "args": hook, "env": ["PATH=/bin"] }] });
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.push(json!({ "destination": "/cg", "type": "cgroup", "source": "cgroup", "options": ["ro"] }));
        let linux = &mut spec["linux"];
        let namespaces = linux["namespaces"].as_array_mut().unwrap();
        namespaces.push(json!({ "type": "time" }));
        linux["timeOffsets"] = json!({ "boottime": { "secs": 1_000_000 } });
        linux["resources"] = json!({
            "pids": { "limit": 50 },
            "memory": { "limit": 64 << 20, "reservation": 32 << 20 },
            "cpu": { "quota": 50_000, "period": 100_000, "cpus": "0" },
        });
    })
    .expect_status(0);
    let lines: Vec<_> = said.stdout.lines().collect();
    let process = [
        "1000",
        "1001 2000 3000",
        "0027",
        "100",
        "200",
        "77",
        "1",
        "0",
    ];
    let place = ["1", "hooked", "/tmp", "a value"];
    let cgroup = ["50", "67108864", "33554432", "50000 100000", "0", "1"];
    let expected = [&process[..], &place, &cgroup].concat();
    assert_eq!(lines[..expected.len()], expected, "{said:?}");
}
