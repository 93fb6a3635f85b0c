use std::ffi::CString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::path::Path;

use super::*;

fn open(path: &Path) -> OwnedFd {
    std::fs::File::open(path).unwrap().into()
}

/// A root in a directory of its own, so that what escapes would be seen beside it.
fn root() -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    std::fs::create_dir(&root).unwrap();
    (dir, root)
}

fn directory(root: &Path, path: &CStr) -> SysResult {
    let fd = ensure_directory(open(root).as_raw_fd(), path)?;
    sys::close(fd);
    Ok(())
}

#[test]
fn missing_directories_are_made() {
    let (_dir, root) = root();
    directory(&root, c"/a/b//c/").unwrap();
    assert!(root.join("a/b/c").is_dir());
    directory(&root, c"/a/b/c").unwrap();
}

#[test]
fn links_never_lead_outside() {
    let (dir, root) = root();
    symlink("../..", root.join("up")).unwrap();
    symlink("/etc", root.join("absolute")).unwrap();
    symlink(dir.path(), root.join("host")).unwrap();
    directory(&root, c"/up/x/y").unwrap();
    assert!(root.join("x/y").is_dir(), "'..' stops at the root");
    directory(&root, c"/absolute/z").unwrap();
    assert!(
        root.join("etc/z").is_dir(),
        "an absolute link starts at the root"
    );
    directory(&root, c"/host/w").unwrap();
    assert!(!dir.path().join("w").exists());
    let names: Vec<_> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(names, ["root"]);
}

#[test]
fn targets_of_dangling_links_are_made() {
    let (_dir, root) = root();
    std::fs::create_dir(root.join("var")).unwrap();
    symlink("../run", root.join("var/run")).unwrap();
    directory(&root, c"/var/run/secrets").unwrap();
    assert!(root.join("run/secrets").is_dir());
    symlink("other/deep", root.join("var/first")).unwrap();
    directory(&root, c"/var/first/x").unwrap();
    assert!(root.join("var/other/deep/x").is_dir());
}

#[test]
fn link_loops_files_and_long_paths_end_in_errors() {
    let (_dir, root) = root();
    symlink("loop", root.join("loop")).unwrap();
    std::fs::write(root.join("file"), "").unwrap();
    assert_eq!(directory(&root, c"/loop/x"), Err(Errno(libc::ELOOP)));
    assert_eq!(directory(&root, c"/file/x"), Err(Errno(libc::ENOTDIR)));
    assert_eq!(directory(&root, c"/file"), Err(Errno(libc::ENOTDIR)));
    let long = CString::new(format!("/{}", "x/".repeat(3000))).unwrap();
    assert_eq!(directory(&root, &long), Err(Errno(libc::ENAMETOOLONG)));
    // A link to ever longer links runs out of follows, not of stack.
    symlink("grow/y/../../grow/z", root.join("grow")).unwrap();
    assert!(directory(&root, c"/grow/x").is_err());
}

#[test]
fn a_file_mount_point_is_made_where_a_link_says_inside() {
    let (dir, root) = root();
    symlink("/outside", root.join("hosts")).unwrap();
    let fd = ensure_file(open(&root).as_raw_fd(), c"/hosts").unwrap();
    sys::close(fd);
    assert!(root.join("outside").is_file());
    assert!(!dir.path().join("outside").exists());
    let fd = ensure_file(open(&root).as_raw_fd(), c"/etc/deep/hosts").unwrap();
    sys::close(fd);
    assert!(root.join("etc/deep/hosts").is_file());
}
