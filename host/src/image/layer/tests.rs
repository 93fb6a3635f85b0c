use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::path::PathBuf;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::error::ErrorKind;
use crate::image::testing::{Tar, gzip, is_root, zstd};

struct Place {
    dir: TempDir,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["fs", "trash", "outside"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        std::fs::write(dir.path().join("outside/secret"), "untouched").unwrap();
        Self { dir }
    }

    fn fs(&self) -> PathBuf {
        self.dir.path().join("fs")
    }

    fn unpack(&self, tar: Tar) -> Result<()> {
        let bytes = tar.finish();
        let diff_id = Sha256Digest::of(&bytes);
        self.unpack_blob(&bytes, &Expected::default(), &diff_id)
    }

    fn unpack_blob(&self, blob: &[u8], expected: &Expected, diff_id: &Sha256Digest) -> Result<()> {
        let dirs = (self.fs(), self.dir.path().join("trash"));
        unpack(
            blob,
            expected,
            diff_id,
            (&dirs.0, &dirs.1),
            &Limits::default(),
        )
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.fs().join(name)).unwrap()
    }

    fn meta(&self, name: &str) -> std::fs::Metadata {
        std::fs::symlink_metadata(self.fs().join(name)).unwrap()
    }

    /// That nothing beside the layer's own directory changed.
    fn assert_contained(&self) {
        let names: Vec<_> = std::fs::read_dir(self.dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(names.len(), 3, "{names:?}");
        let outside = self.dir.path().join("outside");
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 1);
        assert_eq!(
            std::fs::read_to_string(outside.join("secret")).unwrap(),
            "untouched"
        );
        assert_eq!(
            std::fs::metadata(outside.join("secret")).unwrap().nlink(),
            1
        );
    }
}

fn refused(tar: Tar, entry: &str, reason: &str) {
    let place = Place::new();
    let error = place.unpack(tar).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
    let text = error.to_string();
    assert!(
        text.contains(&format!("entry {entry:?}")) && text.contains(reason),
        "{text}"
    );
    assert!(!text.contains('\n'));
    place.assert_contained();
}

fn xattr(path: &Path, name: &str) -> Option<Vec<u8>> {
    let mut value = vec![0; 256];
    let length = rustix::fs::lgetxattr(path, name, &mut value).ok()?;
    value.truncate(length);
    Some(value)
}

#[test]
fn all_kinds_of_entries() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let tar = Tar::new()
        .dir("./", 0o711)
        .dir("tmp/", 0o1777)
        .pax(&[("uid", b"1000"), ("gid", b"2000"), ("mtime", b"12345.5")])
        .raw("bin/su", b'0', "", 0o4755, b"program")
        .pax(&[
            ("SCHILY.xattr.security.capability", &capability),
            ("SCHILY.xattr.user.note", b"kept"),
            ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
            ("SCHILY.xattr.security.selinux", b"x"),
        ])
        .file("bin/ping", b"")
        .symlink("bin/sh", "/bin/busybox")
        .hard_link("bin/su2", "/bin/su")
        .device("null", b'3', 1, 3)
        .device("disk", b'4', 8, 1)
        .raw("fifo", b'6', "", 0o640, b"");
    place.unpack(tar).unwrap();
    assert_eq!(place.meta("").mode() & 0o7777, 0o711);
    assert_eq!(place.meta("tmp").mode() & 0o7777, 0o1777);
    assert_eq!(place.meta("tmp").mtime(), 1_000_000_000);
    let su = place.meta("bin/su");
    assert_eq!(
        (su.mode() & 0o7777, su.uid(), su.gid()),
        (0o4755, 1000, 2000)
    );
    assert_eq!(
        (su.mtime(), su.mtime_nsec(), su.nlink()),
        (12345, 500_000_000, 2)
    );
    assert_eq!(place.read("bin/su2"), "program");
    let ping = place.fs().join("bin/ping");
    assert_eq!(
        xattr(&ping, "security.capability").as_deref(),
        Some(&capability[..])
    );
    assert_eq!(xattr(&ping, "trusted.overlay.redirect"), None);
    assert_eq!(
        std::fs::read_link(place.fs().join("bin/sh")).unwrap(),
        Path::new("/bin/busybox")
    );
    let (null, disk) = (place.meta("null"), place.meta("disk"));
    assert!(null.file_type().is_char_device() && null.rdev() == rustix::fs::makedev(1, 3));
    assert!(disk.file_type().is_block_device() && disk.rdev() == rustix::fs::makedev(8, 1));
    assert_eq!(null.mode() & 0o7777, 0o620);
    assert!(place.meta("fifo").file_type().is_fifo());
    place.assert_contained();
}

#[test]
fn a_directorys_time_is_its_own_entrys_in_any_order() {
    let place = Place::new();
    place
        .unpack(
            Tar::new()
                .dir("a", 0o755)
                .file("a/b", b"")
                .hard_link("a/c", "a/b"),
        )
        .unwrap();
    assert_eq!(place.meta("a").mtime(), 1_000_000_000);
}

#[test]
fn names_that_climb_are_refused() {
    refused(
        Tar::new().file("../outside/x", b"x"),
        "../outside/x",
        "out of the layer",
    );
    refused(
        Tar::new().file("a/../../outside/x", b"x"),
        "a/../../outside/x",
        "out of the layer",
    );
    refused(Tar::new().dir("..", 0o755), "..", "out of the layer");
    refused(Tar::new().symlink("../l", "x"), "../l", "out of the layer");
    refused(
        Tar::new().file("../.wh.x", b""),
        "../.wh.x",
        "out of the layer",
    );
}

#[test]
fn absolute_names_and_inner_dots_stay_inside() {
    let place = Place::new();
    let outside = place.dir.path().join("outside/secret");
    let name = outside.to_str().unwrap();
    place
        .unpack(Tar::new().file(name, b"inside").file("a/./b/../c", b"c"))
        .unwrap();
    assert_eq!(place.read(&name[1..]), "inside");
    assert_eq!(place.read("a/c"), "c");
    place.assert_contained();
}

#[test]
fn hard_links_to_outside_are_refused() {
    let climbing = Tar::new().hard_link("l", "../outside/secret");
    refused(climbing, "l", "hard link that leads out");
    let place = Place::new();
    let outside = place
        .dir
        .path()
        .join("outside/secret")
        .to_str()
        .unwrap()
        .to_owned();
    refused(Tar::new().hard_link("l", &outside), "l", "not in the layer");
    // Through a link that was planted before.
    let tar = Tar::new()
        .symlink("out", "/")
        .hard_link("l", &format!("out{outside}"));
    refused(tar, "l", "not in the layer");
    refused(
        Tar::new().dir("d", 0o755).hard_link("l", "d"),
        "l",
        "a directory",
    );
    refused(Tar::new().hard_link("l", "/"), "l", "root");
    refused(Tar::new().hard_link("l", "gone"), "l", "not in the layer");
}

#[test]
fn a_hard_link_to_a_symbolic_link_does_not_follow_it() {
    let place = Place::new();
    let outside = place
        .dir
        .path()
        .join("outside/secret")
        .to_str()
        .unwrap()
        .to_owned();
    place
        .unpack(
            Tar::new()
                .symlink("s", &outside)
                .hard_link("h", "s")
                .file("h", b"new"),
        )
        .unwrap();
    assert_eq!(place.read("h"), "new");
    place.assert_contained();
}

#[test]
fn symbolic_links_do_not_lead_writes_out() {
    // As the last component, a link is replaced; as a parent, it ends inside.
    let place = Place::new();
    let outside = place
        .dir
        .path()
        .join("outside")
        .to_str()
        .unwrap()
        .to_owned();
    let tar = Tar::new()
        .symlink("file", &format!("{outside}/secret"))
        .file("file", b"replaced")
        .symlink("dir", &outside)
        .dir(&outside[1..], 0o755)
        .file("dir/secret", b"inside")
        .symlink("again", "/dir")
        .file("again/.wh.gone", b"");
    place.unpack(tar).unwrap();
    assert_eq!(place.read("file"), "replaced");
    assert_eq!(place.read(&format!("{}/secret", &outside[1..])), "inside");
    place.assert_contained();

    refused(Tar::new().symlink("up", "../outside"), "up", "leads out");
    refused(
        Tar::new().symlink("a/up", "../../outside"),
        "a/up",
        "leads out",
    );
    let nowhere = Tar::new().symlink("dir", &outside).file("dir/secret", b"x");
    refused(nowhere, "dir/secret", "leads nowhere");
    let looping = Tar::new()
        .symlink("a", "b")
        .symlink("b", "a")
        .file("a/x", b"");
    refused(looping, "a/x", "loop");
    refused(
        Tar::new().file("a", b"").file("a/x", b""),
        "a/x",
        "not a directory",
    );
}

#[test]
fn a_link_that_moves_after_it_was_made_climbs_nowhere() {
    // Harmless where it was made, the link `d/l` says `..` and is then seen from the root.
    let place = Place::new();
    let tar = Tar::new()
        .symlink("d/l", "../outside")
        .hard_link("l", "d/l")
        .dir("outside", 0o755)
        .file("l/secret", b"inside");
    place.unpack(tar).unwrap();
    assert_eq!(place.read("outside/secret"), "inside");
    place.assert_contained();
}

#[test]
fn links_of_the_host_in_the_way_are_not_followed() {
    // The unpacked directory itself being a link would be somebody's attack on the store.
    let place = Place::new();
    std::fs::remove_dir(place.fs()).unwrap();
    symlink(place.dir.path().join("outside"), place.fs()).unwrap();
    assert!(place.unpack(Tar::new().file("x", b"")).is_err());
    place.assert_contained();
}

#[test]
fn later_entries_replace_earlier_ones() {
    let place = Place::new();
    let tar = Tar::new()
        .file("a/b/c", b"1")
        .file("a/b", b"file now")
        .file("d", b"1")
        .dir("d", 0o700)
        .file("e", b"1")
        .file("e", b"2")
        .dir("k", 0o755)
        .file("k/x", b"stays")
        .dir("k", 0o700);
    place.unpack(tar).unwrap();
    assert_eq!(
        (place.read("a/b"), place.read("e")),
        ("file now".into(), "2".into())
    );
    assert!(place.meta("d").is_dir());
    assert_eq!(
        (place.meta("k").mode() & 0o777, place.read("k/x")),
        (0o700, "stays".into())
    );
    refused(Tar::new().file(".", b""), ".", "root");
    refused(Tar::new().symlink("/", "x"), "/", "root");
}

#[test]
fn whiteouts() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let tar = Tar::new()
        .file("etc/.wh.passwd", b"")
        .dir("opaque", 0o755)
        .file("opaque/.wh..wh..opq", b"")
        .file("mine", b"stays")
        .file(".wh.mine", b"")
        .file("dir/x", b"stays")
        .file(".wh.dir", b"")
        .file(".wh.turned", b"")
        .dir("turned", 0o755)
        .file(".wh..wh.plnk", b"");
    place.unpack(tar).unwrap();
    let whiteout = place.meta("etc/passwd");
    assert!(whiteout.file_type().is_char_device() && whiteout.rdev() == 0);
    let opaque = |name: &str| xattr(&place.fs().join(name), "trusted.overlay.opaque");
    for name in ["opaque", "dir", "turned"] {
        assert_eq!(opaque(name).as_deref(), Some(&b"y"[..]), "{name}");
    }
    assert_eq!(opaque("etc"), None);
    assert_eq!(
        (place.read("mine"), place.read("dir/x")),
        ("stays".into(), "stays".into())
    );
    assert!(!place.fs().join(".wh..wh.plnk").exists());
    // A whiteout named `..` must not reach the parent.
    for name in [".wh.", ".wh..", ".wh...", "a/.wh..."] {
        refused(Tar::new().file(name, b""), name, "takes away nothing");
    }
}

#[test]
fn unknown_types_and_bad_names_are_refused() {
    refused(Tar::new().raw("x", b'S', "", 0, b""), "x", "type 'S'");
    refused(Tar::new().symlink("x", ""), "x", "without a target");
    let long = "n".repeat(256);
    let tar = Tar::new().pax(&[("path", long.as_bytes())]).file("x", b"");
    refused(tar, &long, "too long");
    let below = format!("{long}/x");
    let tar = Tar::new().pax(&[("path", below.as_bytes())]).file("x", b"");
    refused(tar, &below, "too long");
    let bad = Tar::new()
        .pax(&[("SCHILY.xattr.security.capability", b"bad")])
        .file("x", b"");
    if is_root() {
        refused(bad, "x", "bad value");
    }
}

#[test]
fn compressed_layers_and_what_follows_the_end() {
    let mut plain = Tar::new().file("a", b"content").finish();
    plain.extend([0; 4096]);
    let diff_id = Sha256Digest::of(&plain);
    let mut two_members = gzip(&plain[..700]);
    two_members.extend(gzip(&plain[700..]));
    for blob in [plain.clone(), gzip(&plain), zstd(&plain), two_members] {
        let expected = Expected {
            digest: Some(Sha256Digest::of(&blob)),
            size: Some(blob.len() as u64),
        };
        let place = Place::new();
        place.unpack_blob(&blob, &expected, &diff_id).unwrap();
        assert_eq!(place.read("a"), "content");
    }
}

#[test]
fn truncated_and_changed_blobs_say_so_and_nothing_else() {
    let plain = Tar::new().file("a", &[9; 3000]).finish();
    let diff_id = Sha256Digest::of(&plain);
    for blob in [plain.clone(), gzip(&plain), zstd(&plain)] {
        let size = blob.len() as u64;
        let expected = Expected {
            digest: Some(Sha256Digest::of(&blob)),
            size: Some(size),
        };
        let fails = |bytes: &[u8]| {
            Place::new()
                .unpack_blob(bytes, &expected, &diff_id)
                .unwrap_err()
        };
        for length in [0, 1, 3, blob.len() / 2, blob.len() - 1] {
            let error = fails(&blob[..length]);
            assert!(
                matches!(error, Error::Size { found, .. } if found == length as u64),
                "{error}"
            );
        }
        let mut longer = blob.clone();
        longer.extend([0; 100]);
        assert!(matches!(fails(&longer), Error::Size { .. }));
        for at in [0, blob.len() / 2, blob.len() - 1] {
            let mut changed = blob.clone();
            changed[at] ^= 1;
            let error = fails(&changed);
            assert!(matches!(error, Error::Digest { .. }), "byte {at}: {error}");
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        }
    }
}

#[test]
fn a_wrong_diff_id_is_noticed_though_the_blob_is_right() {
    let plain = Tar::new().file("a", b"x").finish();
    let blob = gzip(&plain);
    let expected = Expected {
        digest: Some(Sha256Digest::of(&blob)),
        size: Some(blob.len() as u64),
    };
    let wrong = Sha256Digest::of(b"another");
    let error = Place::new()
        .unpack_blob(&blob, &expected, &wrong)
        .unwrap_err();
    assert!(
        matches!(&error, Error::Digest { what, .. } if what.contains("uncompressed")),
        "{error}"
    );
    // The same with a compressed stream that is broken, but known by its digest.
    let broken = &blob[..blob.len() - 10];
    let expected = Expected {
        digest: Some(Sha256Digest::of(broken)),
        size: None,
    };
    let error = Place::new()
        .unpack_blob(broken, &expected, &wrong)
        .unwrap_err();
    assert!(error.to_string().contains("decompress"), "{error}");
}

#[test]
fn caps_hold() {
    let fails = |limits: Limits| {
        let tar = Tar::new().file("a", &[0; 9000]).file("b", b"").finish();
        let place = Place::new();
        let dirs = (place.fs(), place.dir.path().join("trash"));
        let (blob, diff_id) = (gzip(&tar), Sha256Digest::of(&tar));
        let expected = Expected {
            digest: Some(Sha256Digest::of(&blob)),
            size: None,
        };
        unpack(&blob[..], &expected, &diff_id, (&dirs.0, &dirs.1), &limits).unwrap_err()
    };
    let error = fails(Limits {
        layer_entries: 1,
        ..Limits::default()
    });
    assert_eq!(error.kind(), ErrorKind::ResourceExhausted, "{error}");
    let error = fails(Limits {
        layer_bytes: 5000,
        ..Limits::default()
    });
    assert!(error.to_string().contains("5000 bytes"), "{error}");
    assert_eq!(error.kind(), ErrorKind::ResourceExhausted);
}

#[test]
fn directories_are_made_within_a_root() {
    let place = Place::new();
    symlink("/real", place.fs().join("link")).unwrap();
    std::fs::create_dir(place.fs().join("real")).unwrap();
    make_directories(&place.fs(), &["/link/a/b".into(), "/c".into(), "/".into()]).unwrap();
    assert!(place.meta("real/a/b").is_dir() && place.meta("c").is_dir());
    let error = make_directories(&place.fs(), &["/../outside/x".into()]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    place.assert_contained();
}

#[derive(Clone, Debug)]
enum Op {
    File(String),
    Dir(String),
    Symlink(String, String),
    HardLink(String, String),
    Whiteout(String),
}

fn op() -> impl Strategy<Value = Op> {
    // Few names, so that entries meet; `O` stands for the directory outside.
    let path = proptest::collection::vec(
        prop_oneof!["[ab]", Just("..".into()), Just("O".into())],
        1..5,
    );
    let path = (any::<bool>(), path).prop_map(|(absolute, parts): (bool, Vec<String>)| {
        format!("{}{}", if absolute { "/" } else { "" }, parts.join("/"))
    });
    let path = path.boxed();
    prop_oneof![
        path.clone().prop_map(Op::File),
        path.clone().prop_map(Op::Dir),
        (path.clone(), path.clone()).prop_map(|(a, b)| Op::Symlink(a, b)),
        (path.clone(), path.clone()).prop_map(|(a, b)| Op::HardLink(a, b)),
        path.prop_map(Op::Whiteout),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn no_sequence_of_entries_gets_out(ops in proptest::collection::vec(op(), 1..12)) {
        let place = Place::new();
        let outside = place.dir.path().join("outside").to_str().unwrap()[1..].to_owned();
        let real = |path: &str| path.replace('O', &outside);
        let mut bytes = Vec::new();
        for op in &ops {
            let pax = |path: &str, link: &str| {
                Tar::new().pax(&[("path", path.as_bytes()), ("linkpath", link.as_bytes())])
            };
            let tar = match op {
                Op::File(path) => pax(&real(path), "").file("x", b"x"),
                Op::Dir(path) => pax(&real(path), "").dir("x", 0o755),
                Op::Symlink(path, to) => pax(&real(path), &real(to)).symlink("x", ""),
                Op::HardLink(path, to) => pax(&real(path), &real(to)).hard_link("x", ""),
                Op::Whiteout(path) => pax(&format!("{}/.wh.a", real(path)), "").file("x", b""),
            };
            bytes.extend(tar.cut());
        }
        let dirs = (place.fs(), place.dir.path().join("trash"));
        let stream = std::io::Cursor::new(bytes);
        let _ = unpack_stream(stream, &dirs.0, &dirs.1, &Limits::default());
        place.assert_contained();
    }
}
