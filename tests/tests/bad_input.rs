//! Input that is wrong gets one clear line, exit status 125, and leaves nothing. No guest boots in this suite, but where the
//! failure is the machine's, it comes after everything before it has been made.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use cella_tests::image::{archive, entry, layout_of};
use cella_tests::{Host, finish, not_built, skip};

/// A host with everything that these tests need, unless the machine lacks something.
fn host() -> Option<Host> {
    let missing = match rustix::process::geteuid().is_root() {
        true => not_built(),
        false => Some("root".into()),
    };
    match missing {
        Some(missing) => {
            skip(&missing);
            None
        }
        None => Some(Host::new()),
    }
}

/// Runs an image that cannot be run.
#[track_caller]
fn refused(host: &Host, image: &str, words: &[&str]) {
    host.cella(&["run", image, "true"]).expect_failure(words);
    host.assert_clean();
}

fn layout(host: &Host) -> PathBuf {
    PathBuf::from(host.busybox().strip_prefix("oci:").unwrap())
}

/// The largest blob of a layout: the layer.
fn layer(layout: &Path) -> PathBuf {
    let blobs = fs::read_dir(layout.join("blobs/sha256")).unwrap();
    blobs
        .map(|entry| entry.unwrap().path())
        .max_by_key(|path| fs::metadata(path).unwrap().len())
        .unwrap()
}

#[test]
fn images_that_are_not_there_or_not_whole() {
    let Some(host) = host() else { return };
    refused(&host, "oci:/nonexistent/image", &["/nonexistent/image"]);
    refused(&host, "rootfs:/nonexistent", &["/nonexistent"]);
    refused(&host, "oci-archive:/nonexistent.tar", &["/nonexistent.tar"]);
    refused(&host, "docker-archive:/etc/hostname", &["/etc/hostname"]);
    refused(&host, "what is this", &["what is this"]);
    let layout = layout(&host);
    refused(
        &host,
        &format!("oci:{}:no-such-tag", layout.display()),
        &["no-such-tag"],
    );

    let layer = layer(&layout);
    let whole = fs::read(&layer).unwrap();
    let digest = layer.file_name().unwrap().to_str().unwrap();
    fs::write(&layer, &whole[..whole.len() / 2]).unwrap();
    refused(&host, &host.busybox(), &[digest]);
    let mut wrong = whole.clone();
    let middle = wrong.len() / 2;
    wrong[middle] ^= 1;
    fs::write(&layer, &wrong).unwrap();
    refused(&host, &host.busybox(), &[digest]);
    fs::remove_file(&layer).unwrap();
    refused(&host, &host.busybox(), &[digest]);
    fs::write(layout.join("index.json"), "{\"schemaVersion\":").unwrap();
    refused(&host, &host.busybox(), &["index.json"]);
}

#[test]
fn layers_that_try_to_leave_their_directory() {
    let Some(host) = host() else { return };
    let target = host.path("outside");
    let outside = target.to_str().unwrap();
    let up = format!("{}{outside}", "../".repeat(20).trim_end_matches('/'));
    let cases: [(&str, Vec<Vec<u8>>); 4] = [
        ("dotdot", vec![entry(&up, b'0', "", b"x")]),
        (
            "hardlink",
            vec![entry(
                "link",
                b'1',
                "../../../../../../../../../etc/passwd",
                b"",
            )],
        ),
        (
            "through-symlink",
            vec![
                entry("dir", b'2', host.path("").to_str().unwrap(), b""),
                entry("dir/outside", b'0', "", b"x"),
            ],
        ),
        ("absolute", vec![entry(outside, b'0', "", b"x")]),
    ];
    for (name, entries) in cases {
        let image = layout_of(&host.path(name), "{}", &archive(&entries));
        // A contained entry (an absolute path, as docker reads it) lets the image be made: then its command is missing, or
        // the virtual machine; either way the run fails before it could have any other end.
        let mut command = host.command(&["run", &image, "true"]);
        command.env("CELLA_LIBEXEC_DIR", "/nonexistent");
        finish(command.spawn().unwrap(), b"").expect_failure(&[]);
        assert!(!target.exists(), "{name} wrote outside of its layer");
        host.assert_clean();
    }
}

#[test]
fn bundles_that_are_malformed() {
    let Some(host) = host() else { return };
    let bundle = host.path("bundle");
    let image = format!("bundle:{}", bundle.display());
    fs::create_dir_all(bundle.join("rootfs")).unwrap();
    refused(&host, &image, &["config.json"]);
    for (config, word) in [
        ("not json", "config.json"),
        ("{}", "config.json"),
        (
            "{\"ociVersion\":\"1.0.2\",\"root\":{\"path\":\"nowhere\"},\"process\":{\"cwd\":\"/\",\"args\":[\"x\"],\"user\":{\"uid\":0,\"gid\":0}}}",
            "nowhere",
        ),
    ] {
        fs::write(bundle.join("config.json"), config).unwrap();
        refused(&host, &image, &[word]);
    }
}

#[test]
fn options_that_make_no_sense() {
    let Some(host) = host() else { return };
    let image = host.busybox();
    let cases: [(&[&str], &str); 10] = [
        (&["run", "--memory", "1M"], "memory"),
        (&["run", "--memory", "lots"], "lots"),
        (&["run", "--cpus", "0"], "CPUs"),
        (&["run", "--cpus", "33"], "CPUs"),
        (&["run", "--volume", "/tmp"], "/tmp"),
        (&["run", "--volume", "/no/such:/x"], "/no/such"),
        (&["run", "--name", "../x"], "../x"),
        (&["run", "--pod", "a/b"], "a/b"),
        (&["run", "-i", "-d"], "-d"),
        (&["run", "--netns", "/x"], "network namespace /x"),
    ];
    for (args, word) in cases {
        let args: Vec<_> = args
            .iter()
            .copied()
            .chain([image.as_str(), "true"])
            .collect();
        host.cella(&args).expect_failure(&[word]);
        host.assert_clean();
    }
}

#[test]
fn ids_that_do_not_exist() {
    let Some(host) = host() else { return };
    for args in [
        &["exec", "nobody", "true"][..],
        &["stop", "nobody"],
        &["kill", "nobody"],
        &["rm", "nobody"],
        &["logs", "nobody"],
        &["stats", "nobody"],
    ] {
        host.cella(args).expect_failure(&["nobody"]);
    }
    host.assert_clean();
}

#[test]
fn no_guest_kernel_and_no_vmm() {
    let Some(host) = host() else { return };
    let image = host.busybox();
    for missing in ["vmlinux", "initrd.cpio", "cella-vmm"] {
        let libexec = host.path("libexec");
        let _ = fs::remove_dir_all(&libexec);
        fs::create_dir(&libexec).unwrap();
        for file in ["vmlinux", "initrd.cpio", "cella-vmm"] {
            if file != missing {
                std::os::unix::fs::symlink(cella_tests::libexec().join(file), libexec.join(file))
                    .unwrap();
            }
        }
        let mut command = host.command(&["run", &image, "true"]);
        command.env("CELLA_LIBEXEC_DIR", &libexec);
        finish(command.spawn().unwrap(), b"").expect_failure(&[missing]);
        host.assert_clean();
    }
}

#[test]
fn no_kvm_and_no_right_to_it() {
    let Some(host) = host() else { return };
    if !Path::new("/dev/kvm").exists() {
        return skip("/dev/kvm to hide");
    }
    let image = host.busybox();
    // In a mount namespace of its own: an empty file in the place of the device, then nothing at all.
    let absent = "mount -t tmpfs none /dev && exec \"$@\"";
    let useless = "mount --bind /dev/null /dev/kvm && exec \"$@\"";
    // Root may open everything, but for devices on a mount where nobody may.
    let denied =
        "mount --bind /dev/kvm /dev/kvm && mount -o remount,bind,nodev /dev/kvm && exec \"$@\"";
    for (hide, why) in [
        (absent, "No such file"),
        (useless, "Inappropriate ioctl"),
        (denied, "Permission denied"),
    ] {
        let cella = cella_tests::cella_binary();
        let mut command = Command::new("unshare");
        command
            .args(["-m", "sh", "-c", hide, "sh"])
            .arg(cella)
            .args(["run", "--hypervisor", "kvm", &image, "true"]);
        host.on_this_host(&mut command);
        command.stdin(Stdio::null());
        finish(command.spawn().unwrap(), b"").expect_failure(&["kvm", why]);
        host.assert_clean();
    }
}

#[test]
fn configuration_that_is_wrong() {
    let Some(host) = host() else { return };
    let config = host.path("config.toml");
    fs::write(&config, "memroy = \"1G\"").unwrap();
    let image = host.busybox();
    let config = config.to_str().unwrap();
    host.cella(&["run", "--config", config, &image, "true"])
        .expect_failure(&["config.toml", "memroy"]);
    host.assert_clean();
}

#[test]
fn every_command_has_help_with_an_example() {
    let Some(host) = host() else { return };
    for command in [
        "run", "exec", "ps", "stop", "kill", "rm", "logs", "stats", "check", "gc", "bench",
    ] {
        let said = host.cella(&[command, "--help"]).expect_status(0);
        assert!(
            said.stdout.contains("Example:"),
            "{command}: {}",
            said.stdout
        );
    }
    for shell in ["bash", "fish", "zsh"] {
        let said = host.cella(&["completions", shell]).expect_status(0);
        assert!(
            said.stdout.contains("--timeline") || said.stdout.contains("l timeline"),
            "{shell}"
        );
    }
    let man = host.path("man");
    fs::create_dir(&man).unwrap();
    host.cella(&["man", man.to_str().unwrap()]).expect_status(0);
    for (page, word) in [
        ("cella.1", "virtual machine"),
        ("cella-run.1", "Example:"),
        ("cella-bench-stdio.1", "Example:"),
    ] {
        let text = fs::read_to_string(man.join(page)).unwrap();
        assert!(text.contains(word), "{page}: {text}");
    }
}
