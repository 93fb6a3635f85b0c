//! A mock driver for device tests and fuzz targets: guest memory between guard pages, queues laid out in it,
//! an interrupt that counts and a watcher that polls. Whatever a device reads or writes outside of guest
//! memory next to it ends the test with a fault.

// Test support: a broken assumption must stop the test, and clippy knows only `#[cfg(test)]` as a test.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::{Queue, QueueT};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap, GuestRegionMmap};

use super::{Device, DeviceError, GuestMemory, Interrupt, Readiness, Resources, Watcher};

/// Guest-physical base and size of each region of the mock guest: a hole lies between them, guard pages
/// around each in the host's address space.
pub const REGIONS: [(u64, usize); 2] = [(0, 1 << 20), (1 << 32, 1 << 16)];

/// Where [`MockDriver::alloc`] starts: below are the rings, 8 KiB for each queue.
pub const DATA_BASE: u64 = 0x1_0000;

const RING_STRIDE: u64 = 0x2000;
const AVAIL_OFFSET: u64 = 0x1000;
const USED_OFFSET: u64 = 0x1800;
const MAX_SIZE: u16 = 64;
const PAGE: usize = 4096;

/// `VRING_DESC_F_NEXT`.
pub const NEXT: u16 = VRING_DESC_F_NEXT as u16;
/// `VRING_DESC_F_WRITE`.
pub const WRITE: u16 = VRING_DESC_F_WRITE as u16;
/// `VRING_DESC_F_INDIRECT`.
pub const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

/// A buffer that the driver offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Guest-physical address.
    pub address: u64,
    /// Bytes.
    pub len: u32,
    /// The device writes it (otherwise it reads it).
    pub writable: bool,
}

/// An entry of a used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// Index of the chain's first descriptor.
    pub head: u16,
    /// Bytes that the device says it wrote.
    pub len: u32,
}

/// Counts interrupts.
#[derive(Default)]
pub struct MockInterrupt {
    queues: [AtomicUsize; 8],
    config: AtomicUsize,
}

impl MockInterrupt {
    /// Interrupts so far for queue `index`.
    pub fn queue_count(&self, index: usize) -> usize {
        self.queues[index].load(Ordering::SeqCst)
    }

    /// Configuration interrupts so far.
    pub fn config_count(&self) -> usize {
        self.config.load(Ordering::SeqCst)
    }
}

impl Interrupt for MockInterrupt {
    fn queue(&self, index: usize) {
        self.queues[index].fetch_add(1, Ordering::SeqCst);
    }

    fn config(&self) {
        self.config.fetch_add(1, Ordering::SeqCst);
    }
}

/// Remembers what a device watches, and polls it on demand.
#[derive(Default)]
pub struct MockWatcher {
    watched: Mutex<BTreeMap<RawFd, (u64, Readiness)>>,
}

impl MockWatcher {
    /// The token and the interest of every watched descriptor.
    pub fn watched(&self) -> BTreeMap<RawFd, (u64, Readiness)> {
        self.watched.lock().unwrap().clone()
    }

    /// The tokens of the descriptors that are ready within `timeout`, hang-ups as both kinds of readiness.
    ///
    /// # Panics
    /// A device closed a descriptor that it still watches.
    pub fn ready(&self, timeout: Duration) -> Vec<(u64, Readiness)> {
        let watched = self.watched();
        let mut fds: Vec<PollFd<'_>> = watched
            .iter()
            .map(|(&fd, (_, interest))| {
                let mut flags = PollFlags::empty();
                flags.set(PollFlags::IN, interest.read);
                flags.set(PollFlags::OUT, interest.write);
                // SAFETY: the device under test keeps a watched descriptor open; poll(2) answers NVAL if it
                // does not, which is checked below.
                PollFd::from_borrowed_fd(unsafe { BorrowedFd::borrow_raw(fd) }, flags)
            })
            .collect();
        rustix::event::poll(&mut fds, Some(&timeout.try_into().unwrap())).unwrap();
        let both = PollFlags::HUP | PollFlags::ERR;
        fds.iter()
            .zip(&watched)
            .filter_map(|(polled, (fd, (token, _)))| {
                let got = polled.revents();
                assert!(!got.contains(PollFlags::NVAL), "watched fd {fd} is closed");
                let readiness = Readiness {
                    read: got.intersects(PollFlags::IN | both),
                    write: got.intersects(PollFlags::OUT | both),
                };
                (readiness != Readiness::default()).then_some((*token, readiness))
            })
            .collect()
    }
}

impl Watcher for MockWatcher {
    fn watch(&self, fd: RawFd, token: u64, interest: Readiness) -> std::io::Result<()> {
        self.watched.lock().unwrap().insert(fd, (token, interest));
        Ok(())
    }

    fn unwatch(&self, fd: RawFd) -> std::io::Result<()> {
        match self.watched.lock().unwrap().remove(&fd) {
            Some(_) => Ok(()),
            None => Err(std::io::ErrorKind::NotFound.into()),
        }
    }
}

/// Guest memory between guard pages. Lives longer than the device under test.
struct Guarded {
    mappings: Vec<(*mut libc::c_void, usize)>,
}

// SAFETY: the mappings are only unmapped, and only by the owner's drop.
unsafe impl Send for Guarded {}

impl Guarded {
    fn new() -> (Self, GuestMemory) {
        let mut mappings = Vec::new();
        let regions = REGIONS
            .iter()
            .map(|&(base, size)| {
                let whole = size + 2 * PAGE;
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
                // SAFETY: a new anonymous mapping at an address of the kernel's choice.
                let at = unsafe {
                    libc::mmap(std::ptr::null_mut(), whole, libc::PROT_NONE, flags, -1, 0)
                };
                assert_ne!(at, libc::MAP_FAILED, "mmap of {whole} bytes");
                mappings.push((at, whole));
                let prot = libc::PROT_READ | libc::PROT_WRITE;
                // SAFETY: `size` bytes after the first page are inside of the mapping just made.
                let inner = unsafe { at.byte_add(PAGE) };
                // SAFETY: as above.
                assert_eq!(unsafe { libc::mprotect(inner, size, prot) }, 0);
                // SAFETY: the range stays mapped until `Guarded` drops.
                let builder = unsafe {
                    MmapRegionBuilder::new(size)
                        .with_mmap_prot(prot)
                        .with_mmap_flags(flags)
                        .with_raw_mmap_pointer(inner.cast())
                };
                GuestRegionMmap::new(builder.build().unwrap(), GuestAddress(base)).unwrap()
            })
            .collect();
        let memory = GuestMemoryMmap::from_regions(regions).unwrap();
        (Self { mappings }, GuestMemory::new(memory))
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        for &(at, len) in &self.mappings {
            // SAFETY: mapped by `new` and used by nobody else: the device is dropped before (field order of
            // `MockDriver`).
            unsafe { libc::munmap(at, len) };
        }
    }
}

#[derive(Clone, Copy, Default)]
struct Ring {
    size: u16,
    next_descriptor: u16,
    avail: u16,
    used: u16,
}

/// A driver with `device` activated. Do not keep clones of its memory beyond its life.
pub struct MockDriver<D: Device> {
    /// The device under test.
    pub device: D,
    /// Counts what the device tells the driver.
    pub interrupt: Arc<MockInterrupt>,
    /// What the device watches.
    pub watcher: Arc<MockWatcher>,
    rings: Vec<Ring>,
    next_data: u64,
    memory: GuestMemory,
    _guarded: Guarded,
}

impl<D: Device> MockDriver<D> {
    /// Activates `device` with every feature that it offers. Queues have at most 64 descriptors.
    pub fn new(device: D) -> Self {
        let features = device.features();
        Self::with_features(device, features)
    }

    /// Activates `device` with `features`.
    pub fn with_features(device: D, features: u64) -> Self {
        let (guarded, memory) = Guarded::new();
        let sizes: Vec<u16> = device
            .queue_sizes()
            .iter()
            .map(|&size| size.min(MAX_SIZE))
            .collect();
        assert!(
            sizes.len() as u64 * RING_STRIDE <= DATA_BASE,
            "too many queues"
        );
        let mut driver = Self {
            device,
            interrupt: Arc::default(),
            watcher: Arc::default(),
            rings: sizes
                .iter()
                .map(|&size| Ring {
                    size,
                    ..Ring::default()
                })
                .collect(),
            next_data: DATA_BASE,
            memory,
            _guarded: guarded,
        };
        driver.activate(features).expect("activation");
        driver
    }

    /// Activates the device anew, after [`Device::reset`], with cleared rings.
    ///
    /// # Errors
    /// The device's.
    pub fn activate(&mut self, features: u64) -> Result<(), DeviceError> {
        let event_idx =
            features & (1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX) != 0;
        let mut queues = Vec::new();
        for index in 0..self.rings.len() {
            let base = ring_base(index);
            self.write(base, &[0; RING_STRIDE as usize]);
            let ring = &mut self.rings[index];
            *ring = Ring {
                size: ring.size,
                ..Ring::default()
            };
            let mut queue = Queue::new(ring.size).unwrap();
            queue.set_desc_table_address(Some(base as u32), Some(0));
            queue.set_avail_ring_address(Some((base + AVAIL_OFFSET) as u32), Some(0));
            queue.set_used_ring_address(Some((base + USED_OFFSET) as u32), Some(0));
            queue.set_event_idx(event_idx);
            queue.set_ready(true);
            queues.push(queue);
        }
        let resources = Resources {
            memory: self.memory.clone(),
            queues,
            interrupt: self.interrupt.clone(),
            features,
        };
        self.device.activate(resources, self.watcher.clone())
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Size of queue `queue`.
    pub fn queue_size(&self, queue: usize) -> u16 {
        self.rings[queue].size
    }

    /// Zeroed guest memory of `len` bytes, 16-byte aligned; it is never freed, but see [`Self::free_all`].
    pub fn alloc(&mut self, len: usize) -> u64 {
        let address = self.next_data;
        self.next_data = (address + len as u64).next_multiple_of(16);
        assert!(
            self.next_data <= REGIONS[0].1 as u64,
            "the mock guest's memory is used up"
        );
        self.write(address, &vec![0; len]);
        address
    }

    /// Makes all memory that [`Self::alloc`] gave out free again.
    pub fn free_all(&mut self) {
        self.next_data = DATA_BASE;
    }

    /// Guest memory that holds `bytes`.
    pub fn alloc_bytes(&mut self, bytes: &[u8]) -> u64 {
        let address = self.alloc(bytes.len());
        self.write(address, bytes);
        address
    }

    /// Writes guest memory.
    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.memory
            .memory()
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
    }

    /// Reads guest memory.
    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .memory()
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    /// Writes entry `index` of a queue's descriptor table as it is given, sane or not.
    pub fn set_descriptor(
        &self,
        queue: usize,
        index: u16,
        (address, len): (u64, u32),
        flags: u16,
        next: u16,
    ) {
        self.write(
            ring_base(queue) + u64::from(index) * 16,
            &descriptor(address, len, flags, next),
        );
    }

    /// Writes `head` into the next slot of the available ring and publishes it.
    pub fn publish(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let slot = ring_base(queue) + AVAIL_OFFSET + 4 + u64::from(ring.avail % ring.size) * 2;
        ring.avail = ring.avail.wrapping_add(1);
        let index = ring.avail;
        self.write(slot, &head.to_le_bytes());
        self.set_avail_index(queue, index);
    }

    /// Writes the available ring's index as it is given, sane or not.
    pub fn set_avail_index(&self, queue: usize, index: u16) {
        self.write(ring_base(queue) + AVAIL_OFFSET + 2, &index.to_le_bytes());
    }

    /// Offers `buffers` as one chain and returns its head. Descriptors are taken round robin: at most as many as
    /// the queue has may be in use at a time.
    pub fn offer(&mut self, queue: usize, buffers: &[Buffer]) -> u16 {
        let Ring {
            size,
            next_descriptor: head,
            ..
        } = self.rings[queue];
        assert!(!buffers.is_empty() && buffers.len() <= usize::from(size));
        for (position, buffer) in buffers.iter().enumerate() {
            let index = (head + position as u16) % size;
            let last = position + 1 == buffers.len();
            let flags = if last { 0 } else { NEXT } | if buffer.writable { WRITE } else { 0 };
            let place = (buffer.address, buffer.len);
            self.set_descriptor(queue, index, place, flags, (index + 1) % size);
        }
        self.rings[queue].next_descriptor = (head + buffers.len() as u16) % size;
        self.publish(queue, head);
        head
    }

    /// Offers a request of newly allocated buffers: `readable` hold these bytes, `writable` have these lengths.
    /// Returns the head and the writable buffers.
    pub fn request(
        &mut self,
        queue: usize,
        readable: &[&[u8]],
        writable: &[u32],
    ) -> (u16, Vec<Buffer>) {
        let mut buffers = Vec::new();
        for bytes in readable {
            let address = self.alloc_bytes(bytes);
            buffers.push(Buffer {
                address,
                len: bytes.len() as u32,
                writable: false,
            });
        }
        for &len in writable {
            let address = self.alloc(len as usize);
            buffers.push(Buffer {
                address,
                len,
                writable: true,
            });
        }
        let head = self.offer(queue, &buffers);
        (head, buffers.split_off(readable.len()))
    }

    /// What the device has used since the last call.
    pub fn used(&mut self, queue: usize) -> Vec<Used> {
        let base = ring_base(queue) + USED_OFFSET;
        let end = u16::from_le_bytes(self.read(base + 2, 2).try_into().unwrap());
        let Ring { size, mut used, .. } = self.rings[queue];
        let mut entries = Vec::new();
        while used != end {
            let entry = self.read(base + 4 + u64::from(used % size) * 8, 8);
            entries.push(Used {
                head: u32::from_le_bytes(entry[..4].try_into().unwrap()) as u16,
                len: u32::from_le_bytes(entry[4..].try_into().unwrap()),
            });
            used = used.wrapping_add(1);
        }
        self.rings[queue].used = end;
        entries
    }

    /// Kicks queue `queue`.
    ///
    /// # Errors
    /// The device's.
    pub fn kick(&mut self, queue: usize) -> Result<(), DeviceError> {
        self.device.kick(queue)
    }

    /// Waits up to `timeout` for watched descriptors and hands the ready ones to the device once; returns how
    /// many there were.
    ///
    /// # Errors
    /// The device's.
    pub fn run_events(&mut self, timeout: Duration) -> Result<usize, DeviceError> {
        let ready = self.watcher.ready(timeout);
        for &(token, readiness) in &ready {
            self.device.event(token, readiness)?;
        }
        Ok(ready.len())
    }

    /// Turns arbitrary bytes into a hostile queue: every 6 bytes become a descriptor whose address, length,
    /// flags and link may be sane, out of range, looping, overlapping or huge; the rest fills the first 4 KiB
    /// of data that sane descriptors point at. Publishes up to a queue full of heads and kicks nothing.
    pub fn scribble(&mut self, queue: usize, bytes: &[u8]) {
        let size = self.rings[queue].size;
        let mut input = bytes.iter().copied().chain(std::iter::repeat(0));
        let mut byte = || input.next().unwrap_or_default();
        let count = u16::from(byte()) % (size + 1);
        for index in 0..count {
            let place = hostile_place(byte(), byte(), byte(), byte());
            let flags = u16::from(byte()) & (NEXT | WRITE | INDIRECT);
            let link = u16::from(byte());
            let next = if link >= 250 { link << 8 } else { link % size };
            self.set_descriptor(queue, index, place, flags, next);
        }
        for _ in 0..=byte() % 8 {
            let head = u16::from(byte());
            self.publish(queue, if head >= 250 { head << 8 } else { head % size });
        }
        if byte() == 0xff {
            let index = u16::from_le_bytes([byte(), byte()]);
            self.set_avail_index(queue, index);
        }
        let used = usize::from(count) * 6;
        let data = bytes.get(used..).unwrap_or_default();
        self.write(DATA_BASE, &data[..data.len().min(PAGE)]);
    }
}

fn ring_base(queue: usize) -> u64 {
    queue as u64 * RING_STRIDE
}

/// A split-ring descriptor as it lies in memory (for indirect tables).
pub fn descriptor(address: u64, len: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}

fn hostile_place(kind: u8, at: u8, low: u8, high: u8) -> (u64, u32) {
    let len = u32::from(u16::from_le_bytes([low, high])) % 0x1100;
    let end = REGIONS[0].1 as u64;
    match kind % 12 {
        // Into the rings themselves.
        0 => (u64::from(at) * 64, len),
        // Just before, and across, the end of a region: into the guard page if unchecked.
        1 => (end - u64::from(at), len),
        2 => (REGIONS[1].0 + REGIONS[1].1 as u64 - u64::from(at), len),
        3 => (REGIONS[1].0 - u64::from(at), len),
        // Into the hole, and past everything.
        4 => (end + u64::from(at) * 4096, len),
        5 => (u64::MAX - u64::from(at), len),
        // Sane addresses with huge lengths.
        6 => (DATA_BASE + u64::from(at), u32::MAX - u32::from(low)),
        7 => (REGIONS[1].0 + u64::from(at), len),
        _ => (DATA_BASE + u64::from(at) * 16, len),
    }
}
