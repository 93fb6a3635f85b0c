//! What fails keeps its kind, and leaves nothing.

use super::support::*;
use serde_json::json;

/// The error of a container that cannot be created.
fn refused(sandbox: &Sandbox, change: impl FnOnce(&mut serde_json::Value)) -> Error {
    let mut spec = spec(&["true"]);
    change(&mut spec);
    match sandbox.create("c1", &spec) {
        Ok(_) => panic!("it was created"),
        Err(error) => {
            assert!(
                !sandbox.cgroup("c1").exists(),
                "{error}: the cgroup is left"
            );
            // SAFETY: looks for children without taking anything else's.
            let left = unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) };
            assert_eq!(left, -1, "{error}: a process is left");
            error
        }
    }
}

#[test]
fn commands_that_are_not_there_or_not_executable() {
    in_sandbox(|sandbox| {
        let args = |args: serde_json::Value| refused(sandbox, |s| s["process"]["args"] = args);
        for command in ["nothing", "/bin/nothing", "/etc/plain/x"] {
            let error = args(json!([command]));
            assert_eq!(error.kind(), Kind::NotFound, "{error}");
            assert!(error.to_string().contains(command), "{error}");
        }
        for command in ["/etc/plain", "/bin", "/proc/self/exe"] {
            let error = args(json!([command]));
            assert_eq!(error.kind(), Kind::PermissionDenied, "{command}: {error}");
        }
        // Found and executable, yet the kernel will not execute them.
        let program = |name: &str, content: &str| {
            use std::os::unix::fs::PermissionsExt;
            let path = sandbox.root().join(name);
            std::fs::write(&path, content).unwrap();
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        };
        program("nonsense", "garbage");
        program("orphan", "#!/no/such/interpreter\n");
        assert_eq!(
            sandbox.run(&spec(&["/nonsense"])).unwrap_err().kind(),
            Kind::PermissionDenied
        );
        assert_eq!(
            sandbox.run(&spec(&["/orphan"])).unwrap_err().kind(),
            Kind::NotFound
        );
        assert_eq!(args(json!([])).kind(), Kind::InvalidArgument);
        assert_eq!(args(json!([""])).kind(), Kind::InvalidArgument);
        Ok(())
    });
}

#[test]
fn a_user_who_may_not_execute_is_denied() {
    in_sandbox(|sandbox| {
        use std::os::unix::fs::PermissionsExt;
        let path = sandbox.root().join("bin/private");
        std::fs::copy(sandbox.root().join("bin/busybox"), &path)?;
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o700))?;
        let error = refused(sandbox, |s| {
            s["process"]["args"] = json!(["private"]);
            s["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        });
        assert_eq!(error.kind(), Kind::PermissionDenied, "{error}");
        Ok(())
    });
}

#[test]
fn bad_mounts_name_their_destination() {
    in_sandbox(|sandbox| {
        let mount = |mount: serde_json::Value| {
            let error = refused(sandbox, |s| s["mounts"].as_array_mut().unwrap().push(mount));
            assert_eq!(error.kind(), Kind::InvalidArgument, "{error}");
            error
        };
        let error = mount(
            json!({"destination": "/data", "type": "bind", "source": "/no/such",
            "options": ["rbind"]}),
        );
        assert!(error.to_string().contains("/data") && error.to_string().contains("/no/such"));
        let error = mount(json!({"destination": "/data", "type": "nosuchfs", "source": "x"}));
        assert!(error.to_string().contains("/data"), "{error}");
        let error = mount(json!({"destination": "/etc/plain", "type": "tmpfs", "source": "x"}));
        assert!(error.to_string().contains("/etc/plain"), "{error}");
        mount(json!({"destination": "/data", "type": "tmpfs", "options": ["size=nonsense"]}));
        mount(json!({"destination": "relative", "type": "tmpfs"}));
        mount(json!({"destination": "/", "type": "tmpfs"}));
        mount(json!({"destination": "/a/../b", "type": "tmpfs"}));
        mount(json!({"destination": "/data", "type": "tmpfs", "options": ["tmpcopyup"]}));
        mount(
            json!({"destination": "/data", "type": "bind", "source": "rel", "options": ["bind"]}),
        );
        Ok(())
    });
}

#[test]
fn bad_roots_cwds_users_and_limits() {
    in_sandbox(|sandbox| {
        let error = refused(sandbox, |s| s["root"]["path"] = json!("/no/such/root"));
        assert!(matches!(error, Error::Rootfs { .. }), "{error}");
        let file = sandbox.root().join("etc/plain");
        let error = refused(sandbox, |s| s["root"]["path"] = json!(file));
        assert!(matches!(error, Error::Rootfs { .. }), "{error}");
        let error = refused(sandbox, |s| s["process"]["cwd"] = json!("/etc/plain"));
        assert!(matches!(error, Error::WorkingDirectory { .. }), "{error}");
        assert!(error.to_string().contains("/etc/plain"), "{error}");
        let error = refused(sandbox, |s| s["process"]["cwd"] = json!("relative"));
        assert_eq!(error.kind(), Kind::InvalidArgument);
        let error = refused(sandbox, |s| {
            s["process"]["user"] = json!({"uid": 4294967295u32, "gid": 0});
        });
        assert_eq!(
            error.kind(),
            Kind::InvalidArgument,
            "to the kernel it means: no change"
        );
        let error = refused(sandbox, |s| {
            s["linux"]["resources"] = json!({"unified": {"no.such": "1"}});
        });
        assert!(matches!(error, Error::Cgroup { .. }), "{error}");
        let error = refused(sandbox, |s| {
            s["process"]["rlimits"] =
                json!([{"type": "RLIMIT_NOFILE", "soft": 1u64 << 40, "hard": 1u64 << 40}]);
        });
        assert!(error.to_string().contains("rlimit"), "{error}");
        let error = refused(sandbox, |s| {
            s["linux"]["sysctl"] = json!({"net.no.such": "1"})
        });
        assert!(error.to_string().contains("no/such"), "{error}");
        Ok(())
    });
}

#[test]
fn an_id_whose_cgroup_is_in_use_is_refused() {
    in_sandbox(|sandbox| {
        let first = sandbox.create("c1", &spec(&["true"]))?;
        let error = sandbox.create("c1", &spec(&["true"])).err().unwrap();
        assert!(matches!(error, Error::Cgroup { .. }), "{error}");
        assert_eq!(
            first.container.pids()?,
            [first.container.pid()],
            "the first is untouched"
        );
        assert!(sandbox.create("../c1", &spec(&["true"])).is_err());
        first.delete()
    });
}
