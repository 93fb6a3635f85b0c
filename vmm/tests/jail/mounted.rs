//! The file system device with a guest that has it mounted: saved and taken up by the threads that do so in the VMM.

use std::io;
use std::os::fd::RawFd;
use std::path::Path;
use std::sync::Arc;

use cella_vmm::device::fs::Fs;
use cella_vmm::device::{
    Device, GuestMemory, Interrupt, Readiness, Resources, SnapshotStep, Watcher,
};
use cella_vmm::jail::ThreadKind;
use fuse_backend_rs::abi::fuse_abi::{
    CreateIn, EntryOut, InHeader, InitIn, Opcode, OpenIn, OpenOut, OutHeader, ReadIn, WriteIn,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};

use crate::probe::{in_thread, say};

const ROOT: u64 = 1;
/// The queue of requests.
const REQUESTS: usize = 1;
const SIZE: u16 = 16;
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x800;
const REQUEST: u64 = 0x4000;
const REPLY: u64 = 0x8000;
const ROOM: u32 = 512;

struct Nobody;

impl Interrupt for Nobody {
    fn queue(&self, _: usize) {}
    fn config(&self) {}
}

impl Watcher for Nobody {
    fn watch(&self, _: RawFd, _: u64, _: Readiness) -> io::Result<()> {
        Ok(())
    }

    fn unwatch(&self, _: RawFd) -> io::Result<()> {
        Ok(())
    }
}

fn rings(queue: usize) -> u64 {
    queue as u64 * 0x1000
}

/// A guest's driver, which asks for one thing at a time.
pub struct Guest {
    device: Fs,
    memory: GuestMemory,
    asked: u16,
}

impl Guest {
    /// Made as in the VMM: in main, before a thread is confined.
    pub fn new() -> Self {
        let ranges = [(GuestAddress(0), 1 << 16)];
        let memory = GuestMemory::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
        let queues = (0..2).map(|index| {
            let mut queue = Queue::new(SIZE).unwrap();
            let base = rings(index) as u32;
            queue.set_desc_table_address(Some(base), Some(0));
            queue.set_avail_ring_address(Some(base + AVAILABLE as u32), Some(0));
            queue.set_used_ring_address(Some(base + USED as u32), Some(0));
            queue.set_ready(true);
            queue
        });
        let resources = Resources {
            memory: memory.clone(),
            queues: queues.collect(),
            interrupt: Arc::new(Nobody),
            features: 0,
        };
        let mut device = Fs::new("share", Path::new("/share/files")).unwrap();
        device.activate(resources, Arc::new(Nobody)).unwrap();
        Self {
            device,
            memory,
            asked: 0,
        }
    }

    fn descriptor(&self, index: u64, (address, len): (u64, u32), flags: u16, next: u16) {
        let memory = self.memory.memory();
        let at = |offset| GuestAddress(rings(REQUESTS) + index * 16 + offset);
        memory.write_obj(address, at(0)).unwrap();
        memory.write_obj(len, at(8)).unwrap();
        memory.write_obj(flags, at(12)).unwrap();
        memory.write_obj(next, at(14)).unwrap();
    }

    fn call(&mut self, opcode: Opcode, node: u64, body: &[u8]) -> io::Result<Vec<u8>> {
        let header = InHeader {
            len: (size_of::<InHeader>() + body.len()) as u32,
            opcode: opcode as u32,
            nodeid: node,
            uid: 1000,
            gid: 1001,
            ..InHeader::default()
        };
        let memory = self.memory.memory();
        let request = [header.as_slice(), body].concat();
        memory.write_slice(&request, GuestAddress(REQUEST)).unwrap();
        self.descriptor(0, (REQUEST, header.len), 1, 1);
        self.descriptor(1, (REPLY, ROOM), 2, 0);
        let available = rings(REQUESTS) + AVAILABLE;
        let slot = available + 4 + u64::from(self.asked % SIZE) * 2;
        memory.write_obj(0_u16, GuestAddress(slot)).unwrap();
        self.asked += 1;
        let index = GuestAddress(available + 2);
        memory.write_obj(self.asked, index).unwrap();
        self.device.kick(REQUESTS).unwrap();
        let reply: OutHeader = memory.read_obj(GuestAddress(REPLY)).unwrap();
        if reply.error != 0 {
            return Err(io::Error::from_raw_os_error(-reply.error));
        }
        let mut bytes = vec![0; reply.len as usize];
        memory.read_slice(&mut bytes, GuestAddress(REPLY)).unwrap();
        Ok(bytes.split_off(size_of::<OutHeader>()))
    }
}

/// The numbers that the guest goes on with.
#[derive(Clone, Copy)]
struct Numbers {
    directory: u64,
    list: u64,
    file: u64,
    handle: u64,
}

fn mount(guest: &mut Guest) -> Numbers {
    let init = InitIn {
        major: 7,
        minor: 33,
        max_readahead: 0,
        flags: !(1 << 30),
    };
    guest.call(Opcode::Init, 0, init.as_slice()).unwrap();
    let mode = [0xff, 1, 0, 0, 0, 0, 0, 0];
    let name = [&mode[..], b"mounted\0"].concat();
    let made = guest.call(Opcode::Mkdir, ROOT, &name).unwrap();
    let (entry, _) = made.split_at(size_of::<EntryOut>());
    let directory = EntryOut::from_slice(entry).unwrap().nodeid;
    let opened = guest
        .call(Opcode::Opendir, directory, OpenIn::default().as_slice())
        .unwrap();
    let list = OpenOut::from_slice(&opened).unwrap().fh;
    let create = CreateIn {
        flags: libc::O_RDWR as u32,
        mode: libc::S_IFREG | 0o600,
        ..CreateIn::default()
    };
    let name = [create.as_slice(), b"file\0"].concat();
    let made = guest.call(Opcode::Create, directory, &name).unwrap();
    let (entry, opened) = made.split_at(size_of::<EntryOut>());
    Numbers {
        directory,
        list,
        file: EntryOut::from_slice(entry).unwrap().nodeid,
        handle: OpenOut::from_slice(opened).unwrap().fh,
    }
}

fn go_on(guest: &mut Guest, numbers: Numbers) {
    let write = WriteIn {
        fh: numbers.handle,
        size: 5,
        flags: libc::O_RDWR as u32,
        ..WriteIn::default()
    };
    let body = [write.as_slice(), b"after"].concat();
    let written = guest.call(Opcode::Write, numbers.file, &body);
    say("write by the old handle", written.map(drop));
    let read = ReadIn {
        fh: numbers.list,
        size: 256,
        ..ReadIn::default()
    };
    let listed = guest.call(Opcode::Readdir, numbers.directory, read.as_slice());
    say("list by the old handle", listed.map(drop));
    let found = guest.call(Opcode::Lookup, numbers.directory, b"file\0");
    say("look up below the old directory", found.map(drop));
}

/// Saved and restored on the thread that has few calls; opened again on the one that has the server's.
pub fn play(mut first: Guest, mut second: Guest) {
    let (mut first, numbers) = in_thread(ThreadKind::Fs, move || {
        let numbers = mount(&mut first);
        (first, numbers)
    });
    let mut second = in_thread(ThreadKind::Main, move || {
        let mut own = Vec::new();
        let saved = first.device.snapshot(SnapshotStep::Save(&mut own));
        say("save", saved.map_err(io::Error::other));
        let restored = second.device.snapshot(SnapshotStep::Restore(&own));
        say("restore", restored.map_err(io::Error::other));
        second
    });
    in_thread(ThreadKind::Fs, move || go_on(&mut second, numbers));
}
