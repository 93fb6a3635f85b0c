use std::os::unix::fs::symlink;

use super::*;

#[test]
fn a_tree_goes_and_what_its_links_name_stays() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    std::fs::create_dir_all(tree.join("a/b/c")).unwrap();
    std::fs::create_dir_all(tree.join("a2/b")).unwrap();
    std::fs::write(tree.join("a/b/file"), "x").unwrap();
    let kept = dir.path().join("kept");
    std::fs::create_dir(&kept).unwrap();
    std::fs::write(kept.join("file"), "x").unwrap();
    symlink(&kept, tree.join("a/link")).unwrap();
    symlink("..", tree.join("a/b/up")).unwrap();
    remove_tree(&tree).unwrap();
    let left: Vec<_> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(left, ["kept"]);
    assert!(kept.join("file").exists());
    // Once more is fine, as is a parent that is gone; a file and a link go, too.
    remove_tree(&tree).unwrap();
    remove_tree(&tree.join("deeper")).unwrap();
    symlink(&kept, &tree).unwrap();
    remove_tree(&tree).unwrap();
    assert!(kept.join("file").exists() && !tree.is_symlink());
}

/// No path to the innermost directory would fit PATH_MAX, nor its descriptors a process.
#[test]
fn depth_costs_neither_stack_nor_descriptors() {
    let dir = tempfile::tempdir().unwrap();
    let flags = OFlags::RDONLY | OFlags::DIRECTORY;
    let mut at = rustix::fs::open(dir.path(), flags, Mode::empty()).unwrap();
    for depth in 0..3000 {
        let name = if depth == 0 { "tree" } else { "d" };
        rustix::fs::mkdirat(&at, name, Mode::RWXU).unwrap();
        at = rustix::fs::openat(&at, name, flags, Mode::empty()).unwrap();
    }
    drop(at);
    remove_tree(&dir.path().join("tree")).unwrap();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_removal_that_was_interrupted_is_taken_up() {
    let dir = tempfile::tempdir().unwrap();
    // What it had moved up beside the tree has a name that the next one wants.
    std::fs::create_dir_all(dir.path().join("tree.0/old")).unwrap();
    std::fs::create_dir_all(dir.path().join("tree/a/b")).unwrap();
    remove_tree(&dir.path().join("tree")).unwrap();
    assert!(!dir.path().join("tree").exists());
    assert!(dir.path().join("tree.0/old").exists());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn what_has_no_name_is_refused() {
    for path in ["/", "..", "", "."] {
        assert!(remove_tree(Path::new(path)).is_err(), "{path:?}");
    }
}
