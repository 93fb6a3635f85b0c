//! What every container is held to.

use oci_spec::runtime::LinuxSeccomp;
use serde_json::{Value, json};

use super::{options, strings, web};

/// The kernel's numbers of capabilities (capability.h).
fn bit(name: &str) -> u32 {
    match name {
        "CAP_CHOWN" => 0,
        "CAP_DAC_OVERRIDE" => 1,
        "CAP_FOWNER" => 3,
        "CAP_FSETID" => 4,
        "CAP_KILL" => 5,
        "CAP_SETGID" => 6,
        "CAP_SETUID" => 7,
        "CAP_SETPCAP" => 8,
        "CAP_NET_BIND_SERVICE" => 10,
        "CAP_NET_RAW" => 13,
        "CAP_SYS_CHROOT" => 18,
        "CAP_MKNOD" => 27,
        "CAP_AUDIT_WRITE" => 29,
        "CAP_SETFCAP" => 31,
        other => panic!("{other} is not docker's"),
    }
}

#[test]
fn capabilities_are_dockers() {
    let capabilities = web().json(&options())["process"]["capabilities"].take();
    for set in ["bounding", "effective", "permitted"] {
        let mask = strings(&capabilities[set])
            .iter()
            .fold(0, |mask, name| mask | 1_u64 << bit(name));
        assert_eq!(format!("{mask:016x}"), "00000000a80425fb", "{set}");
    }
    // What is inheritable would survive a change to another user.
    for set in ["inheritable", "ambient"] {
        assert!(strings(&capabilities[set]).is_empty(), "{set}");
    }
}

#[test]
fn a_container_does_not_see_what_tells_of_the_machine() {
    let linux = web().json(&options())["linux"].take();
    let masked = strings(&linux["maskedPaths"]);
    for path in [
        "/proc/kcore",
        "/proc/keys",
        "/proc/timer_list",
        "/proc/acpi",
        "/sys/firmware",
    ] {
        assert!(masked.contains(&path), "{path} in {masked:?}");
    }
    let readonly = [
        "/proc/bus",
        "/proc/fs",
        "/proc/irq",
        "/proc/sys",
        "/proc/sysrq-trigger",
    ];
    assert_eq!(strings(&linux["readonlyPaths"]), readonly);
    // The agent joins the pod's namespaces; a path would be one of the guest's files.
    let namespaces = linux["namespaces"].as_array().unwrap();
    let mut types: Vec<_> = namespaces
        .iter()
        .map(|ns| ns["type"].as_str().unwrap())
        .collect();
    types.sort_unstable();
    assert_eq!(types, ["cgroup", "ipc", "mount", "network", "pid", "uts"]);
    assert!(
        namespaces
            .iter()
            .all(|namespace| namespace.get("path").is_none())
    );
    let rules = linux["resources"]["devices"].as_array().unwrap();
    assert_eq!(rules[0], json!({ "allow": false, "access": "rwm" }));
    // No other rule opens a device of just any number.
    for rule in &rules[1..] {
        assert!(
            rule.get("major").is_some() || rule["access"] == "m",
            "{rule}"
        );
    }
}

fn filter() -> Value {
    web().json(&options())["linux"]["seccomp"].take()
}

/// The system calls that are allowed with any arguments.
fn unconditional(filter: &Value) -> Vec<&str> {
    let rules = filter["syscalls"].as_array().unwrap().iter();
    rules
        .filter(|rule| rule["action"] == "SCMP_ACT_ALLOW" && rule.get("args").is_none())
        .flat_map(|rule| strings(&rule["names"]))
        .collect()
}

#[test]
fn the_system_call_filter_is_a_valid_one() {
    let filter = filter();
    let typed: LinuxSeccomp = serde_json::from_value(filter.clone()).unwrap();
    assert_eq!(serde_json::to_value(&typed).unwrap(), filter);
    assert_eq!(filter["defaultAction"], "SCMP_ACT_ERRNO");
    assert_eq!(filter["defaultErrnoRet"], 1);
    let valid = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'_';
    for rule in filter["syscalls"].as_array().unwrap() {
        let names = strings(&rule["names"]);
        assert!(!names.is_empty());
        let valid = |name: &&str| !name.is_empty() && name.bytes().all(valid);
        assert!(names.iter().all(valid), "{names:?}");
    }
    let mut once = unconditional(&filter);
    let count = once.len();
    once.sort_unstable();
    once.dedup();
    assert_eq!(once.len(), count, "a call is listed twice");
}

#[test]
fn what_manages_the_machine_is_for_no_container() {
    let filter = filter();
    let unconditional = unconditional(&filter);
    for call in ["read", "openat", "execve", "futex", "rseq", "exit_group"] {
        assert!(unconditional.contains(&call), "{call}");
    }
    for call in [
        "mount",
        "umount2",
        "unshare",
        "setns",
        "clone",
        "clone3",
        "socket",
        "bpf",
        "perf_event_open",
        "kexec_load",
        "init_module",
        "finit_module",
        "reboot",
        "open_by_handle_at",
        "io_uring_setup",
        "add_key",
        "keyctl",
        "personality",
        "pivot_root",
        "swapon",
        "settimeofday",
        "userfaultfd",
    ] {
        assert!(!unconditional.contains(&call), "{call} is for no container");
    }
}

#[test]
fn some_system_calls_depend_on_their_arguments() {
    let filter = filter();
    let rules = filter["syscalls"].as_array().unwrap();
    let rule = |name: &str| {
        rules
            .iter()
            .find(|rule| strings(&rule["names"]).contains(&name))
            .unwrap()
    };
    assert_eq!(rule("clone3")["errnoRet"], 38);
    // CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET.
    let flags: u64 = [17, 25, 26, 27, 28, 29, 30]
        .map(|bit: u32| 1 << bit)
        .iter()
        .sum();
    let clone = json!({ "index": 0, "value": flags, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ" });
    assert_eq!(rule("clone")["args"], json!([clone]));
    let vsock = json!({ "index": 0, "value": libc::AF_VSOCK, "op": "SCMP_CMP_NE" });
    assert_eq!(rule("socket")["args"], json!([vsock]));
}
