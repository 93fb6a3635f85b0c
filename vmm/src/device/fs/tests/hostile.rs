//! Guests that break the rules.

use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicBool, Ordering};

use fuse_backend_rs::abi::fuse_abi::{InHeader, IoctlIn, Opcode, OutHeader, ReadIn};
use proptest::prelude::*;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestAddressSpace};

use super::client::{Client, ROOT, cstr, words_bytes};
use crate::device::Device;
use crate::device::fs::REQUEST;
use crate::device::testing::Buffer;

const ESCAPES: [&str; 8] = ["..", ".", "", "../x", "/etc", "a/b", "/", "sub/../../x"];

// Where no request may leave a trace.
fn outside(client: &Client) -> std::path::PathBuf {
    client.path().parent().unwrap().join("x")
}

#[test]
fn names_cannot_lead_out_of_the_share() {
    let mut client = Client::new();
    client.mkdir(ROOT, "sub").unwrap();
    client.create(ROOT, "file", libc::O_RDWR, 0o600).unwrap();
    let sub = client.lookup(ROOT, "sub").unwrap().nodeid;
    let file = client.lookup(ROOT, "file").unwrap().nodeid;
    for name in ESCAPES {
        for parent in [ROOT, sub] {
            let refused = Some(libc::EINVAL);
            assert_eq!(client.lookup(parent, name).err(), refused, "{name}");
            assert_eq!(client.mkdir(parent, name).err(), refused, "{name}");
            assert_eq!(client.symlink(parent, name, "t").err(), refused, "{name}");
            let create = client.create(parent, name, libc::O_RDWR, 0o600);
            assert_eq!(create.err(), refused, "{name}");
            let fifo = words_bytes(&[libc::S_IFIFO | 0o600, 0, 0, 0]);
            let mknod = client.make(Opcode::Mknod, parent, &fifo, name);
            assert_eq!(mknod.err(), refused, "{name}");
            let link = client.make(Opcode::Link, parent, &file.to_le_bytes(), name);
            assert_eq!(link.err(), refused, "{name}");
            for opcode in [Opcode::Unlink, Opcode::Rmdir] {
                let answer = client.call(opcode, parent, &cstr(name), 64);
                assert_eq!(answer.err(), refused, "{name}");
            }
            for (old, new) in [("file", name), (name, "new")] {
                let body = [ROOT.to_le_bytes().to_vec(), cstr(old), cstr(new)].concat();
                let answer = client.call(Opcode::Rename, parent, &body, 64);
                // An empty second name is no name at all: the message is malformed.
                assert_eq!(answer.err(), refused, "{old} to {new}");
            }
        }
    }
    assert!(!outside(&client).exists());
    assert!(client.path().join("file").exists());
}

#[test]
fn symbolic_links_are_never_followed_by_the_server() {
    let mut client = Client::new();
    let secret = tempfile::tempdir().unwrap();
    std::fs::write(secret.path().join("file"), b"secret").unwrap();
    symlink(secret.path(), client.path().join("dir")).unwrap();
    symlink(secret.path().join("file"), client.path().join("file")).unwrap();
    symlink(secret.path().join("new"), client.path().join("new")).unwrap();

    let dir = client.lookup(ROOT, "dir").unwrap();
    assert_eq!(dir.attr.mode & libc::S_IFMT, libc::S_IFLNK);
    assert!(client.lookup(dir.nodeid, "file").is_err());
    assert!(client.opendir(dir.nodeid).is_err());
    assert!(client.mkdir(dir.nodeid, "made").is_err());

    let file = client.lookup(ROOT, "file").unwrap();
    for flags in [libc::O_RDONLY, libc::O_RDWR, libc::O_PATH] {
        assert!(client.open(file.nodeid, flags).is_err());
    }
    let target = client
        .call(Opcode::Readlink, file.nodeid, &[], 4096)
        .unwrap();
    assert_eq!(
        target,
        secret.path().join("file").to_str().unwrap().as_bytes()
    );

    // Creating does not follow either, not even with flags for which the kernel would.
    for name in ["file", "new", "dir"] {
        for flags in [
            libc::O_RDWR,
            libc::O_RDWR | libc::O_TRUNC,
            libc::O_PATH,
            libc::O_PATH | libc::O_DIRECTORY,
            libc::O_RDWR | libc::O_EXCL,
            libc::O_TMPFILE | libc::O_RDWR,
        ] {
            assert!(
                client.create(ROOT, name, flags, 0o600).is_err(),
                "{name} {flags:#o}"
            );
        }
    }
    assert!(!secret.path().join("new").exists());
    assert!(!secret.path().join("made").exists());
    assert_eq!(
        std::fs::read(secret.path().join("file")).unwrap(),
        b"secret"
    );
}

#[test]
fn special_files_are_not_opened_on_the_host() {
    let mut client = Client::new();
    let fifo = words_bytes(&[libc::S_IFIFO | 0o600, 0, 0, 0]);
    let node = client
        .make(Opcode::Mknod, ROOT, &fifo, "fifo")
        .unwrap()
        .nodeid;
    // Opening it would wait for ever.
    assert_eq!(client.open(node, libc::O_RDONLY), Err(libc::EBADF));
}

#[test]
fn unknown_inodes_and_handles_are_errors() {
    let mut client = Client::new();
    let (entry, handle) = client.create(ROOT, "file", libc::O_RDWR, 0o600).unwrap();
    for node in [0, 99, u64::MAX] {
        assert_eq!(client.lookup(node, "file").unwrap_err(), libc::EBADF);
        assert_eq!(client.getattr(node).unwrap_err(), libc::EBADF);
        assert_eq!(client.read(node, handle, 0, 10), Err(libc::EBADF));
    }
    for wrong in [0, handle + 1, u64::MAX] {
        assert_eq!(client.read(entry.nodeid, wrong, 0, 10), Err(libc::EBADF));
    }
    // The handle of one file does not open another.
    assert_eq!(client.read(ROOT, handle, 0, 10), Err(libc::EBADF));
}

#[test]
fn opcodes_that_do_not_exist_are_answered_so() {
    let mut client = Client::new();
    for opcode in [0, 7, 19, 47, 50, 51, 52, 53, 4096, 1 << 20, u32::MAX] {
        let request = client.request(opcode, ROOT, &[0; 64]);
        let answer = client.raw(REQUEST, &[&request], &[16, 256]);
        let answer = OutHeader::from_slice(&answer).expect("a header alone");
        assert_eq!(answer.error, -libc::ENOSYS, "opcode {opcode}");
    }
}

#[test]
fn requests_cut_short_are_used_up() {
    let mut client = Client::new();
    for opcode in 0..60_u32 {
        // Nothing that ends the session.
        if opcode == Opcode::Destroy as u32 {
            continue;
        }
        let whole = client.request(opcode, ROOT, &[0xa5; 100]);
        for len in [1, 8, 39, 40, 41, 60, 100] {
            client.raw(REQUEST, &[&whole[..len]], &[16, 256]);
        }
        // No room, or too little, for an answer; and no request at all.
        client.raw(REQUEST, &[&whole], &[]);
        client.raw(REQUEST, &[&whole], &[8]);
        client.raw(REQUEST, &[], &[256]);
    }
    client.lookup(ROOT, "none").unwrap_err();
    client.mkdir(ROOT, "still-works").unwrap();
}

#[test]
fn lengths_in_headers_are_not_believed() {
    let mut client = Client::new();
    for len in [0, 1, 39, 41, 1 << 20, (1 << 20) + 4096, u32::MAX] {
        let mut request = client.request(Opcode::Lookup as u32, ROOT, b"name\0");
        request[..4].copy_from_slice(&len.to_le_bytes());
        let answer = client.raw(REQUEST, &[&request], &[16, 256]);
        let answer = OutHeader::from_slice(&answer).expect("an error");
        assert!(answer.error < 0, "length {len}");
    }
    // Names without an end.
    let request = client.request(Opcode::Lookup as u32, ROOT, b"name");
    let answer = client.raw(REQUEST, &[&request], &[16, 256]);
    assert_eq!(OutHeader::from_slice(&answer).unwrap().error, -libc::EINVAL);
}

#[test]
fn huge_requests_allocate_nothing() {
    let mut client = Client::new();
    // 63 descriptors over the same 64 KiB: 4 MiB of input, more than any request has.
    let header = client.request(Opcode::Ioctl as u32, ROOT, &[]);
    let ioctl = IoctlIn {
        in_size: u32::MAX,
        ..IoctlIn::default()
    };
    client.driver.free_all();
    let bytes = [&header[..], ioctl.as_slice()].concat();
    let address = client.driver.alloc_bytes(&bytes);
    let mut buffers = vec![Buffer {
        address,
        len: bytes.len() as u32,
        writable: false,
    }];
    buffers.extend(
        [Buffer {
            address,
            len: 1 << 16,
            writable: false,
        }; 62],
    );
    client.driver.offer(REQUEST, &buffers);
    client.driver.kick(REQUEST).unwrap();
    assert_eq!(client.driver.used(REQUEST)[0].len, 0);

    // A listing with room for megabytes.
    let handle = client.opendir(ROOT).unwrap();
    for size in [1 << 24, u32::MAX] {
        let read = ReadIn {
            fh: handle,
            size,
            ..ReadIn::default()
        };
        let answer = client.call(Opcode::Readdir, ROOT, read.as_slice(), 4096);
        assert_eq!(answer, Err(libc::ENOMEM));
    }
}

#[test]
fn a_name_that_changes_while_it_is_read_cannot_lead_out() {
    let mut client = Client::new();
    client.mkdir(ROOT, "sub").unwrap();
    let request = client.request(
        Opcode::Mkdir as u32,
        ROOT,
        &[words_bytes(&[0o755, 0]), cstr("aa/xx")].concat(),
    );
    client.driver.free_all();
    let address = client.driver.alloc_bytes(&request);
    let reply = client.driver.alloc(256);
    let name = address + request.len() as u64 - 6;
    let memory = client.driver.memory().clone();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let guard = memory.memory();
            let mut turn = 0;
            while !stop.load(Ordering::Relaxed) {
                turn += 1;
                for (at, byte) in [b"../x\0\0", b"sub/..", b"new\0/.", b"......"][turn % 4]
                    .iter()
                    .enumerate()
                {
                    guard
                        .store(*byte, GuestAddress(name + at as u64), Ordering::Relaxed)
                        .unwrap();
                }
                // The header's length.
                let len = request.len() as u32 - (turn % 9) as u32;
                guard
                    .store(len, GuestAddress(address), Ordering::Relaxed)
                    .unwrap();
            }
        });
        for _ in 0..20_000 {
            let readable = Buffer {
                address,
                len: request.len() as u32,
                writable: false,
            };
            let writable = Buffer {
                address: reply,
                len: 256,
                writable: true,
            };
            client.driver.offer(REQUEST, &[readable, writable]);
            client.driver.kick(REQUEST).unwrap();
            assert_eq!(client.driver.used(REQUEST).len(), 1);
        }
        stop.store(true, Ordering::Relaxed);
    });
    let beside: Vec<_> = std::fs::read_dir(client.path().parent().unwrap())
        .unwrap()
        .collect();
    assert_eq!(beside.len(), 1, "{beside:?}");
    assert_eq!(
        std::fs::read_dir(client.path().join("sub"))
            .unwrap()
            .count(),
        0
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    // Descriptors of every broken kind: the guard pages of the mock's memory catch a touch outside.
    #[test]
    fn hostile_queues_break_nothing(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let mut client = Client::new();
        client.driver.scribble(REQUEST, &bytes);
        // An error means that the transport resets the device.
        let _ = client.driver.kick(REQUEST);
        client.driver.device.reset().unwrap();
        client.driver.activate(client.driver.device.features()).unwrap();
        client.init().unwrap();
        client.mkdir(ROOT, "still-works").unwrap();
        prop_assert!(!outside(&client).exists());
    }

    #[test]
    fn arbitrary_requests_break_nothing(
        opcode in 0..55_u32,
        node in 0..4_u64,
        body in prop::collection::vec(any::<u8>(), 0..200),
        len in prop::option::of(any::<u32>()),
        room in prop::collection::vec(0..300_u32, 0..3),
    ) {
        // Opcodes that could fill the disk are the fuzz target's, which runs with a limit.
        prop_assume!(opcode != Opcode::Fallocate as u32 && opcode != Opcode::Setattr as u32);
        let mut client = Client::new();
        client.create(ROOT, "file", libc::O_RDWR, 0o600).unwrap();
        let mut request = client.request(opcode, node, &body);
        if let Some(len) = len {
            request[..4].copy_from_slice(&len.to_le_bytes());
        }
        let (front, back) = request.split_at(size_of::<InHeader>());
        client.raw(REQUEST, &[front, back], &room);
        client.init().unwrap();
        client.mkdir(ROOT, "still-works").unwrap();
        prop_assert!(!outside(&client).exists());
    }
}
