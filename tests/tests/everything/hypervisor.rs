//! What is the same on every hypervisor: what a sandbox may be.

use super::host;

#[test]
fn memory_and_processors_are_what_was_asked_for() {
    let Some(host) = host() else { return };
    let image = host.busybox();
    for (memory, cpus) in [("64M", "1"), ("1G", "2"), ("4G", "4")] {
        let script = "nproc; sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo";
        let args = [
            "run", "--memory", memory, "--cpus", cpus, &image, "sh", "-c", script,
        ];
        let said = host.cella(&args).expect_status(0);
        let lines: Vec<_> = said.stdout.lines().collect();
        assert_eq!(lines[0], cpus, "{said:?}");
        let total = lines[1].parse::<u64>().unwrap() / 1024;
        let asked = match memory.strip_suffix('M') {
            Some(mib) => mib.parse::<u64>().unwrap(),
            None => memory.trim_end_matches('G').parse::<u64>().unwrap() * 1024,
        };
        // The kernel keeps some for itself.
        assert!(
            total < asked && total > asked - asked / 8 - 20,
            "{total} of {asked} MiB"
        );
    }
    host.assert_clean();
}

#[test]
fn the_clock_is_the_hosts() {
    let Some(host) = host() else { return };
    let image = host.busybox();
    let script = "a=$(date +%s); sleep 3; b=$(date +%s); echo $a $((b-a))";
    let said = host
        .cella(&["run", &image, "sh", "-c", script])
        .expect_status(0);
    let now = std::time::SystemTime::now();
    let now = now.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let numbers: Vec<u64> = said
        .stdout
        .split_whitespace()
        .map(|n| n.parse().unwrap())
        .collect();
    assert!(now - numbers[0] < 60, "{numbers:?} at {now}");
    assert!(
        (3..=5).contains(&numbers[1]),
        "three seconds took {}",
        numbers[1]
    );
    host.assert_clean();
}

#[test]
fn what_is_measured_arrives_intact() {
    let Some(host) = host() else { return };
    for (what, compares) in [
        ("stdio", true),
        ("fs", true),
        ("block", true),
        ("net", false),
        ("vsock", false),
    ] {
        let said = host
            .cella(&["bench", what, "--mib", "1", "--json"])
            .expect_status(0);
        let figures: serde_json::Value = serde_json::from_str(&said.stdout).unwrap();
        assert_eq!(figures["mib"], 1, "{what}: {said:?}");
        if compares {
            assert_eq!(figures["intact"], true, "{what}: {said:?}");
        }
    }
    host.assert_clean();
}
