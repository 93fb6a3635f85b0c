//! Saved states that are not what a guest could have had.

use cella_proto::snapshot::{FsHandle, FsInode, FsState};
use proptest::prelude::*;
use protobuf::Message;

use super::client::{Client, ROOT};
use super::restore::{copied, restore, save};
use crate::device::DeviceError;

fn inode(number: u64, parent: u64, name: &str) -> FsInode {
    FsInode {
        number,
        lookups: 1,
        parent,
        name: name.into(),
        file_type: libc::S_IFDIR,
        ..FsInode::default()
    }
}

fn handle(number: u64, inode: u64) -> FsHandle {
    FsHandle {
        number,
        inode,
        directory: true,
        ..FsHandle::default()
    }
}

fn refused(inodes: Vec<FsInode>, handles: Vec<FsHandle>) -> String {
    let state = FsState {
        inodes,
        handles,
        ..FsState::default()
    };
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("share")).unwrap();
    let own = state.write_to_bytes().unwrap();
    match restore(dir, &own) {
        Err(DeviceError::Snapshot(reason)) => reason.to_owned(),
        other => panic!("{:?}", other.err()),
    }
}

#[test]
fn states_that_no_guest_could_have_are_refused() {
    let number = |number| refused(vec![inode(number, ROOT, "d")], vec![]);
    for wrong in [0, (1 << 62) + 1, u64::MAX] {
        assert!(number(wrong).contains("could hold"), "{wrong}");
    }
    assert!(number(ROOT).contains("same number"));
    let never = FsInode {
        lookups: 0,
        ..inode(2, ROOT, "d")
    };
    assert!(refused(vec![never], vec![]).contains("could hold"));
    let long = "x".repeat(256);
    for name in [".", "..", "a/b", "/", "a\0b", &long] {
        let reason = refused(vec![inode(2, ROOT, name)], vec![]);
        assert!(reason.contains("name"), "{name}: {reason}");
    }
    let twice = vec![inode(2, ROOT, "a"), inode(2, ROOT, "b")];
    assert!(refused(twice, vec![]).contains("same number"));
    for parent in [0, 2, 3, 9] {
        let circle = vec![inode(2, parent, "a"), inode(3, 2, "b")];
        assert!(refused(circle, vec![]).contains("before its directory"));
    }
    for wrong in [handle(0, ROOT), handle(u64::MAX, ROOT), handle(1, 9)] {
        assert!(refused(vec![], vec![wrong]).contains("could have"));
    }
    let twice = vec![handle(1, ROOT), handle(1, ROOT)];
    assert!(refused(vec![], twice).contains("same number"));
    // A budget of 1024 has room for 512.
    let many = (2..300)
        .map(|at| inode(at, ROOT, &at.to_string()))
        .collect();
    let open = (1..300).map(|at| handle(at, ROOT)).collect();
    assert!(refused(many, open).contains("more files"));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    // Cut, altered or of any content: refused, or a session in which something is missing.
    #[test]
    fn arbitrary_states_break_nothing(
        cut in 0..200_usize,
        changes in prop::collection::vec((0..200_usize, any::<u8>()), 0..4),
        other in prop::option::of(prop::collection::vec(any::<u8>(), 0..60)),
    ) {
        let mut client = Client::new();
        let dir = client.mkdir(ROOT, "dir").unwrap().nodeid;
        client.create(dir, "file", libc::O_RDWR, 0o600).unwrap();
        client.opendir(dir).unwrap();
        let mut own = save(&mut client).unwrap();
        for (at, byte) in changes {
            if let Some(old) = own.get_mut(at) {
                *old = byte;
            }
        }
        own.truncate(own.len().saturating_sub(cut));
        let own = other.unwrap_or(own);
        if let Ok(mut client) = restore(copied(&client), &own) {
            for node in 0..8 {
                let _ = client.getattr(node);
                let _ = client.read(node, 1, 0, 9);
                let _ = client.lookup(node, "file");
            }
            let _ = save(&mut client);
            client.init().unwrap();
            client.mkdir(ROOT, "still-works").unwrap();
        }
    }
}
