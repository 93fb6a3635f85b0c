//! The file server at work: what programs do to files in a volume is what the host sees.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use super::pod::Pod;

/// A pod and a directory of the host that `run` binds at /v.
fn with_volume() -> Option<(Pod, std::path::PathBuf)> {
    let pod = Pod::boot("2")?;
    let dir = pod.host.path("volume");
    fs::create_dir(&dir).unwrap();
    Some((pod, dir))
}

#[track_caller]
fn run(pod: &Pod, dir: &std::path::Path, script: &str) -> String {
    let volume = format!("{}:/v", dir.display());
    pod.run(&["-v", &volume], &["sh", "-c", script])
        .expect_status(0)
        .stdout
}

#[test]
fn what_programs_do_to_files() {
    let Some((pod, dir)) = with_volume() else {
        return;
    };
    let script = "set -e; cd /v
        mkdir -p a/b; echo one > a/b/f; ln -s b/f a/link; ln a/b/f a/hard; cat a/link
        mv a/b/f a/moved; echo two >> a/hard; cat a/moved
        mkfifo a/fifo; chmod 4711 a/moved; chown 7:8 a/hard; touch -d '2001-02-03 04:05:06' a/b
        echo x > gone; (exec 3< gone; rm gone; cat <&3)
        dd if=/dev/zero of=sparse bs=1 seek=1048575 count=1 2>/dev/null; truncate -s 4096 sparse
        ls a";
    let said = run(&pod, &dir, script);
    assert_eq!(said, "one\none\ntwo\nx\nb\nfifo\nhard\nlink\nmoved\n");
    let moved = fs::metadata(dir.join("a/moved")).unwrap();
    // A change of owner clears the set-user-id bit of a program.
    assert_eq!(moved.permissions().mode() & 0o7777, 0o711);
    assert_eq!((moved.uid(), moved.gid(), moved.nlink()), (7, 8, 2));
    assert_eq!(
        fs::read_link(dir.join("a/link")).unwrap().to_str(),
        Some("b/f")
    );
    assert_eq!(fs::metadata(dir.join("sparse")).unwrap().len(), 4096);
    assert!(!dir.join("gone").exists());
    pod.end();
}

#[test]
fn many_files_and_a_large_one() {
    let Some((pod, dir)) = with_volume() else {
        return;
    };
    let script = "set -e; cd /v; mkdir many; i=0
        while [ $i -lt 1000 ]; do : > many/$i; i=$((i+1)); done
        ls many | wc -l; rm -r many
        dd if=/dev/zero bs=1M count=64 2>/dev/null | tr '\\0' x > large; md5sum < large | cut -d' ' -f1; sync";
    let said = run(&pod, &dir, script);
    let lines: Vec<_> = said.lines().map(str::trim).collect();
    assert_eq!(lines[0], "1000");
    assert!(!dir.join("many").exists());
    let large = fs::read(dir.join("large")).unwrap();
    assert_eq!(large.len(), 64 << 20);
    assert!(large.iter().all(|byte| *byte == b'x'));
    pod.end();
}
