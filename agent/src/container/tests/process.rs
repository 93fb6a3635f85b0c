//! What a process is: user, capabilities, limits, environment, directory, filter.

use super::support::*;
use serde_json::json;

/// A field of /proc/self/status of `cat`.
fn status_field(status: &str, name: &str) -> String {
    let line = status
        .lines()
        .find(|line| line.starts_with(name))
        .unwrap_or_else(|| panic!("{status}"));
    line.split_once(':')
        .unwrap()
        .1
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
}

#[test]
fn the_five_capability_sets() {
    in_sandbox(|sandbox| {
        let mut spec = spec(&["cat", "/proc/self/status"]);
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        spec["process"]["capabilities"] = json!({
            "bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_NET_BIND_SERVICE"],
            "permitted": ["CAP_KILL", "CAP_NET_BIND_SERVICE"],
            "effective": ["CAP_KILL"],
            "inheritable": ["CAP_NET_BIND_SERVICE"],
            "ambient": ["CAP_NET_BIND_SERVICE"],
        });
        let (status, _) = sandbox.run(&spec)?;
        let hex = |set: u64| format!("{set:016x}");
        // A user's execve keeps of the rest what is ambient.
        assert_eq!(status_field(&status, "CapBnd"), hex(1 | 1 << 5 | 1 << 10));
        assert_eq!(status_field(&status, "CapAmb"), hex(1 << 10));
        assert_eq!(status_field(&status, "CapPrm"), hex(1 << 10));
        assert_eq!(status_field(&status, "CapEff"), hex(1 << 10));
        assert_eq!(status_field(&status, "CapInh"), hex(1 << 10));
        spec["process"]["user"] = json!({"uid": 0, "gid": 0});
        spec["process"]["capabilities"] = json!({});
        let (status, _) = sandbox.run(&spec)?;
        for set in ["CapBnd", "CapAmb", "CapPrm", "CapEff", "CapInh"] {
            assert_eq!(status_field(&status, set), hex(0), "{set}");
        }
        Ok(())
    });
}

#[test]
fn user_groups_umask_and_no_new_privs() {
    in_sandbox(|sandbox| {
        let mut spec = spec(&["sh", "-c", "cat /proc/self/status; umask"]);
        spec["process"]["user"] =
            json!({"uid": 1000, "gid": 1001, "additionalGids": [7, 8], "umask": 0o077});
        let (status, _) = sandbox.run(&spec)?;
        assert_eq!(status_field(&status, "Uid"), "1000 1000 1000 1000");
        assert_eq!(status_field(&status, "Gid"), "1001 1001 1001 1001");
        assert_eq!(status_field(&status, "Groups"), "7 8");
        assert_eq!(status_field(&status, "NoNewPrivs"), "1");
        let ignored = u64::from_str_radix(&status_field(&status, "SigIgn"), 16)?;
        assert_eq!(
            ignored & 1 << (libc::SIGPIPE - 1),
            0,
            "the agent ignores SIGPIPE"
        );
        assert_eq!(status_field(&status, "SigBlk"), "0000000000000000");
        assert_eq!(status.lines().last(), Some("0077"));
        spec["process"]["noNewPrivileges"] = json!(false);
        spec["process"]["user"] = json!({"uid": 0, "gid": 0});
        let (status, _) = sandbox.run(&spec)?;
        assert_eq!(status_field(&status, "NoNewPrivs"), "0");
        assert_eq!(status_field(&status, "Groups"), "");
        assert_eq!(status.lines().last(), Some("0022"));
        Ok(())
    });
}

#[test]
fn rlimits_oom_score_and_io_priority() {
    in_sandbox(|sandbox| {
        let mut spec = spec(&["sh", "-c", "cat /proc/self/limits /proc/self/oom_score_adj"]);
        spec["process"]["rlimits"] = json!([
            {"type": "RLIMIT_NOFILE", "soft": 64, "hard": 128},
            {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
        ]);
        spec["process"]["oomScoreAdj"] = json!(321);
        spec["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_IDLE", "priority": 0});
        let (output, status) = sandbox.run(&spec)?;
        assert_eq!(status, 0);
        let words = |name: &str| {
            let line = output.lines().find(|line| line.starts_with(name)).unwrap();
            line[name.len()..]
                .split_whitespace()
                .take(2)
                .collect::<Vec<_>>()
                .join(" ")
        };
        assert_eq!(words("Max open files"), "64 128");
        assert_eq!(words("Max core file size"), "0 0");
        assert_eq!(output.lines().last(), Some("321"));
        Ok(())
    });
}

#[test]
fn environment_arguments_and_working_directory() {
    in_sandbox(|sandbox| {
        let mut spec = spec(&["sh", "-c", "pwd; env; echo \"$0 $1\"", "zero", "two words"]);
        spec["process"]["cwd"] = json!("/made/for/it");
        spec["process"]["env"] = json!(["PATH=/none:/bin", "A=1", "A=2", "EMPTY="]);
        let (output, status) = sandbox.run(&spec)?;
        assert_eq!(status, 0, "{output}");
        let lines: Vec<_> = output.lines().collect();
        assert_eq!(lines[0], "/made/for/it");
        assert!(
            lines.contains(&"A=2") && !lines.contains(&"A=1"),
            "{output}"
        );
        assert!(lines.contains(&"EMPTY="), "{output}");
        assert_eq!(lines.last(), Some(&"zero two words"));
        assert!(
            !output.contains("CARGO"),
            "nothing of the agent's environment"
        );
        Ok(())
    });
}

#[test]
fn a_filter_denies_and_kills() {
    in_sandbox(|sandbox| {
        for no_new_privileges in [true, false] {
            let mut spec = spec(&["sh", "-c", "mkdir /tmp/x; hostname y; echo survived"]);
            spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
            spec["linux"]["seccomp"] = json!({
                "defaultAction": "SCMP_ACT_ALLOW",
                "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
                "flags": ["SECCOMP_FILTER_FLAG_LOG"],
                "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}],
            });
            let (output, status) = sandbox.run(&spec)?;
            assert!(output.contains("No space left"), "{output}");
            assert!(output.contains("survived") && status == 0, "{output}");
            spec["linux"]["seccomp"]["syscalls"][0] =
                json!({"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_KILL_PROCESS"});
            spec["process"]["args"] = json!(["mkdir", "/tmp/x"]);
            let (_, status) = sandbox.run(&spec)?;
            assert_eq!(status, 128 + libc::SIGSYS);
        }
        let mut spec = spec(&["true"]);
        spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_NOTIFY"});
        let error = sandbox.create("c1", &spec).err().unwrap();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        Ok(())
    });
}
