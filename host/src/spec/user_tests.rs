use std::os::unix::fs::symlink;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::error::ErrorKind;

const PASSWD: &str = "\
root:x:0:0:root:/root:/bin/sh
# comment:x:7:7::/:/bin/sh
broken:x:
notanumber:x:zero:zero::/:/bin/sh
app:x:1000:1000:App:/home/app:/bin/sh
nohome:x:1001:1002
1234:x:55:56::/named:/bin/sh
twice:x:60:61::/first:/bin/sh
twice:x:62:63::/second:/bin/sh
";
const GROUP: &str = "\
root:x:0:root
app:x:1000:
wheel:x:10:root, app
video:x:44:app,other
again:x:44:app
4321:x:77:
bad:x:many:app
";

fn user(uid: u32, groups: &[u32], home: &str) -> ResolvedUser {
    let gid = groups[0];
    let (groups, home) = (groups.to_vec(), home.to_owned());
    ResolvedUser {
        uid,
        gid,
        groups,
        home,
    }
}

/// The error's kind and message.
fn refused(text: &str) -> (ErrorKind, String) {
    let error = resolve_in(text, PASSWD, GROUP).unwrap_err();
    (error.kind(), error.to_string())
}

#[test]
fn users_are_found_as_docker_finds_them() {
    for (text, expected) in [
        ("", user(0, &[0, 10], "/root")),
        ("0", user(0, &[0, 10], "/root")),
        ("root", user(0, &[0, 10], "/root")),
        ("app", user(1000, &[1000, 10, 44], "/home/app")),
        ("1000", user(1000, &[1000, 10, 44], "/home/app")),
        ("app:", user(1000, &[1000, 10, 44], "/home/app")),
        // With a group, only that.
        ("app:wheel", user(1000, &[10], "/home/app")),
        ("app:7", user(1000, &[7], "/home/app")),
        ("1000:7", user(1000, &[7], "/home/app")),
        (":video", user(0, &[44], "/root")),
        // An id needs no entry, and has then no home and no groups but root's.
        ("4000", user(4000, &[0], "/")),
        ("4000:4000", user(4000, &[4000], "/")),
        ("2147483647", user(2_147_483_647, &[0], "/")),
        ("nohome", user(1001, &[1002], "/")),
        // A name of digits is a name first.
        ("1234", user(55, &[56], "/named")),
        ("app:4321", user(1000, &[77], "/home/app")),
        ("twice", user(60, &[61], "/first")),
    ] {
        assert_eq!(
            resolve_in(text, PASSWD, GROUP).unwrap(),
            expected,
            "{text:?}"
        );
    }
}

#[test]
fn who_is_not_there_is_named() {
    let (kind, message) = refused("nobody");
    assert_eq!(kind, ErrorKind::NotFound);
    assert!(message.contains("\"nobody\"") && message.contains("/etc/passwd"));
    let (kind, message) = refused("app:ghosts");
    assert_eq!(kind, ErrorKind::NotFound);
    assert!(message.contains("\"ghosts\"") && message.contains("/etc/group"));
    for text in [
        "2147483648",
        "99999999999999999999999",
        "app:4294967295",
        "0:4294967296",
    ] {
        let (kind, message) = refused(text);
        assert_eq!(kind, ErrorKind::InvalidArgument, "{message}");
        assert!(message.contains("larger than 2147483647"), "{message}");
    }
    // What looks like a number and is none is a name; a sign or a space makes no other user of it.
    for text in ["-1", "+0", " 0", "0x0", "root ", "Root"] {
        assert_eq!(refused(text).0, ErrorKind::NotFound, "{text:?}");
    }
}

#[test]
fn a_line_that_cannot_be_read_is_nobody() {
    for text in ["broken", "notanumber", "# comment", "comment"] {
        assert_eq!(refused(text).0, ErrorKind::NotFound, "{text:?}");
    }
    let passwd = "big:x:4294967295:0::/:\nsigned:x:-1:0::/:\nempty:x:::/:\n:x:0:0::/:\n";
    for name in ["big", "signed", "empty"] {
        let error = resolve_in(name, passwd, "").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{name}");
    }
}

#[test]
fn memberships_have_a_limit() {
    let groups = |count: u32| {
        (1..=count)
            .map(|gid| format!("g{gid}:x:{gid}:app\n"))
            .collect::<String>()
    };
    // The primary group is one of them and is listed, too.
    let most = resolve_in("app", PASSWD, &groups(65536)).unwrap();
    assert_eq!(most.groups.len(), 65536);
    let error = resolve_in("app", PASSWD, &groups(65537)).unwrap_err();
    assert!(
        error.to_string().contains("more than 65536 groups"),
        "{error}"
    );
}

/// A root file system with what is given as `/etc/passwd` and `/etc/group`.
fn rootfs(passwd: &[u8], group: &[u8]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("etc")).unwrap();
    std::fs::write(dir.path().join("etc/passwd"), passwd).unwrap();
    std::fs::write(dir.path().join("etc/group"), group).unwrap();
    dir
}

#[test]
fn the_files_are_those_of_the_root_file_system() {
    let dir = rootfs(PASSWD.as_bytes(), GROUP.as_bytes());
    assert_eq!(
        resolve("app", dir.path()).unwrap(),
        user(1000, &[1000, 10, 44], "/home/app")
    );
    // Without the files there are no names, but ids are as good.
    let empty = tempfile::tempdir().unwrap();
    assert_eq!(resolve("", empty.path()).unwrap(), user(0, &[0], "/"));
    assert_eq!(
        resolve("root", empty.path()).unwrap_err().kind(),
        ErrorKind::NotFound
    );
    std::fs::write(empty.path().join("etc"), "a file").unwrap();
    assert_eq!(resolve("5:6", empty.path()).unwrap(), user(5, &[6], "/"));
    let error = resolve("0", &empty.path().join("gone")).unwrap_err();
    assert!(error.to_string().contains("gone"), "{error}");
}

#[test]
fn links_do_not_lead_out_of_the_root_file_system() {
    let outer = tempfile::tempdir().unwrap();
    let root = outer.path().join("a/rootfs");
    std::fs::create_dir_all(root.join("etc")).unwrap();
    let outside = outer.path().join("passwd");
    std::fs::write(&outside, "spy:x:666:666::/:\n").unwrap();
    let link = root.join("etc/passwd");
    for target in [
        outside.clone(),
        "../../../passwd".into(),
        "/../../../../passwd".into(),
        format!("/proc/self/root{}", outside.display()).into(),
    ] {
        symlink(&target, &link).unwrap();
        let error = resolve("spy", &root).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{}", target.display());
        std::fs::remove_file(&link).unwrap();
    }
    // One that stays inside is followed as in the container: from its root.
    std::fs::create_dir(root.join("usr")).unwrap();
    std::fs::write(root.join("usr/passwd"), PASSWD).unwrap();
    symlink("/usr/passwd", &link).unwrap();
    assert_eq!(resolve("app", &root).unwrap().uid, 1000);
    // A loop, and a directory of /etc that is a link.
    std::fs::remove_file(&link).unwrap();
    symlink("passwd", &link).unwrap();
    let error = resolve("app", &root).unwrap_err();
    assert!(error.to_string().contains("etc/passwd"), "{error}");
    std::fs::remove_dir_all(root.join("etc")).unwrap();
    symlink(outer.path(), root.join("etc")).unwrap();
    assert_eq!(
        resolve("spy", &root).unwrap_err().kind(),
        ErrorKind::NotFound
    );
}

#[test]
fn hostile_files_are_refused_or_read_as_far_as_they_go() {
    // Binary, and lines of any length: what is a line in it still counts.
    let mut bytes: Vec<u8> = (0..=255).cycle().take(100_000).collect();
    bytes.extend(b"\nroot:\xff\xfe:0:0::/r\xc3\x28:\nwide:x:9:9");
    bytes.extend(std::iter::repeat_n(b':', 1_000_000));
    let dir = rootfs(&bytes, &bytes);
    assert_eq!(resolve("wide", dir.path()).unwrap().uid, 9);
    assert_eq!(resolve("root", dir.path()).unwrap().uid, 0);

    let refused = |what: &str| {
        let error = resolve("root", dir.path()).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("etc/passwd") && text.contains(what), "{text}");
        error.kind()
    };
    // Larger than the cap; sparse, so that nothing is written.
    let path = dir.path().join("etc/passwd");
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(1 << 40).unwrap();
    assert_eq!(refused("8388608 bytes"), ErrorKind::ResourceExhausted);
    std::fs::remove_file(&path).unwrap();
    // Something else than a file: a pipe without a writer must not be waited for.
    rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::Fifo, Mode::RUSR, 0).unwrap();
    assert_eq!(refused("not a regular file"), ErrorKind::InvalidArgument);
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    assert_eq!(refused("not a regular file"), ErrorKind::InvalidArgument);
}

proptest! {
    #[test]
    fn any_text_and_any_files_give_a_user_or_one_line(
        text in "\\PC{0,20}|[a-z0-9:]{0,12}|.{0,20}",
        passwd in "(\\PC{0,30}\n|[a-z0-9]{0,4}:x:[0-9]{0,11}:[0-9]{0,11}:[a-z]{0,3}:[a-z/]{0,5}\n){0,6}",
        group in "(\\PC{0,30}\n|[a-z0-9]{0,4}:x:[0-9]{0,11}:[a-z0-9,]{0,9}\n){0,6}",
    ) {
        match resolve_in(&text, &passwd, &group) {
            Ok(user) => {
                prop_assert!(user.uid <= MAX_ID);
                prop_assert_eq!(user.groups.first(), Some(&user.gid));
                prop_assert!(user.groups.iter().all(|gid| *gid <= MAX_ID));
                prop_assert!(!user.home.is_empty());
            }
            Err(error) => prop_assert!(!error.chain().contains('\n')),
        }
    }

    #[test]
    fn ids_pass_unchanged(uid in 0..=MAX_ID, gid in 0..=MAX_ID) {
        let user = resolve_in(&format!("{uid}:{gid}"), "", "").unwrap();
        prop_assert_eq!((user.uid, user.gid, user.groups), (uid, gid, vec![gid]));
    }
}
