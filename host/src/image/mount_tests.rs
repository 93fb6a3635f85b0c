use std::os::unix::fs::{FileTypeExt, PermissionsExt};

use tempfile::TempDir;

use super::*;
use crate::image::testing::is_root;

/// A place with directories to be layers, each with a file of its own name.
struct Place {
    dir: TempDir,
}

impl Place {
    fn new(layers: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for number in 0..layers {
            let layer = dir.path().join(format!("layer{number}"));
            std::fs::create_dir(&layer).unwrap();
            std::fs::write(layer.join(number.to_string()), "").unwrap();
        }
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn mount(&self, lower: &[&Path]) -> Result<RootfsMount> {
        RootfsMount::overlay(lower, &self.path("target"), &self.path("scratch"))
    }

    /// The lines of the mount table that are about this place.
    fn mounted(&self) -> usize {
        let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        table
            .lines()
            .filter(|line| line.contains(self.dir.path().to_str().unwrap()))
            .count()
    }

    fn assert_clean(&self) {
        assert_eq!(self.mounted(), 0);
        assert!(!self.path("target").exists() && !self.path("scratch").exists());
    }
}

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// More than fit one page of options by their paths, and as many as an image may have.
#[test]
fn many_layers_and_any_characters_in_paths() {
    if !is_root() {
        return;
    }
    let place = Place::new(128);
    let odd = place.path("a:b,c=d\\e f");
    std::fs::create_dir(&odd).unwrap();
    std::fs::write(odd.join("odd"), "").unwrap();
    let mut lower: Vec<PathBuf> = (0..128).map(|n| place.path(&format!("layer{n}"))).collect();
    lower.push(odd);
    // One that repeats adds nothing, and overlayfs would refuse it.
    lower.push(lower[3].clone());
    let lower: Vec<&Path> = lower.iter().map(PathBuf::as_path).collect();
    let mount = place.mount(&lower).unwrap();
    assert_eq!(names(mount.path()).len(), 129);
    mount.unmount().unwrap();
    place.assert_clean();
}

#[test]
fn an_image_without_layers_is_an_empty_directory() {
    if !is_root() {
        return;
    }
    let place = Place::new(0);
    let mount = place.mount(&[]).unwrap();
    std::fs::write(mount.path().join("new"), "x").unwrap();
    assert_eq!(names(mount.path()), ["new"]);
    drop(mount);
    place.assert_clean();
}

#[test]
fn layers_below_an_opaque_root_do_not_show() {
    if !is_root() {
        return;
    }
    let place = Place::new(3);
    let layers: Vec<PathBuf> = (0..3).map(|n| place.path(&format!("layer{n}"))).collect();
    let flags = rustix::fs::XattrFlags::empty();
    if let Err(error) = rustix::fs::lsetxattr(&layers[1], "trusted.overlay.opaque", b"y", flags) {
        eprintln!("SKIPPED: a file system with extended attributes ({error})");
        return;
    }
    let lower: Vec<&Path> = layers.iter().map(PathBuf::as_path).collect();
    let mount = place.mount(&lower).unwrap();
    assert_eq!(names(mount.path()), ["1", "2"]);
    mount.unmount().unwrap();
}

#[test]
fn the_host_uses_no_device_of_an_image() {
    if !is_root() {
        return;
    }
    let place = Place::new(1);
    let layer = place.path("layer0");
    let null = rustix::fs::makedev(1, 3);
    let kind = rustix::fs::FileType::CharacterDevice;
    rustix::fs::mknodat(rustix::fs::CWD, layer.join("null"), kind, Mode::RUSR, null).unwrap();
    std::fs::set_permissions(&layer, PermissionsExt::from_mode(0o711)).unwrap();
    let mount = place.mount(&[&layer]).unwrap();
    let path = mount.path().join("null");
    assert!(
        std::fs::metadata(&path)
            .unwrap()
            .file_type()
            .is_char_device()
    );
    let error = std::fs::File::open(&path).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
    let mode = std::fs::metadata(mount.path())
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o711);
    mount.unmount().unwrap();
    place.assert_clean();
}

#[test]
fn a_mount_that_fails_leaves_nothing() {
    if !is_root() {
        return;
    }
    let place = Place::new(1);
    let gone = place.path("gone");
    let error = place.mount(&[&gone]).unwrap_err();
    assert!(error.to_string().contains("gone"), "{error}");
    place.assert_clean();
    let error =
        RootfsMount::overlay(&[], &place.path("no/target"), &place.path("scratch")).unwrap_err();
    assert!(error.to_string().contains("no/target"), "{error}");
    std::fs::remove_dir(place.path("scratch")).unwrap();
    place.assert_clean();
}

/// As after a process that died: by whoever comes next, at any point, as often as it likes.
#[test]
fn release_cleans_up_for_another_process() {
    if !is_root() {
        return;
    }
    let place = Place::new(1);
    let (target, scratch) = (place.path("target"), place.path("scratch"));
    place.mount(&[&place.path("layer0")]).unwrap().keep();
    assert_eq!(place.mounted(), 1);
    std::fs::write(target.join("written"), "x").unwrap();
    // A file that is still open does not keep it, nor does a mount on top.
    let open = std::fs::File::open(target.join("written")).unwrap();
    rustix::mount::mount("over", &target, "tmpfs", MountFlags::empty(), c"size=64k").unwrap();
    assert_eq!(place.mounted(), 2);
    release(&target, &scratch).unwrap();
    place.assert_clean();
    drop(open);
    release(&target, &scratch).unwrap();
    // Half made: directories, and no mount.
    std::fs::create_dir_all(scratch.join("upper/x")).unwrap();
    std::fs::create_dir(&target).unwrap();
    release(&target, &scratch).unwrap();
    place.assert_clean();
    // What is not a mount point and not empty is not ours to remove.
    std::fs::create_dir_all(target.join("precious")).unwrap();
    assert!(release(&target, &scratch).is_err());
    assert!(target.join("precious").exists());
}
