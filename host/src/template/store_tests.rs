use std::io::Write;
use std::os::unix::fs::{FileExt, PermissionsExt};

use super::*;
use crate::paths::testing::paths;

const MIB: u64 = 1 << 20;

fn key(digit: char) -> Key {
    Key::parse(&digit.to_string().repeat(super::super::key::KEY_CHARS)).unwrap()
}

fn shape() -> Shape {
    Shape {
        vcpus: 1,
        possible_vcpus: 8,
        memory_bytes: 8 * MIB,
        nics: 0,
        cmdline: String::new(),
    }
}

/// Builds a template that takes about `mib` MiB.
fn build(store: &Store, key: &Key, mib: u64) {
    let lock = store.lock(key).unwrap().unwrap();
    let draft = store.draft(key, 8 * MIB, &lock).unwrap();
    (&draft.files.state).write_all(b"state").unwrap();
    for at in 0..mib {
        let page = vec![1; MIB as usize];
        draft.files.memory.write_all_at(&page, at * MIB).unwrap();
    }
    draft.commit(&shape()).unwrap();
}

#[test]
fn a_template_is_there_when_it_is_whole_and_not_before() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::new(&paths(dir.path()));
    let key = key('a');
    assert!(store.open(&key).unwrap().is_none());
    assert!(store.list().unwrap().is_empty());
    let lock = store.lock(&key).unwrap().unwrap();
    let draft = store.draft(&key, 8 * MIB, &lock).unwrap();
    assert!(store.open(&key).unwrap().is_none(), "a draft is none");
    assert!(store.lock(&key).unwrap().is_none(), "somebody builds it");
    draft.commit(&shape()).unwrap();
    drop(lock);
    let saved = store.open(&key).unwrap().unwrap();
    assert_eq!(saved.memory.metadata().unwrap().len(), 8 * MIB);
    assert!((&saved.memory).write_all(b"x").is_err(), "it is only read");
    let listed = store.list().unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].shape, Some(shape()));
    // Removed while it is mapped or open: what is open stays readable.
    store.remove(&key).unwrap();
    assert!(store.open(&key).unwrap().is_none());
    saved.memory.read_exact_at(&mut [0; 16], 0).unwrap();
    assert!(matches!(store.remove(&key), Err(Error::NotFound(_))));
}

#[test]
fn what_a_dead_builder_left_is_no_template_and_goes() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::new(&paths(dir.path()));
    let key = key('b');
    let lock = store.lock(&key).unwrap().unwrap();
    let draft = store.draft(&key, MIB, &lock).unwrap();
    // As a killed builder: nothing of it is dropped, but its lock is free.
    std::mem::forget(draft);
    assert!(store.collect().unwrap().is_empty(), "its builder lives");
    drop(lock);
    assert!(store.open(&key).unwrap().is_none());
    assert_eq!(store.collect().unwrap().len(), 1);
    assert!(store.collect().unwrap().is_empty());
    // And the next builder does not stumble over it.
    let lock = store.lock(&key).unwrap().unwrap();
    std::mem::forget(store.draft(&key, MIB, &lock).unwrap());
    drop(lock);
    build(&store, &key, 1);
    assert!(store.open(&key).unwrap().is_some());
}

#[test]
fn an_abandoned_draft_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::new(&paths(dir.path()));
    let key = key('c');
    let lock = store.lock(&key).unwrap().unwrap();
    drop(store.draft(&key, MIB, &lock).unwrap());
    assert!(!store.file(&key, DRAFT).exists());
    // No room for what is asked for: the same.
    let huge = store.draft(&key, u64::MAX / 2, &lock);
    assert!(matches!(huge, Err(Error::File { .. })), "{huge:?}");
    assert!(!store.file(&key, DRAFT).exists());
}

#[test]
fn files_that_others_could_have_written_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::new(&paths(dir.path()));
    let key = key('d');
    build(&store, &key, 1);
    let template = store.dir.join(key.as_str());
    for path in [
        store.dir.clone(),
        template.clone(),
        template.join("state"),
        template.join("memory"),
    ] {
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        let set = |mode| fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        set(mode | 0o002);
        let error = store.open(&key).unwrap_err();
        assert!(error.to_string().contains("others may write"), "{error}");
        set(mode);
        assert!(store.open(&key).unwrap().is_some());
    }
    if rustix::process::geteuid().is_root() {
        let memory = template.join("memory");
        std::os::unix::fs::chown(&memory, Some(12345), None).unwrap();
        let error = store.open(&key).unwrap_err().to_string();
        assert!(error.contains("user 12345 owns it"), "{error}");
        std::os::unix::fs::chown(&memory, Some(0), None).unwrap();
    } else {
        println!("SKIPPED: not root");
    }
    fs::rename(template.join("state"), template.join("elsewhere")).unwrap();
    std::os::unix::fs::symlink("elsewhere", template.join("state")).unwrap();
    assert!(store.open(&key).is_err(), "a link");
    fs::remove_file(template.join("state")).unwrap();
    assert!(store.open(&key).is_err(), "half of it is gone");
}

#[test]
fn the_least_recently_used_go_when_there_is_no_room() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::new(&paths(dir.path()));
    let second = std::time::Duration::from_secs(1);
    for (age, digit) in ['1', '2', '3'].into_iter().enumerate() {
        build(&store, &key(digit), 2);
        let about = store.dir.join(key(digit).as_str()).join(ABOUT);
        let used = SystemTime::now() - second * (100 - age as u32);
        File::options()
            .append(true)
            .open(about)
            .unwrap()
            .set_modified(used)
            .unwrap();
    }
    // The oldest is used once more.
    store.open(&key('1')).unwrap().unwrap();
    store.keep_within(100 * MIB).unwrap();
    assert_eq!(store.list().unwrap().len(), 3);
    store.keep_within(5 * MIB).unwrap();
    let left: Vec<String> = store
        .list()
        .unwrap()
        .into_iter()
        .map(|one| one.key)
        .collect();
    assert_eq!(left, [key('1').as_str(), key('3').as_str()]);
    store.keep_within(0).unwrap();
    assert!(store.list().unwrap().is_empty());
}
