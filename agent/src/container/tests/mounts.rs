//! Mounts, masks, and what hostile images try with them.

use super::support::*;
use serde_json::json;
use std::os::unix::fs::symlink;

fn add(spec: &mut serde_json::Value, mount: serde_json::Value) {
    spec["mounts"].as_array_mut().unwrap().push(mount);
}

/// The mount options and propagation of a mount point in a container's mountinfo.
fn mount_of<'a>(mountinfo: &'a str, path: &str) -> Option<(&'a str, Vec<&'a str>)> {
    let line = mountinfo
        .lines()
        .rfind(|line| line.split(' ').nth(4) == Some(path))?;
    let words: Vec<_> = line.split(' ').collect();
    let separator = words.iter().position(|word| *word == "-").unwrap();
    Some((words[5], words[6..separator].to_vec()))
}

#[test]
fn the_usual_mounts_devices_and_masks() {
    in_sandbox(|sandbox| {
        let script = "cat /proc/self/mountinfo; stat -c '%n %F %t:%T %a' /dev/null /dev/tty;
            readlink /dev/fd; readlink /dev/ptmx; head -c 1 /proc/keys | wc -c; ls /sys/firmware | wc -l;
            cat /dev/null && echo null works; echo 1 > /proc/sys/net/ipv4/ip_forward || echo read-only";
        let (output, _) = sandbox.run(&spec(&["sh", "-c", script]))?;
        for (path, option) in [("/proc", "noexec"), ("/dev/shm", "nodev"), ("/sys", "ro")] {
            let (options, _) =
                mount_of(&output, path).unwrap_or_else(|| panic!("{path}: {output}"));
            assert!(options.split(',').any(|o| o == option), "{path}: {options}");
        }
        assert!(
            mount_of(&output, "/proc/sys").unwrap().0.starts_with("ro"),
            "{output}"
        );
        assert!(
            output.contains("/dev/null character special file 1:3 666"),
            "{output}"
        );
        assert!(
            output.contains("/dev/tty character special file 5:0 666"),
            "{output}"
        );
        assert!(output.contains("/proc/self/fd\npts/ptmx\n0\n"), "{output}");
        assert!(output.contains("null works"), "{output}");
        assert!(
            output.contains("read-only") || output.contains("nonexistent"),
            "{output}"
        );
        let outside = sandbox.dir.to_str().unwrap();
        let others: Vec<_> = output
            .lines()
            .filter(|l| l.split(' ').nth(4).is_some_and(|p| p.contains(outside)))
            .collect();
        assert!(others.is_empty(), "the guest's mounts are gone: {others:?}");
        Ok(())
    });
}

#[test]
fn binds_keep_their_options_and_propagation() {
    in_sandbox(|sandbox| {
        let volume = sandbox.dir.join("volume");
        with_tmpfs(&volume, || {
            std::fs::create_dir(volume.join("below")).unwrap();
            std::fs::write(volume.join("file"), "content\n").unwrap();
            with_tmpfs(&volume.join("below"), || {
                let mut spec = spec(&[
                    "sh",
                    "-c",
                    "cat /proc/self/mountinfo /etc/deep/file; \
                    touch /rw/new && touch /ro/below/new && ! touch /ro/new && ! touch /rro/below/new",
                ]);
                for (destination, options) in [
                    ("/rw", json!(["rbind", "nosuid", "rshared"])),
                    ("/ro", json!(["rbind", "ro", "rslave"])),
                    ("/rro", json!(["rbind", "rro", "noexec"])),
                ] {
                    add(
                        &mut spec,
                        json!({"destination": destination, "type": "bind", "source": volume, "options": options}),
                    );
                }
                add(
                    &mut spec,
                    json!({"destination": "/etc/deep/file", "source": volume.join("file"), "options": ["bind", "ro"]}),
                );
                let (output, status) = sandbox.run(&spec).unwrap();
                assert_eq!(status, 0, "{output}");
                assert!(
                    output.contains("content\n"),
                    "a file over a file made for it"
                );
                let (options, tags) = mount_of(&output, "/rw").unwrap();
                assert!(
                    options.contains("nosuid") && options.starts_with("rw"),
                    "{options}"
                );
                assert!(
                    tags.iter().any(|tag| tag.starts_with("shared:")),
                    "{tags:?}"
                );
                let (_, tags) = mount_of(&output, "/rro/below").unwrap();
                assert!(tags.is_empty(), "private by default: {tags:?}");
                let (options, _) = mount_of(&output, "/rro").unwrap();
                assert!(options.contains("noexec"), "{options}");
            });
        });
        Ok(())
    });
}

#[test]
fn mounts_of_the_guest_propagate_where_asked() {
    in_sandbox(|sandbox| {
        let volume = sandbox.dir.join("volume");
        with_tmpfs(&volume, || {
            let target = c_path(&volume);
            super::super::sys::mount(c"", &target, c"", libc::MS_SHARED, c"").unwrap();
            let mut spec = spec(&["sleep", "100"]);
            for (destination, option) in [("/slave", "rslave"), ("/private", "rprivate")] {
                add(
                    &mut spec,
                    json!({"destination": destination, "type": "bind", "source": volume, "options": ["rbind", option]}),
                );
            }
            let mut boxed = sandbox.create("c1", &spec).unwrap();
            boxed.container.start().unwrap();
            with_tmpfs(&volume.join("later"), || {
                std::fs::write(volume.join("later/file"), "").unwrap();
                let mut process = spec["process"].clone();
                process["args"] = json!([
                    "sh",
                    "-c",
                    "test -e /slave/later/file && ! test -e /private/later/file"
                ]);
                assert_eq!(boxed.exec(process).unwrap().1, 0);
            });
            boxed.container.kill_all(libc::SIGKILL).unwrap();
            boxed.wait();
            boxed.delete().unwrap();
        });
        Ok(())
    });
}

#[test]
fn a_read_only_root() {
    in_sandbox(|sandbox| {
        let mut spec = spec(&[
            "sh",
            "-c",
            "touch /x; touch /dev/shm/y && echo writable below; cat /proc/self/mountinfo",
        ]);
        spec["root"]["readonly"] = json!(true);
        spec["linux"]["rootfsPropagation"] = json!("rshared");
        let (output, _) = sandbox.run(&spec)?;
        assert!(output.contains("Read-only file system"), "{output}");
        assert!(output.contains("writable below"), "{output}");
        assert!(!sandbox.root().join("x").exists());
        let (options, tags) = mount_of(&output, "/").unwrap();
        assert!(options.starts_with("ro"), "{options}");
        assert!(
            tags.iter().any(|tag| tag.starts_with("shared:")),
            "{tags:?}"
        );
        Ok(())
    });
}

#[test]
fn links_of_an_image_lead_no_mount_outside() {
    in_sandbox(|sandbox| {
        let outside = sandbox.dir.join("outside");
        std::fs::create_dir(&outside)?;
        let root = sandbox.root();
        symlink(&outside, root.join("absolute"))?;
        symlink("../outside", root.join("relative"))?;
        symlink("/proc/self/root/../../outside", root.join("magic"))?;
        std::fs::remove_dir(root.join("dev"))?;
        symlink(&outside, root.join("dev"))?;
        let mut spec = spec(&["/bin/sh", "-c", "cat /proc/self/mountinfo"]);
        for name in ["absolute", "relative"] {
            add(
                &mut spec,
                json!({"destination": format!("/{name}/m"), "type": "tmpfs", "source": "t"}),
            );
        }
        let (output, status) = sandbox.run(&spec)?;
        assert_eq!(status, 0, "{output}");
        assert_eq!(
            std::fs::read_dir(&outside)?.count(),
            0,
            "nothing was made outside"
        );
        let expected = format!("{}/m", outside.display());
        assert!(
            mount_of(&output, &expected).is_some(),
            "followed inside the root: {output}"
        );
        assert!(
            mount_of(&output, "/outside/m").is_some(),
            "'..' stops at the root: {output}"
        );
        add(
            &mut spec,
            json!({"destination": "/magic/m", "type": "tmpfs", "source": "t"}),
        );
        let result = sandbox.run(&spec);
        assert_eq!(std::fs::read_dir(&outside)?.count(), 0, "{result:?}");
        Ok(())
    });
}

#[test]
fn devices_of_the_spec() {
    in_sandbox(|sandbox| {
        let mut spec = spec(&[
            "stat",
            "-c",
            "%n %F %t:%T %a %u:%g",
            "/dev/net/tun",
            "/dev/pipe",
        ]);
        spec["linux"]["devices"] = json!([
            {"path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200, "fileMode": 0o640, "uid": 5, "gid": 6},
            {"path": "/dev/pipe", "type": "p", "major": 0, "minor": 0},
        ]);
        let (output, status) = sandbox.run(&spec)?;
        assert_eq!(status, 0, "{output}");
        assert!(
            output.contains("/dev/net/tun character special file a:c8 640 5:6"),
            "{output}"
        );
        assert!(output.contains("/dev/pipe fifo"), "{output}");
        for path in ["/etc/x", "/dev/../etc/x", "/dev"] {
            spec["linux"]["devices"] = json!([{"path": path, "type": "c", "major": 1, "minor": 3}]);
            assert!(sandbox.create("c1", &spec).is_err(), "{path}");
        }
        Ok(())
    });
}
