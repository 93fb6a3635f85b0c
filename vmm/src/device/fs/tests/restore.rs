//! Guests that were saved with the file system mounted, and go on in a device over a copy of the directory.

use std::collections::{HashMap, HashSet};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use cella_proto::snapshot::FsState;
use fuse_backend_rs::abi::fuse_abi::{FsOptions, GetattrIn, Opcode};
use protobuf::Message;
use tempfile::TempDir;
use vm_memory::ByteValued;

use super::client::{Client, ROOT, cstr, open_below, words_bytes};
use crate::device::fs::budget::Budget;
use crate::device::{Device, DeviceError, SnapshotStep};

pub fn save(client: &mut Client) -> Result<Vec<u8>, DeviceError> {
    let mut own = Vec::new();
    let step = SnapshotStep::Save(&mut own);
    client.driver.device.snapshot(step).map(|()| own)
}

fn saved(client: &mut Client) -> FsState {
    FsState::parse_from_bytes(&save(client).unwrap()).unwrap()
}

/// A directory of the test's own, and in it a copy of the share that `client` has: with other numbers on the host.
pub fn copied(client: &Client) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    copy(
        &client.path(),
        &dir.path().join("share"),
        &mut HashMap::new(),
    );
    dir
}

/// Not cp(1): another process would have, until it executes, every descriptor of the tests that run beside this one, some of which wait
/// for an end. `links` has the copies so far, by the numbers of what they are of.
fn copy(from: &Path, to: &Path, links: &mut HashMap<u64, PathBuf>) {
    let meta = std::fs::symlink_metadata(from).unwrap();
    if let Some(same) = links.get(&meta.ino()) {
        return std::fs::hard_link(same, to).unwrap();
    }
    if meta.is_dir() {
        std::fs::create_dir(to).unwrap();
        for entry in std::fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            copy(&entry.path(), &to.join(entry.file_name()), links);
        }
    } else if meta.is_symlink() {
        std::os::unix::fs::symlink(std::fs::read_link(from).unwrap(), to).unwrap();
    } else {
        match meta.file_type().is_fifo() {
            true => {
                use rustix::fs::{CWD, FileType, Mode, mknodat};
                mknodat(CWD, to, FileType::Fifo, Mode::RUSR, 0).unwrap();
            }
            false => {
                std::fs::copy(from, to).unwrap();
            }
        }
        links.insert(meta.ino(), to.to_owned());
    }
    if !meta.is_symlink() {
        std::fs::set_permissions(to, meta.permissions()).unwrap();
    }
}

pub fn restore(dir: TempDir, own: &[u8]) -> Result<Client, DeviceError> {
    let share = dir.path().join("share");
    let mut client = Client::unmounted(&share, Budget::new(1 << 10));
    client.dir = Some(dir);
    let step = SnapshotStep::Restore(own);
    client.driver.device.snapshot(step).map(|()| client)
}

/// The guest of `client` goes on over a copy.
fn go_on(mut client: Client) -> Client {
    let own = save(&mut client).unwrap();
    restore(copied(&client), &own).unwrap()
}

fn write(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
}

fn content(client: &Client, path: &str) -> String {
    std::fs::read_to_string(client.path().join(path)).unwrap()
}

#[test]
fn a_guest_goes_on_with_its_numbers() {
    let mut client = Client::new();
    let a = client.mkdir(ROOT, "a").unwrap().nodeid;
    let b = client.mkdir(a, "b").unwrap().nodeid;
    let (file, handle) = client.create(b, "file", libc::O_RDWR, 0o600).unwrap();
    client.write(file.nodeid, handle, 0, b"before", 0).unwrap();
    let list = client.opendir(b).unwrap();
    let link = client.symlink(a, "link", "b").unwrap().nodeid;
    // Held while the directory that it is in moves.
    client.rename((ROOT, "a"), (ROOT, "moved"), 0).unwrap();

    let mut client = go_on(client);
    let file = file.nodeid;
    assert_eq!(client.read(file, handle, 0, 20).unwrap(), b"before");
    client.write(file, handle, 6, b" and after", 0).unwrap();
    assert_eq!(content(&client, "moved/b/file"), "before and after");
    let attributes = client.getattr(file).unwrap();
    assert_eq!((attributes.ino, attributes.size), (file, 16));
    let arguments = GetattrIn {
        flags: 1,
        fh: handle,
        ..GetattrIn::default()
    };
    client
        .call(Opcode::Getattr, file, arguments.as_slice(), 128)
        .unwrap();
    let target = client.call(Opcode::Readlink, link, &[], 100).unwrap();
    assert_eq!(target, b"b");
    let entries = client.read_with(Opcode::Readdir, b, list, 0, 600).unwrap();
    assert_eq!(entries[..8], file.to_le_bytes(), "the old number");
    assert_eq!(client.list(b, false)[0].1, file);
    assert_eq!(client.list(b, true)[0].2.unwrap().nodeid, file);
    assert_eq!(client.lookup(b, "file").unwrap().nodeid, file);
    assert_eq!(client.lookup(ROOT, "moved").unwrap().nodeid, a);
    let hard = client.make(Opcode::Link, a, &file.to_le_bytes(), "hard");
    assert_eq!(hard.unwrap().nodeid, file);
    for (opcode, node, fh) in [
        (Opcode::Release, file, handle),
        (Opcode::Releasedir, b, list),
    ] {
        client.release(opcode, node, fh).unwrap();
        assert_eq!(client.release(opcode, node, fh), Err(libc::EBADF));
    }
}

#[test]
fn what_is_new_has_numbers_of_its_own() {
    let mut client = Client::new();
    let mut nodes = HashSet::from([ROOT]);
    let mut handles = HashSet::new();
    for round in 0..3 {
        for index in 0..4 {
            let name = format!("{round}-{index}");
            let (file, handle) = client.create(ROOT, &name, libc::O_RDWR, 0o600).unwrap();
            client
                .write(file.nodeid, handle, 0, name.as_bytes(), 0)
                .unwrap();
            assert!(nodes.insert(file.nodeid), "{name}");
            assert!(handles.insert(handle), "{name}");
            let again = client.open(file.nodeid, libc::O_RDONLY).unwrap();
            assert!(handles.insert(again), "{name}");
        }
        // Saved twice before anything is asked of it.
        client = go_on(go_on(client));
    }
    for node in nodes.into_iter().filter(|node| *node != ROOT) {
        assert_eq!(client.getattr(node).unwrap().ino, node);
    }
    // Numbers that lie above the guest's are no second ones for what it has.
    let state = saved(&mut client);
    let past = state.inodes.iter().map(|inode| inode.number).max().unwrap();
    for beyond in 1..14 {
        assert_eq!(client.getattr(past + beyond).err(), Some(libc::ESTALE));
    }
    assert_eq!(client.getattr(past + 14).err(), Some(libc::EBADF));
}

#[test]
fn the_last_forgotten_lookup_lets_go() {
    let mut client = Client::new();
    let dir = client.mkdir(ROOT, "dir").unwrap().nodeid;
    let (file, handle) = client.create(dir, "file", libc::O_RDWR, 0o600).unwrap();
    let file = file.nodeid;
    for _ in 0..4 {
        client.lookup(dir, "file").unwrap();
    }
    let mut client = go_on(client);
    client.lookup(dir, "file").unwrap();
    let path = client.path();
    // The root, the directory, the file and its handle.
    assert_eq!(open_below(&path), 4);
    client.forget(dir, 1);
    client.forget(file, 5);
    assert_eq!(open_below(&path), 3);
    client.getattr(file).unwrap();
    client.forget(file, 1);
    assert_eq!(client.getattr(file).err(), Some(libc::EBADF));
    client.release(Opcode::Release, file, handle).unwrap();
    assert_eq!(open_below(&path), 1);
    assert_eq!(saved(&mut client).inodes, []);
    let dir_again = client.lookup(ROOT, "dir").unwrap();
    assert_eq!(dir_again.nodeid, dir, "the same file, the same number");
    client.driver.device.reset().unwrap();
    assert_eq!(open_below(&path), 1);
}

#[test]
fn what_is_gone_is_stale_and_can_be_given_back() {
    let mut client = Client::new();
    for name in ["missing", "other", "stays"] {
        write(&client.path().join(name), name);
    }
    let [missing, other, stays] = ["missing", "other", "stays"].map(|name| {
        let node = client.lookup(ROOT, name).unwrap().nodeid;
        (node, client.open(node, libc::O_RDONLY).unwrap())
    });
    let removed = client.mkdir(ROOT, "removed").unwrap().nodeid;
    client
        .call(Opcode::Rmdir, ROOT, &cstr("removed"), 64)
        .unwrap();
    let dir = client.mkdir(ROOT, "dir").unwrap().nodeid;
    let inside = client.mkdir(dir, "inside").unwrap().nodeid;

    let own = save(&mut client).unwrap();
    let copy = copied(&client);
    let path = copy.path().join("share");
    std::fs::remove_file(path.join("missing")).unwrap();
    std::fs::remove_file(path.join("other")).unwrap();
    std::fs::create_dir(path.join("other")).unwrap();
    std::fs::remove_dir_all(path.join("dir")).unwrap();
    let mut client = restore(copy, &own).unwrap();
    // And still so a process later.
    for _ in 0..2 {
        for node in [missing.0, other.0, removed, dir, inside] {
            assert_eq!(client.getattr(node).err(), Some(libc::ESTALE));
            assert_eq!(client.lookup(node, "x").unwrap_err(), libc::ESTALE);
            assert_eq!(client.open(node, libc::O_RDONLY), Err(libc::ESTALE));
            assert_eq!(client.opendir(node), Err(libc::ESTALE));
        }
        for (node, handle) in [missing, other] {
            assert_eq!(client.read(node, handle, 0, 9), Err(libc::ESTALE));
            assert_eq!(client.read(stays.0, handle, 0, 9), Err(libc::ESTALE));
        }
        assert_eq!(client.read(stays.0, stays.1, 0, 9).unwrap(), b"stays");
        assert_ne!(client.lookup(ROOT, "other").unwrap().nodeid, other.0);
        client = go_on(client);
    }
    assert_eq!(
        client.release(Opcode::Release, missing.0, stays.1),
        Err(libc::EBADF)
    );
    for (node, handle) in [missing, other] {
        client.release(Opcode::Release, node, handle).unwrap();
    }
    for node in [missing.0, other.0, removed, dir, inside] {
        client.forget(node, u64::MAX);
    }
    let state = saved(&mut client);
    let [kept] = &state.handles[..] else {
        panic!("{state}");
    };
    assert_eq!((kept.number, kept.inode), (stays.1, stays.0));
    assert!(state.inodes.iter().all(|inode| !inode.name.is_empty()));
}

#[test]
fn a_removed_file_that_is_open_is_not_saved() {
    let mut client = Client::new();
    let (file, handle) = client.create(ROOT, "file", libc::O_RDWR, 0o600).unwrap();
    let node = file.nodeid.to_le_bytes();
    client.make(Opcode::Link, ROOT, &node, "link").unwrap();
    client
        .call(Opcode::Unlink, ROOT, &cstr("file"), 64)
        .unwrap();
    save(&mut client).unwrap();
    client.create(ROOT, "new", libc::O_RDWR, 0o600).unwrap();
    client.rename((ROOT, "new"), (ROOT, "link"), 0).unwrap();
    let error = save(&mut client).unwrap_err();
    assert!(error.to_string().contains("removed file open"), "{error}");
    client
        .release(Opcode::Release, file.nodeid, handle)
        .unwrap();
    let mut client = go_on(client);
    assert_eq!(client.getattr(file.nodeid).err(), Some(libc::ESTALE));
}

#[test]
fn names_are_followed_through_exchanges_and_listings() {
    let mut client = Client::new();
    let one = client.mkdir(ROOT, "one").unwrap().nodeid;
    let two = client.mkdir(ROOT, "two").unwrap().nodeid;
    write(&client.path().join("one/file"), "first");
    write(&client.path().join("two/file"), "second");
    let [first, second] = [one, two].map(|dir| client.list(dir, true)[0].2.unwrap().nodeid);
    let exchange = libc::RENAME_EXCHANGE;
    client
        .rename((ROOT, "one"), (ROOT, "two"), exchange)
        .unwrap();
    client.rename((one, "file"), (ROOT, "out"), 0).unwrap();
    let fifo = words_bytes(&[libc::S_IFIFO | 0o600, 0, 0, 0]);
    let fifo = client.make(Opcode::Mknod, one, &fifo, "fifo").unwrap();

    let mut client = go_on(client);
    for (node, text) in [(first, "first"), (second, "second")] {
        let handle = client.open(node, libc::O_RDONLY).unwrap();
        assert_eq!(client.read(node, handle, 0, 9).unwrap(), text.as_bytes());
    }
    assert_eq!(client.lookup(ROOT, "one").unwrap().nodeid, two);
    assert_eq!(client.lookup(one, "fifo").unwrap().nodeid, fifo.nodeid);
}

#[test]
fn flags_and_the_session_stay() {
    let mut client = Client::new();
    let flags = libc::O_RDWR | libc::O_APPEND | libc::O_TRUNC;
    let (file, handle) = client.create(ROOT, "file", flags, 0o600).unwrap();
    client.write(file.nodeid, handle, 0, b"whole", 0).unwrap();
    let reader = client.open(file.nodeid, libc::O_RDONLY).unwrap();
    let before = saved(&mut client);
    assert!(FsOptions::from_bits_truncate(before.options).contains(FsOptions::HANDLE_KILLPRIV_V2));

    let mut client = go_on(client);
    assert_eq!(client.read(file.nodeid, reader, 0, 9).unwrap(), b"whole");
    assert_eq!(
        client.write(file.nodeid, reader, 0, b"x", 0),
        Err(libc::EBADF)
    );
    let mut after = saved(&mut client);
    after.handles.sort_by_key(|handle| handle.number);
    assert_eq!(after.options, before.options);
    assert_eq!(
        after.handles[0].flags,
        (libc::O_RDWR | libc::O_APPEND) as u32
    );
    // A mount anew ends it.
    client.init().unwrap();
    assert_eq!(saved(&mut client).inodes, []);
    assert_eq!(client.getattr(file.nodeid).err(), Some(libc::EBADF));
}

#[test]
fn two_numbers_for_one_file_do_not_share_it() {
    let mut client = Client::new();
    let [one, two] = ["one", "two"].map(|name| {
        write(&client.path().join(name), name);
        client.lookup(ROOT, name).unwrap().nodeid
    });
    let own = save(&mut client).unwrap();
    let copy = copied(&client);
    let path = copy.path().join("share");
    std::fs::remove_file(path.join("two")).unwrap();
    std::fs::hard_link(path.join("one"), path.join("two")).unwrap();
    let mut client = restore(copy, &own).unwrap();
    let answers = [one, two].map(|node| client.getattr(node).map(|it| it.ino));
    let kept = if answers[0].is_ok() { one } else { two };
    let lost = one + two - kept;
    assert_eq!(client.getattr(lost).err(), Some(libc::ESTALE));
    client.forget(lost, 1);
    assert_eq!(client.getattr(kept).unwrap().ino, kept);
}

#[test]
fn a_device_that_nobody_has_mounted_keeps_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut client = Client::unmounted(dir.path(), Budget::new(64));
    let own = save(&mut client).unwrap();
    assert_eq!(own, b"");
    client
        .driver
        .device
        .snapshot(SnapshotStep::Restore(&own))
        .unwrap();
    client.init().unwrap();
    let made = client.mkdir(ROOT, "dir").unwrap().nodeid;
    assert_eq!(client.lookup(ROOT, "dir").unwrap().nodeid, made);
}
