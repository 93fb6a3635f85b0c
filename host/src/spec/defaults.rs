//! What every container gets, with docker's values.

use serde_json::{Value, json};

/// The capabilities of an unprivileged container.
pub(super) const CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

/// Files of the kernel that tell or do more than a container should.
pub(super) const MASKED_PATHS: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];

/// Files of the kernel that a container may only read.
pub(super) const READONLY_PATHS: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// The namespaces. Which of them are the pod's, the agent knows.
pub(super) fn namespaces() -> Value {
    let names = ["pid", "network", "ipc", "uts", "mount", "cgroup"];
    names.iter().map(|name| json!({ "type": name })).collect()
}

/// The file systems that a container has besides its root. `shm` is a directory to be `/dev/shm`.
pub(super) fn mounts(shm: Option<&str>) -> Value {
    let shm = match shm {
        Some(source) => json!({
            "destination": "/dev/shm", "type": "bind", "source": source,
            "options": ["rbind", "nosuid", "noexec", "nodev"],
        }),
        None => json!({
            "destination": "/dev/shm", "type": "tmpfs", "source": "shm",
            "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
        }),
    };
    json!([
        {
            "destination": "/proc", "type": "proc", "source": "proc",
            "options": ["nosuid", "noexec", "nodev"],
        },
        {
            "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
            "options": ["nosuid", "strictatime", "mode=755", "size=65536k"],
        },
        {
            "destination": "/dev/pts", "type": "devpts", "source": "devpts",
            "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        },
        {
            "destination": "/sys", "type": "sysfs", "source": "sysfs",
            "options": ["nosuid", "noexec", "nodev", "ro"],
        },
        {
            "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
            "options": ["nosuid", "noexec", "nodev", "relatime", "ro"],
        },
        {
            "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
            "options": ["nosuid", "noexec", "nodev"],
        },
        shm,
    ])
}

/// Which devices a container may open: nodes of any may be made, those that every container has may be
/// used. The nodes themselves (null, zero, full, random, urandom, tty, ptmx) are the runtime's to make.
pub(super) fn device_rules() -> Value {
    let rule = |kind: &str, major: Option<i64>, minor: Option<i64>, access: &str| {
        let mut rule = json!({ "allow": true, "type": kind, "access": access });
        for (key, number) in [("major", major), ("minor", minor)] {
            if let Some(number) = number {
                super::set(&mut rule, key, json!(number));
            }
        }
        rule
    };
    let mut rules = vec![
        json!({ "allow": false, "access": "rwm" }),
        rule("c", None, None, "m"),
        rule("b", None, None, "m"),
    ];
    // null, zero, full, random, urandom; tty, console, ptmx; all of devpts.
    let used = [
        (1, 3),
        (1, 5),
        (1, 7),
        (1, 8),
        (1, 9),
        (5, 0),
        (5, 1),
        (5, 2),
    ];
    rules.extend(
        used.iter()
            .map(|(major, minor)| rule("c", Some(*major), Some(*minor), "rwm")),
    );
    rules.push(rule("c", Some(136), None, "rwm"));
    Value::Array(rules)
}
