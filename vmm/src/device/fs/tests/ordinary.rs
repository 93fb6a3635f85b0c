//! What well-behaved guests do with files.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use fuse_backend_rs::abi::fuse_abi::{
    FOPEN_IN_KILL_SUIDGID, ForgetOne, FsOptions, Opcode, OpenIn, OpenOptions, SetattrIn,
    SetattrValid, WRITE_KILL_PRIV,
};
use vm_memory::ByteValued;

use super::client::{Client, ROOT, cstr, open_below, words_bytes};
use crate::device::fs::budget::Budget;
use crate::device::fs::{Fs, FsError, HIPRIO};
use crate::device::testing::MockDriver;
use crate::device::{Device, DeviceError};

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: acting as other users needs root");
    }
    root
}

#[test]
fn the_session_has_large_requests_and_no_dax() {
    let mut client = Client::new();
    let init = client.init().unwrap();
    let flags = FsOptions::from_bits_truncate(init.flags.into());
    assert_eq!(
        (init.major, init.max_pages, init.max_write),
        (7, 256, 1 << 20)
    );
    let wanted = FsOptions::MAX_PAGES | FsOptions::AUTO_INVAL_DATA | FsOptions::HANDLE_KILLPRIV_V2;
    assert!(flags.contains(wanted), "{flags:?}");
    assert!(!flags.intersects(FsOptions::WRITEBACK_CACHE | FsOptions::PERFILE_DAX));
}

#[test]
fn the_configuration_is_the_tag_and_one_request_queue() {
    let dir = tempfile::tempdir().unwrap();
    let driver = MockDriver::new(Fs::new("share", dir.path()).unwrap());
    let mut config = [0xff; 44];
    driver.device.read_config(0, &mut config);
    assert_eq!(&config[..5], b"share");
    assert_eq!(config[5..36], [0; 31]);
    assert_eq!(config[36..], [1, 0, 0, 0, 0, 0, 0, 0]);
    driver.device.read_config(u64::MAX - 1, &mut config);
    assert_eq!(config, [0; 44]);
}

#[test]
fn directories_that_cannot_be_shared_are_named() {
    let dir = tempfile::tempdir().unwrap();
    for tag in ["", "a\0b", &"x".repeat(37)] {
        assert!(matches!(Fs::new(tag, dir.path()), Err(FsError::Tag { .. })));
    }
    assert!(Fs::new(&"x".repeat(36), dir.path()).is_ok());
    let missing = dir.path().join("missing");
    let error = Fs::new("share", &missing).err().unwrap();
    assert!(error.to_string().contains("missing"), "{error}");
}

#[test]
fn files_are_created_written_and_read_in_any_pieces() {
    let mut client = Client::new();
    let (entry, handle) = client.create(ROOT, "file", libc::O_RDWR, 0o640).unwrap();
    let node = entry.nodeid;
    let data: Vec<u8> = (0..100_000_u32).map(|at| (at / 7) as u8).collect();
    let mut offset = 0;
    for chunk in data.chunks(33_333) {
        let len = client.write(node, handle, offset, chunk, 0).unwrap();
        assert_eq!(len as usize, chunk.len());
        offset += chunk.len() as u64;
    }
    let on_host = client.path().join("file");
    assert!(
        std::fs::read(&on_host).unwrap() == data,
        "written through at once"
    );
    assert_eq!(on_host.metadata().unwrap().mode() & 0o7777, 0o640);

    let reader = client.open(node, libc::O_RDONLY).unwrap();
    let got = client.read(node, reader, 12_345, 70_000).unwrap();
    assert!(got == data[12_345..82_345]);
    let tail = client.read(node, reader, 99_990, 4096).unwrap();
    assert_eq!(tail, data[99_990..], "a short read at the end");
    assert_eq!(client.write(node, reader, 0, b"x", 0), Err(libc::EBADF));
    assert_eq!(client.getattr(node).unwrap().size, 100_000);
}

#[test]
fn names_come_and_go() {
    let mut client = Client::new();
    let sub = client.mkdir(ROOT, "sub").unwrap().nodeid;
    client.create(sub, "a", libc::O_RDWR, 0o600).unwrap();
    let node = client.lookup(sub, "a").unwrap().nodeid;

    client
        .rename((sub, "a"), (ROOT, "b"), libc::RENAME_NOREPLACE)
        .unwrap();
    assert_eq!(client.lookup(sub, "a").unwrap_err(), libc::ENOENT);
    assert_eq!(client.lookup(ROOT, "b").unwrap().nodeid, node);

    let link = client
        .make(Opcode::Link, ROOT, &node.to_le_bytes(), "c")
        .unwrap();
    assert_eq!((link.nodeid, link.attr.nlink), (node, 2));
    client.call(Opcode::Unlink, ROOT, &cstr("b"), 64).unwrap();
    assert_eq!(client.getattr(node).unwrap().nlink, 1);
    assert_eq!(
        client.call(Opcode::Rmdir, ROOT, &cstr("c"), 64),
        Err(libc::ENOTDIR)
    );
    client.call(Opcode::Rmdir, ROOT, &cstr("sub"), 64).unwrap();
    assert_eq!(std::fs::read_dir(client.path()).unwrap().count(), 1);
}

#[test]
fn a_directory_lists_the_same_numbers_that_its_files_have() {
    let mut client = Client::new();
    for index in 0..40 {
        std::fs::write(client.path().join(format!("file-{index}")), b"").unwrap();
    }
    for plus in [false, true] {
        let mut names = client.list(ROOT, plus);
        names.sort_by(|one, other| one.0.cmp(&other.0));
        names.dedup_by(|one, other| one.0 == other.0);
        assert_eq!(names.len(), 40, "no dots, nothing twice");
        for (name, number, entry) in names {
            let found = client.lookup(ROOT, &name).unwrap();
            assert_eq!(found.attr.ino, number);
            assert_eq!(client.getattr(found.nodeid).unwrap().ino, number);
            assert!(entry.is_none_or(|entry| entry.nodeid == found.nodeid));
        }
    }
}

#[test]
fn what_the_host_changes_is_believed_for_a_second_at_most() {
    let mut client = Client::new();
    let file = client.path().join("config");
    std::fs::write(&file, b"old").unwrap();
    let entry = client.lookup(ROOT, "config").unwrap();
    for (seconds, nanos) in [
        (entry.entry_valid, entry.entry_valid_nsec),
        (entry.attr_valid, entry.attr_valid_nsec),
    ] {
        assert!((seconds, nanos) <= (1, 0) && (seconds, nanos) > (0, 0));
    }
    let dir = client.mkdir(ROOT, "dir").unwrap();
    assert!((dir.entry_valid, dir.entry_valid_nsec) <= (1, 0));

    // Replaced as a ConfigMap is: another file under the same name.
    std::fs::write(client.path().join("new"), b"newer").unwrap();
    std::fs::rename(client.path().join("new"), &file).unwrap();
    let after = client.lookup(ROOT, "config").unwrap();
    assert_ne!(after.nodeid, entry.nodeid);
    assert_eq!(after.attr.size, 5);
    assert_eq!(
        client.getattr(entry.nodeid).unwrap().size,
        3,
        "the old one lives on"
    );
}

#[test]
fn a_file_that_is_opened_again_is_not_read_again_unless_it_has_changed() {
    let keeps = |client: &mut Client, name: &str| {
        let node = client.lookup(ROOT, name).unwrap().nodeid;
        let opened = client.opened(Opcode::Open, node, OpenIn::default());
        OpenOptions::from_bits_truncate(opened.unwrap().open_flags)
            .contains(OpenOptions::KEEP_CACHE)
    };
    // Long there.
    let mut client = Client::at(Path::new("/usr/bin"), Budget::new(1 << 16));
    assert!(!keeps(&mut client, "env"));
    assert!(keeps(&mut client, "env"));
    // Written a moment ago: what is written next may have the same time.
    let mut client = Client::new();
    std::fs::write(client.path().join("new"), b"new").unwrap();
    assert!(!keeps(&mut client, "new"));
    assert!(!keeps(&mut client, "new"));
}

#[test]
fn files_belong_to_the_user_who_makes_them() {
    if !is_root() {
        return;
    }
    let mut client = Client::new();
    let all = std::fs::Permissions::from_mode(0o777);
    std::fs::set_permissions(client.path(), all).unwrap();
    (client.uid, client.gid) = (1234, 5678);
    client.create(ROOT, "file", libc::O_RDWR, 0o600).unwrap();
    client.mkdir(ROOT, "dir").unwrap();
    client.symlink(ROOT, "link", "anywhere").unwrap();
    let fifo = words_bytes(&[libc::S_IFIFO | 0o600, 0, 0, 0]);
    client.make(Opcode::Mknod, ROOT, &fifo, "fifo").unwrap();
    for name in ["file", "dir", "link", "fifo"] {
        let meta = client.path().join(name).symlink_metadata().unwrap();
        assert_eq!((meta.uid(), meta.gid()), (1234, 5678), "{name}");
    }
    // And the server is itself again.
    (client.uid, client.gid) = (0, 0);
    client.mkdir(ROOT, "roots").unwrap();
    assert_eq!(client.path().join("roots").metadata().unwrap().uid(), 0);
}

// What the jail leaves to the server's thread, and how it keeps it when acting as a user.
fn confine() {
    use rustix::thread::{CapabilitySet as Cap, CapabilitySets};
    let kept =
        Cap::CHOWN | Cap::DAC_OVERRIDE | Cap::FOWNER | Cap::FSETID | Cap::SETUID | Cap::SETGID;
    // SAFETY: PR_SET_SECUREBITS takes a number and changes this thread only.
    let done = unsafe { libc::prctl(libc::PR_SET_SECUREBITS, 1 << 2, 0, 0, 0) };
    assert_eq!(done, 0, "SECBIT_NO_SETUID_FIXUP");
    rustix::thread::set_capabilities(
        None,
        CapabilitySets {
            effective: kept,
            permitted: kept,
            inheritable: Cap::empty(),
        },
    )
    .unwrap();
}

#[test]
fn the_capabilities_of_the_jail_are_enough() {
    if !is_root() {
        return;
    }
    let test = std::thread::spawn(|| {
        let mut client = Client::new();
        confine();
        // A directory that the user may write to by a supplementary group, which the server does not know of:
        // the guest's kernel has checked.
        let group = std::fs::Permissions::from_mode(0o770);
        std::fs::set_permissions(client.path(), group).unwrap();
        (client.uid, client.gid) = (1234, 5678);
        let (file, handle) = client.create(ROOT, "file", libc::O_RDWR, 0o400).unwrap();
        client.write(file.nodeid, handle, 0, b"data", 0).unwrap();
        let node = file.nodeid.to_le_bytes();
        let link = client.make(Opcode::Link, ROOT, &node, "link").unwrap();
        assert_eq!((link.nodeid, link.attr.nlink), (file.nodeid, 2));
        let set = SetattrIn {
            valid: (SetattrValid::UID | SetattrValid::MODE).bits(),
            uid: 99,
            mode: 0o6755,
            ..SetattrIn::default()
        };
        client
            .call(Opcode::Setattr, file.nodeid, set.as_slice(), 128)
            .unwrap();
        let handle = client.open(file.nodeid, libc::O_RDWR).unwrap();
        client
            .write(file.nodeid, handle, 0, b"x", WRITE_KILL_PRIV)
            .unwrap();
        let meta = client.path().join("link").metadata().unwrap();
        assert_eq!(
            (meta.uid(), meta.gid(), meta.mode() & 0o7777),
            (99, 5678, 0o755)
        );
    });
    test.join().unwrap();
}

#[test]
fn writing_takes_set_user_id_off() {
    if !is_root() {
        return;
    }
    let mut client = Client::new();
    let path = client.path().join("tool");
    for by_open in [false, true] {
        std::fs::write(&path, b"#!").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o4755)).unwrap();
        let node = client.lookup(ROOT, "tool").unwrap().nodeid;
        if by_open {
            let flags = libc::O_RDWR | libc::O_TRUNC;
            client
                .open_with(Opcode::Open, node, flags, FOPEN_IN_KILL_SUIDGID)
                .unwrap();
        } else {
            let handle = client.open(node, libc::O_RDWR).unwrap();
            client.write(node, handle, 0, b"x", 0).unwrap();
            assert_eq!(path.metadata().unwrap().mode() & 0o7777, 0o4755, "root may");
            client
                .write(node, handle, 0, b"x", WRITE_KILL_PRIV)
                .unwrap();
        }
        assert_eq!(path.metadata().unwrap().mode() & 0o7777, 0o755);
    }
}

#[test]
fn attributes_can_be_set() {
    let mut client = Client::new();
    let (entry, _) = client.create(ROOT, "file", libc::O_RDWR, 0o600).unwrap();
    let valid = SetattrValid::MODE | SetattrValid::SIZE | SetattrValid::MTIME;
    let set = SetattrIn {
        valid: valid.bits(),
        size: 1000,
        mode: 0o4711,
        mtime: 12_345,
        ..SetattrIn::default()
    };
    client
        .call(Opcode::Setattr, entry.nodeid, set.as_slice(), 128)
        .unwrap();
    let meta = client.path().join("file").metadata().unwrap();
    assert_eq!(
        (meta.len(), meta.mode() & 0o7777, meta.mtime()),
        (1000, 0o4711, 12_345)
    );
}

#[test]
fn extended_attributes_pass_through() {
    let mut client = Client::new();
    let (entry, _) = client.create(ROOT, "file", libc::O_RDWR, 0o600).unwrap();
    let node = entry.nodeid;
    let set = [words_bytes(&[5, 0]), cstr("user.test"), b"value".to_vec()].concat();
    match client.call(Opcode::Setxattr, node, &set, 64) {
        Err(libc::EOPNOTSUPP) => {
            eprintln!("SKIPPED: the temporary directory has no extended attributes");
            return;
        }
        answer => answer.unwrap(),
    };
    let get = |size: u32| [words_bytes(&[size, 0]), cstr("user.test")].concat();
    let value = client.call(Opcode::Getxattr, node, &get(100), 200).unwrap();
    assert_eq!(value, b"value");
    let size = client.call(Opcode::Getxattr, node, &get(0), 64).unwrap();
    assert_eq!(size[..4], [5, 0, 0, 0]);
    assert_eq!(
        client.call(Opcode::Getxattr, node, &get(2), 64),
        Err(libc::ERANGE)
    );
    // A size that the server would allocate if it were believed.
    let value = client.call(Opcode::Getxattr, node, &get(u32::MAX), 200);
    assert_eq!(value.unwrap(), b"value");
}

#[test]
fn a_guest_holds_no_more_files_than_its_budget() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["a", "b", "c", "d", "e"] {
        std::fs::write(dir.path().join(name), b"").unwrap();
    }
    let mut client = Client::at(dir.path(), Budget::new(6));
    let a = client.lookup(ROOT, "a").unwrap().nodeid;
    client.lookup(ROOT, "b").unwrap();
    let handle = client.open(a, libc::O_RDONLY).unwrap();
    assert_eq!(client.lookup(ROOT, "c").unwrap_err(), libc::ENFILE);
    assert_eq!(client.open(a, libc::O_RDONLY), Err(libc::ENFILE));
    assert_eq!(client.mkdir(ROOT, "new").unwrap_err(), libc::ENFILE);
    assert!(
        !dir.path().join("new").exists(),
        "refused before it is made"
    );
    assert_eq!(client.lookup(ROOT, "a").unwrap().nodeid, a, "held already");
    assert_eq!(client.read(a, handle, 0, 10).unwrap(), b"");

    // Forgetting (twice looked up) makes room; there is no answer to it.
    client.forget(a, 2);
    let c = client.lookup(ROOT, "c").unwrap().nodeid;
    assert_eq!(client.lookup(ROOT, "d").unwrap_err(), libc::ENFILE);
    let one = ForgetOne {
        nodeid: c,
        nlookup: 1,
    };
    let batch = [&words_bytes(&[1, 0])[..], one.as_slice()].concat();
    let request = client.request(Opcode::BatchForget as u32, 0, &batch);
    client.raw(HIPRIO, &[&request], &[]);
    client.lookup(ROOT, "d").unwrap();
}

#[test]
fn a_listing_beyond_the_budget_names_files_without_holding_them() {
    let dir = tempfile::tempdir().unwrap();
    for index in 0..20 {
        std::fs::write(dir.path().join(format!("{index}")), b"").unwrap();
    }
    let mut client = Client::at(dir.path(), Budget::new(20));
    let names = client.list(ROOT, true);
    assert_eq!(names.len(), 20);
    let held = names
        .iter()
        .filter(|(_, _, entry)| entry.unwrap().nodeid != 0)
        .count();
    assert_eq!(held, 9, "ten less the directory's handle");
    // And the share's root.
    assert_eq!(open_below(dir.path()), held + 1 + 1);
}

#[test]
fn mounts_that_appear_later_are_crossed_and_do_not_share_numbers() {
    if !is_root() {
        return;
    }
    // In a thread with mounts of its own, which end with it.
    let test = std::thread::spawn(|| {
        // SAFETY: only this thread's mount namespace changes.
        if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0 {
            eprintln!("SKIPPED: mounting needs a mount namespace");
            return;
        }
        mount("none", Path::new("/"), "", libc::MS_REC | libc::MS_PRIVATE);
        let mut client = Client::new();
        let mut seen = Vec::new();
        for name in ["one", "two"] {
            client.mkdir(ROOT, name).unwrap();
            let before = client.lookup(ROOT, name).unwrap();
            let path = client.path().join(name);
            mount("tmpfs", &path, "tmpfs", 0);
            std::fs::write(path.join("file"), name).unwrap();
            let number = path.join("file").metadata().unwrap().ino();

            let dir = client.lookup(ROOT, name).unwrap();
            assert_ne!(dir.nodeid, before.nodeid, "the mount, not what it covers");
            let file = client.lookup(dir.nodeid, "file").unwrap();
            let handle = client.open(file.nodeid, libc::O_RDONLY).unwrap();
            let data = client.read(file.nodeid, handle, 0, 10).unwrap();
            assert_eq!(data, name.as_bytes());
            assert_eq!(client.list(dir.nodeid, true)[0].1, file.attr.ino);
            seen.push((number, file.attr.ino));
        }
        assert_eq!(seen[0].0, seen[1].0, "the same number on the host");
        assert_ne!(seen[0].1, seen[1].1, "not in the guest");
        for name in ["one", "two"] {
            let path = std::ffi::CString::new(client.path().join(name).to_str().unwrap()).unwrap();
            // SAFETY: a path of the test's own.
            unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
        }
    });
    test.join().unwrap();
}

fn mount(source: &str, target: &Path, kind: &str, flags: libc::c_ulong) {
    let text = |text: &str| std::ffi::CString::new(text).unwrap();
    let (source, target, kind) = (text(source), text(target.to_str().unwrap()), text(kind));
    // SAFETY: the strings live through the call; no data is passed.
    let done = unsafe {
        libc::mount(
            source.as_ptr(),
            target.as_ptr(),
            kind.as_ptr(),
            flags,
            std::ptr::null(),
        )
    };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn reset_lets_go_of_every_file() {
    let mut client = Client::new();
    for index in 0..50 {
        let name = format!("{index}");
        client.create(ROOT, &name, libc::O_RDWR, 0o600).unwrap();
    }
    assert_eq!(
        open_below(&client.path()),
        101,
        "each file twice, and the root"
    );
    assert!(client.driver.device.reset().is_some());
    assert_eq!(open_below(&client.path()), 1);
    assert!(client.driver.device.reset().is_none());
    assert!(matches!(
        client.driver.kick(HIPRIO),
        Err(DeviceError::State(_))
    ));
    client
        .driver
        .activate(client.driver.device.features())
        .unwrap();
    client.init().unwrap();
    client.lookup(ROOT, "7").unwrap();
}
