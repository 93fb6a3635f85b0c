//! What a specification may ask for, all at once, with the guest's own kernel and controllers.

use serde_json::json;

use super::isolation::{limit_memory, run};
use super::pod::Pod;

#[test]
fn what_a_specification_asks_for_beside() {
    let Some(pod) = Pod::boot("1") else { return };
    let script = "id -u; id -G; umask; ulimit -n; ulimit -Hn
        cat /proc/self/oom_score_adj
        grep NoNewPrivs /proc/self/status | cut -f2; [ $(cut -d. -f1 /proc/uptime) -ge 1000000 ]; echo $?
        touch /x 2> /dev/null; echo $?; cat /tmp/hook; pwd; echo $VARIABLE
        cd /cg; cat pids.max memory.max memory.low cpu.max cpuset.cpus
        echo 0 2> /dev/null > pids.max; echo $?; grep -c . cgroup.procs";
    let said = run(&pod, &["sh", "-c", script], |spec| {
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
    pod.end();
}

#[test]
fn who_exceeds_a_limit_ends_alone() {
    let Some(pod) = Pod::boot("1") else { return };
    let script = "tail /dev/zero; echo status $?";
    let said = run(&pod, &["sh", "-c", script], limit_memory);
    assert_eq!(said.stdout, "status 137\n", "{said:?}");
    pod.end();
}
