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

use cella_tests::{Host, finish, not_built, skip};
use sha2::{Digest, Sha256};

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

/// Makes a layout whose only layer is this tar archive.
fn layout_of(dir: &Path, layer: &[u8]) -> String {
    let blobs = dir.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let put = |bytes: &[u8]| {
        let digest = hex(&Sha256::digest(bytes));
        fs::write(blobs.join(&digest), bytes).unwrap();
        format!("\"digest\":\"sha256:{digest}\",\"size\":{}", bytes.len())
    };
    let diff = hex(&Sha256::digest(layer));
    let config = format!(
        "{{\"architecture\":\"amd64\",\"os\":\"linux\",\"config\":{{}},\"rootfs\":{{\"type\":\"layers\",\"diff_ids\":[\"sha256:{diff}\"]}}}}"
    );
    let media = "application/vnd.oci.image";
    let manifest = format!(
        "{{\"schemaVersion\":2,\"config\":{{\"mediaType\":\"{media}.config.v1+json\",{}}},\"layers\":[{{\"mediaType\":\"{media}.layer.v1.tar\",{}}}]}}",
        put(config.as_bytes()),
        put(layer)
    );
    let index = format!(
        "{{\"schemaVersion\":2,\"manifests\":[{{\"mediaType\":\"{media}.manifest.v1+json\",{}}}]}}",
        put(manifest.as_bytes())
    );
    fs::write(dir.join("index.json"), index).unwrap();
    fs::write(dir.join("oci-layout"), "{\"imageLayoutVersion\":\"1.0.0\"}").unwrap();
    format!("oci:{}", dir.display())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// One entry of a tar archive, by hand: the tools refuse to write such names.
fn entry(name: &str, kind: u8, link: &str, content: &[u8]) -> Vec<u8> {
    let mut header = [0_u8; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[100..108].copy_from_slice(b"0000755\0");
    header[108..116].copy_from_slice(b"0000000\0");
    header[116..124].copy_from_slice(b"0000000\0");
    header[124..136].copy_from_slice(format!("{:011o}\0", content.len()).as_bytes());
    header[136..148].copy_from_slice(b"00000000000\0");
    header[148..156].copy_from_slice(b"        ");
    header[156] = kind;
    header[157..157 + link.len()].copy_from_slice(link.as_bytes());
    header[257..265].copy_from_slice(b"ustar\x0000");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut out = header.to_vec();
    out.extend_from_slice(content);
    out.resize(out.len().next_multiple_of(512), 0);
    out
}

fn archive(entries: &[Vec<u8>]) -> Vec<u8> {
    let mut out = entries.concat();
    out.resize(out.len() + 1024, 0);
    out
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
        let image = layout_of(&host.path(name), &archive(&entries));
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
    for hide in [absent, useless] {
        let cella = cella_tests::cella_binary();
        let mut command = Command::new("unshare");
        command
            .args(["-m", "sh", "-c", hide, "sh"])
            .arg(cella)
            .args(["run", "--hypervisor", "kvm", &image, "true"]);
        host.on_this_host(&mut command);
        command.stdin(Stdio::null());
        finish(command.spawn().unwrap(), b"").expect_failure(&["kvm"]);
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
    let said = host.cella(&["completions", "bash"]).expect_status(0);
    assert!(said.stdout.contains("_cella"));
}
