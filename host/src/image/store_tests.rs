use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use serde_json::json;
use tempfile::TempDir;

use super::*;
use crate::error::ErrorKind;
use crate::image::testing::{Layout, TAR, TAR_GZIP, TAR_ZSTD, Tar, gzip, is_root, zstd};

fn store() -> (TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    (dir, store)
}

fn reference(layout: &Layout) -> ImageRef {
    ImageRef::parse(&format!("oci:{}", layout.path().display())).unwrap()
}

fn layer(name: &str) -> Vec<u8> {
    Tar::new().file(name, name.as_bytes()).finish()
}

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

#[test]
fn an_images_layers_are_unpacked_once() {
    let (_dir, store) = store();
    let mut layout = Layout::new();
    let layers = [
        (TAR, layer("one"), layer("one")),
        (TAR_GZIP, gzip(&layer("two")), layer("two")),
        (TAR_ZSTD, zstd(&layer("three")), layer("three")),
    ];
    layout.add_image(&layers, json!({}), json!({}));
    let image = store.prepare(&reference(&layout)).unwrap();
    let found: Vec<_> = image
        .layers()
        .iter()
        .map(|layer| names(&layer.path).concat())
        .collect();
    assert_eq!(found, ["one", "two", "three"]);
    for layer in image.layers() {
        assert_eq!(layer.path, store.layer_dir(&layer.diff_id).join("fs"));
        assert!(!layer.path.join("../trash").exists());
    }
    assert!(names(&store.dir.join("tmp")).is_empty());
    for dir in ["", "layers", "tmp", "locks"] {
        let mode = std::fs::metadata(store.dir.join(dir))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o700, "{dir}");
    }
    // Once more nothing is unpacked: what is there is taken as it is.
    std::fs::write(image.layers()[0].path.join("mark"), "").unwrap();
    let again = store.prepare(&reference(&layout)).unwrap();
    assert_eq!(again.layers(), image.layers());
    assert!(again.layers()[0].path.join("mark").exists());
}

#[test]
fn a_blob_that_is_wrong_leaves_nothing() {
    let (_dir, store) = store();
    let layout = Layout::of(&[layer("good"), layer("bad")]);
    let digest = layout.manifest()["layers"][1]["digest"]
        .as_str()
        .unwrap()
        .to_owned();
    let path = layout.blob_path(&digest);
    let right = std::fs::read(&path).unwrap();
    let mut changed = right.clone();
    changed[600] ^= 1;
    for (bytes, reason) in [
        (&changed[..], "digest"),
        (&right[..right.len() - 1], "bytes"),
        (&[&right[..], b"\0"].concat()[..], "bytes"),
    ] {
        std::fs::write(&path, bytes).unwrap();
        let error = store.prepare(&reference(&layout)).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("corrupt") && text.contains(reason), "{text}");
        assert!(
            text.contains(digest.strip_prefix("sha256:").unwrap()),
            "{text}"
        );
        assert!(names(&store.dir.join("tmp")).is_empty());
        assert_eq!(names(&store.dir.join("layers")).len(), 1);
    }
    std::fs::write(&path, &right).unwrap();
    assert_eq!(
        store.prepare(&reference(&layout)).unwrap().layers().len(),
        2
    );
}

#[test]
fn what_a_dead_unpacker_left_is_removed() {
    let (_dir, store) = store();
    let layout = Layout::of(&[layer("x")]);
    let diff_id = Sha256Digest::of(&layer("x"));
    let half = store.dir.join("tmp").join(diff_id.hex());
    std::fs::create_dir_all(half.join("fs/half")).unwrap();
    let image = store.prepare(&reference(&layout)).unwrap();
    assert_eq!(names(&image.layers()[0].path), ["x"]);

    // By gc, too; unless it is being worked on, which its lock says.
    let other = Sha256Digest::of(b"other");
    let dead = [
        half,
        store.dir.join("tmp").join(format!("{}.3", diff_id.hex())),
    ];
    let alive = store.dir.join("tmp").join(other.hex());
    for dir in [&dead[0], &dead[1], &alive] {
        std::fs::create_dir_all(dir.join("fs")).unwrap();
    }
    let lock = store.try_lock(&other).unwrap().unwrap();
    let mut removed = store.gc().unwrap();
    removed.sort();
    assert_eq!(removed, dead);
    assert_eq!(names(&store.dir.join("tmp")), [other.hex()]);
    assert_eq!(names(&store.dir.join("locks")), [other.hex()]);
    drop(lock);
    assert_eq!(store.gc().unwrap(), [alive]);
    assert!(names(&store.dir.join("locks")).is_empty());
    assert_eq!(names(&store.dir.join("layers")), [diff_id.hex()]);
}

#[test]
fn one_unpacks_and_the_others_wait_for_it() {
    let (_dir, store) = store();
    let layout = Layout::of(&[layer("a"), layer("b")]);
    let reference = reference(&layout);
    let lock = store.lock(&Sha256Digest::of(&layer("a"))).unwrap();
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| store.prepare(&reference).unwrap()))
            .collect();
        // None gets past the layer that somebody else is at.
        let started = Instant::now();
        while started.elapsed() < Duration::from_millis(100) {
            assert!(names(&store.dir.join("layers")).is_empty());
            assert!(all.iter().all(|one| !one.is_finished()));
            std::thread::sleep(Duration::from_millis(10));
        }
        drop(lock);
        for one in all {
            assert_eq!(one.join().unwrap().layers().len(), 2);
        }
    });
    assert!(names(&store.dir.join("tmp")).is_empty());
}

#[test]
fn caps_and_kinds_of_references() {
    let (dir, store) = store();
    let limits = Limits {
        layer_entries: 1,
        ..Limits::default()
    };
    let small = Store::with_limits(dir.path().join("small"), limits).unwrap();
    let layout = Layout::of(&[Tar::new().file("a", b"").file("b", b"").finish()]);
    let error = small.prepare(&reference(&layout)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ResourceExhausted);
    assert!(error.to_string().contains("1 entries"), "{error}");

    let rootfs = store
        .prepare(&ImageRef::Rootfs(layout.path().to_path_buf()))
        .unwrap();
    assert!(rootfs.layers().is_empty() && rootfs.digest.is_none());
    let file = layout.path().join("index.json");
    let error = store.prepare(&ImageRef::Rootfs(file)).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("index.json: it is not a directory"),
        "{error}"
    );
    let error = store.prepare(&ImageRef::Bundle("/b".into())).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    let error = Store::open("/proc/none").unwrap_err();
    assert!(error.chain().contains("/proc/none"), "{error}");
}

/// The layers of an image, mounted: each test of overlays needs layers, and so a store.
#[test]
fn a_mounted_image_shows_its_layers_as_one() {
    if !is_root() {
        return;
    }
    let (dir, store) = store();
    let lower = Tar::new()
        .dir("./", 0o711)
        .file("kept", b"1")
        .file("gone", b"1")
        .file("changed", b"1")
        .file("dir/old", b"1")
        .finish();
    let upper = Tar::new()
        .dir("./", 0o750)
        .file("changed", b"2")
        .file(".wh.gone", b"")
        .file("dir/.wh..wh..opq", b"")
        .file("dir/new", b"2")
        .finish();
    let image = store
        .prepare(&reference(&Layout::of(&[lower, upper])))
        .unwrap();
    let (target, scratch) = (dir.path().join("rootfs"), dir.path().join("scratch"));
    let mount = image.mount(&target, &scratch).unwrap();
    let mut shown = names(&target);
    shown.sort();
    assert_eq!(shown, ["changed", "dir", "kept"]);
    assert_eq!(std::fs::read(target.join("changed")).unwrap(), b"2");
    assert_eq!(names(&target.join("dir")), ["new"]);
    let mode = std::fs::metadata(&target).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o750);
    // What is written is the mount's, and the layers stay as they are.
    std::fs::write(target.join("kept"), "written").unwrap();
    std::fs::remove_file(target.join("changed")).unwrap();
    assert_eq!(
        std::fs::read(image.layers()[0].path.join("kept")).unwrap(),
        b"1"
    );
    assert_eq!(
        std::fs::read(image.layers()[1].path.join("changed")).unwrap(),
        b"2"
    );
    mount.unmount().unwrap();
    assert!(!target.exists() && !scratch.exists());
}
