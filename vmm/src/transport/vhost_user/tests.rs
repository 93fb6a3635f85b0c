//! A front end that sets a device up, stops it and goes on, and those that break the protocol in every way.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use std::{fs::File, io::Write};

use proptest::prelude::*;
use rustix::fs::{MemfdFlags, SealFlags};
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::device::rng::Rng;
use crate::device::testing::{WRITE, descriptor};
use crate::machine::worker::Worker;

const BYTES: u64 = 1 << 20;
/// The front end's own name for the start of guest memory.
const NAME: u64 = 0x7000_0000;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const DATA: u64 = 0x4000;
const PATIENCE: Duration = Duration::from_secs(10);
const STOP: u64 = 7;

/// A transport with a random number device in an event loop of its own.
struct Bench {
    ended: Receiver<String>,
    stop: EventFd,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Bench {
    fn new() -> (Self, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut worker = Worker::new().unwrap();
        let (sender, ended) = channel();
        let sender = Mutex::new(sender);
        let on_end: OnEnd = Arc::new(move |why| lock(&sender).send(why).unwrap());
        let device = Box::new(Rng::new());
        let watcher = worker.watcher();
        let transport = VhostUserTransport::new("rng", device, 1, theirs, watcher, on_end);
        worker.add(transport).unwrap();
        let stop = EventFd::new(EFD_NONBLOCK).unwrap();
        worker.watch(stop.as_raw_fd(), STOP).unwrap();
        let thread = std::thread::spawn(move || {
            while worker.run_once().unwrap().is_empty() {}
            worker.shut_down();
        });
        let bench = Self {
            ended,
            stop,
            thread: Some(thread),
        };
        (bench, ours)
    }

    /// What was said when the connection ended; the loop must still run.
    #[track_caller]
    fn end(mut self) -> String {
        let why = self.ended.recv_timeout(PATIENCE).unwrap();
        self.stop.write(1).unwrap();
        self.thread.take().unwrap().join().unwrap();
        assert_eq!(self.ended.try_recv().ok(), None, "said once");
        why
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn memfd(seals: SealFlags) -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(rustix::fs::memfd_create("guest", flags).unwrap());
    file.set_len(BYTES).unwrap();
    rustix::fs::fcntl_add_seals(&file, seals).unwrap();
    file
}

/// A guest's memory and the front end of its hypervisor.
struct Guest {
    front: Frontend,
    memory: GuestMemoryMmap,
    file: Arc<File>,
    kick: EventFd,
    call: EventFd,
}

impl Guest {
    fn new(socket: UnixStream, seals: SealFlags) -> Self {
        let mut front = Frontend::from_stream(socket, 4);
        let features = front.get_features().unwrap();
        front.set_owner().unwrap();
        front.set_features(features).unwrap();
        let offered = front.get_protocol_features().unwrap();
        let wanted = VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::MQ;
        assert!(offered.contains(wanted));
        front.set_protocol_features(wanted).unwrap();
        let file = Arc::new(memfd(seals));
        let region = map_all(&file);
        Self {
            front,
            memory: region,
            file,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            call: EventFd::new(EFD_NONBLOCK).unwrap(),
        }
    }

    fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: BYTES,
            userspace_addr: NAME,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    fn rings() -> VringConfigData {
        VringConfigData {
            queue_max_size: 16,
            queue_size: 16,
            flags: 0,
            desc_table_addr: NAME + DESCRIPTORS,
            used_ring_addr: NAME + USED,
            avail_ring_addr: NAME + AVAILABLE,
            log_addr: None,
        }
    }

    fn start(&mut self, base: u16) {
        self.front.set_mem_table(&[self.region()]).unwrap();
        self.front.set_vring_num(0, 16).unwrap();
        self.front.set_vring_base(0, base).unwrap();
        self.front.set_vring_addr(0, &Self::rings()).unwrap();
        self.front.set_vring_call(0, &self.call).unwrap();
        self.front.set_vring_kick(0, &self.kick).unwrap();
        self.front.set_vring_enable(0, true).unwrap();
    }

    /// Starts a queue of `size` entries; the last request may fail.
    fn try_start(&mut self, size: u16, rings: &VringConfigData) {
        self.front.set_mem_table(&[self.region()]).unwrap();
        self.front.set_vring_num(0, size).unwrap();
        self.front.set_vring_addr(0, rings).unwrap();
        self.front.set_vring_kick(0, &self.kick).unwrap();
        let _ = self.front.set_vring_enable(0, true);
    }

    /// Offers the `number`-th buffer, of 32 bytes.
    fn offer(&self, number: u16) {
        let at = |base: u64, offset: u16| GuestAddress(base + u64::from(offset));
        let data = DATA + 64 * u64::from(number);
        let entry = descriptor(data, 32, WRITE, 0);
        let memory = &self.memory;
        memory
            .write_slice(&entry, at(DESCRIPTORS, number * 16))
            .unwrap();
        memory
            .write_obj(number, at(AVAILABLE, 4 + number * 2))
            .unwrap();
        memory.write_obj(number + 1, at(AVAILABLE, 2)).unwrap();
    }

    /// Waits for the interrupt, and returns how many buffers are used and what is in the last.
    fn interrupted(&self, number: u16) -> (u16, Vec<u8>) {
        // SAFETY: the descriptor is open for as long as `self` lives.
        let call = unsafe { std::os::fd::BorrowedFd::borrow_raw(self.call.as_raw_fd()) };
        let mut fds = [rustix::event::PollFd::new(
            &call,
            rustix::event::PollFlags::IN,
        )];
        let patience = PATIENCE.try_into().unwrap();
        assert_eq!(rustix::event::poll(&mut fds, Some(&patience)).unwrap(), 1);
        self.call.read().unwrap();
        let mut data = vec![0; 32];
        let at = GuestAddress(DATA + 64 * u64::from(number));
        self.memory.read_slice(&mut data, at).unwrap();
        (self.memory.read_obj(GuestAddress(USED + 2)).unwrap(), data)
    }
}

fn map_all(file: &Arc<File>) -> GuestMemoryMmap {
    let region = crate::machine::memory::map_range(file, 0, 0, BYTES, libc::MAP_SHARED).unwrap();
    GuestMemoryMmap::from_regions(vec![region]).unwrap()
}

#[test]
fn a_device_is_served_stopped_and_served_again() {
    let (bench, socket) = Bench::new();
    let mut guest = Guest::new(socket, SealFlags::SHRINK);
    assert_eq!(guest.front.get_queue_num().unwrap(), 1);
    // A buffer from before the device was started needs no kick.
    guest.offer(0);
    guest.start(0);
    let (used, data) = guest.interrupted(0);
    assert_eq!(used, 1);
    assert!(data.iter().any(|&byte| byte != 0));
    guest.offer(1);
    guest.kick.write(1).unwrap();
    assert_eq!(guest.interrupted(1).0, 2);

    // Stopped: it says how far it has come, and does nothing any more.
    assert_eq!(guest.front.get_vring_base(0).unwrap(), 2);
    guest.offer(2);
    guest.kick.write(1).unwrap();
    assert_eq!(guest.front.get_vring_base(0).unwrap(), 2);
    assert!(
        guest.call.read().is_err(),
        "a stopped device interrupts nobody"
    );
    guest.start(2);
    let (used, data) = guest.interrupted(2);
    assert_eq!(used, 3);
    assert!(data.iter().any(|&byte| byte != 0));

    drop(guest);
    assert!(bench.end().contains("closed the connection of device rng"));
}

#[test]
fn the_configuration_space_is_the_devices() {
    let (_bench, socket) = Bench::new();
    let mut guest = Guest::new(socket, SealFlags::SHRINK);
    let flags = VhostUserConfigFlags::empty();
    let (_, config) = guest.front.get_config(0, 8, flags, &[9; 8]).unwrap();
    assert_eq!(config, [0; 8], "a random number device has none");
}

/// Each of these ends the connection with a word, and nothing else.
#[test]
fn what_cannot_be_is_refused() {
    type Attack = fn(&mut Guest);
    let attacks: [(&str, SealFlags, Attack); 9] = [
        ("memory that can shrink", SealFlags::GROW, |guest| {
            let _ = guest.front.set_mem_table(&[guest.region()]);
        }),
        ("memory beyond its file", SealFlags::SHRINK, |guest| {
            let mut region = guest.region();
            region.memory_size = 2 * BYTES;
            let _ = guest.front.set_mem_table(&[region]);
        }),
        ("memory that overlaps", SealFlags::SHRINK, |guest| {
            let _ = guest.front.set_mem_table(&[guest.region(), guest.region()]);
        }),
        ("rings outside of memory", SealFlags::SHRINK, |guest| {
            guest.front.set_mem_table(&[guest.region()]).unwrap();
            let mut rings = Guest::rings();
            rings.used_ring_addr = NAME + BYTES;
            let _ = guest.front.set_vring_addr(0, &rings);
        }),
        (
            "rings that reach out of memory",
            SealFlags::SHRINK,
            |guest| {
                let mut rings = Guest::rings();
                rings.desc_table_addr = NAME + BYTES - 16;
                guest.try_start(16, &rings);
            },
        ),
        ("queues before memory", SealFlags::SHRINK, |guest| {
            guest.front.set_vring_kick(0, &guest.kick).unwrap();
            let _ = guest.front.set_vring_enable(0, true);
        }),
        (
            "a size that is no power of two",
            SealFlags::SHRINK,
            |guest| {
                guest.try_start(15, &Guest::rings());
            },
        ),
        ("a queue that is not there", SealFlags::SHRINK, |guest| {
            let _ = guest.front.set_vring_num(3, 16);
        }),
        ("a queue changed while in use", SealFlags::SHRINK, |guest| {
            guest.start(0);
            let _ = guest.front.set_vring_num(0, 8);
        }),
    ];
    for (what, seals, attack) in attacks {
        let (bench, socket) = Bench::new();
        let mut guest = Guest::new(socket, seals);
        attack(&mut guest);
        let why = bench.end();
        assert!(why.contains("what cannot be done"), "{what}: {why}");
    }
}

#[test]
fn a_kick_that_is_no_event_descriptor() {
    let (bench, socket) = Bench::new();
    let mut guest = Guest::new(socket, SealFlags::SHRINK);
    // A file is always ready, and cannot be watched.
    let file: OwnedFd = tempfile::tempfile().unwrap().into();
    // SAFETY: an owned descriptor, which nothing here reads or writes as an event descriptor.
    guest.kick =
        unsafe { std::os::fd::FromRawFd::from_raw_fd(std::os::fd::IntoRawFd::into_raw_fd(file)) };
    let _ = guest.front.set_vring_kick(0, &guest.kick);
    assert!(bench.end().contains("what cannot be done"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever comes: the connection ends with one word, and the loop goes on.
    #[test]
    fn rubbish_ends_the_connection(
        messages in prop::collection::vec(
            (0_u32..44, 0_u32..16, prop::collection::vec(any::<u8>(), 0..300), any::<bool>()),
            0..8,
        ),
    ) {
        let (bench, mut socket) = Bench::new();
        for (request, flags, body, honest) in messages {
            let len = match honest {
                true => body.len() as u32,
                false => u32::MAX,
            };
            let mut bytes = Vec::new();
            for word in [request, flags, len] {
                bytes.extend_from_slice(&word.to_le_bytes());
            }
            bytes.extend_from_slice(&body);
            // It may have been hung up on already.
            let _ = socket.write_all(&bytes);
        }
        let _ = socket.shutdown(std::net::Shutdown::Write);
        prop_assert!(bench.end().contains("rng"));
    }
}
