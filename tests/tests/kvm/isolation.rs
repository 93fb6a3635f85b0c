//! What holds a container in: memory limits, user namespaces, seccomp, all from a bundle's own specification.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use serde_json::{Value, json};

use super::pod::Pod;
use cella_tests::{Host, Said};

/// Runs a bundle of the host's busybox whose specification `edit` has changed, in the pod.
pub fn run(pod: &Pod, args: &[&str], edit: impl FnOnce(&mut Value)) -> Said {
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
    pod.end();
}

/// Lets it have 8 MiB.
pub fn limit_memory(spec: &mut Value) {
    spec["linux"]["resources"] = json!({ "memory": { "limit": 8 << 20, "swap": 8 << 20 } });
}

/// Who exceeds a limit is ended.
fn the_memory_that_it_may_have(pod: &Pod) {
    // `tail` of what has no line's end keeps all of it.
    let said = run(pod, &["tail", "/dev/zero"], limit_memory);
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
