//! A queue's rings between the requests that set them up, and the way to the driver.

use std::fs::File;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::sync::Mutex;

use rustix::fs::OFlags;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::device::Interrupt;
use crate::transport::lock;

/// What the hypervisor has said of one queue.
#[derive(Default)]
pub(super) struct Ring {
    pub(super) size: u16,
    /// Guest addresses of the descriptor table, the available and the used ring.
    pub(super) addresses: Option<[u64; 3]>,
    /// The next available entry to look at.
    pub(super) base: u16,
    pub(super) kick: Option<EventFd>,
    pub(super) enabled: bool,
}

impl Ring {
    /// Whether the hypervisor wants the queue served.
    pub(super) fn is_started(&self) -> bool {
        self.enabled && self.kick.is_some()
    }

    /// The queue as the hypervisor has set it up. It chooses the size: `max` is what the device would have offered.
    pub(super) fn queue(
        &self,
        max: u16,
        event_idx: bool,
        memory: &GuestMemoryMmap,
    ) -> Result<Queue, virtio_queue::Error> {
        let mut queue = Queue::new(max.max(self.size))?;
        let Some([descriptors, available, used]) = self.addresses else {
            // Not handed over: it stays unused.
            return Ok(queue);
        };
        queue.try_set_size(self.size)?;
        queue.try_set_desc_table_address(GuestAddress(descriptors))?;
        queue.try_set_avail_ring_address(GuestAddress(available))?;
        queue.try_set_used_ring_address(GuestAddress(used))?;
        queue.set_event_idx(event_idx);
        queue.set_next_avail(self.base);
        let next_used = queue.used_idx(memory, std::sync::atomic::Ordering::Acquire)?;
        queue.set_next_used(next_used.0);
        queue.set_ready(true);
        if !queue.is_valid(memory) {
            return Err(virtio_queue::Error::QueueNotReady);
        }
        Ok(queue)
    }
}

/// Interrupts the driver through the descriptors that the hypervisor gave for it.
pub(super) struct Calls(Vec<Mutex<Option<EventFd>>>);

impl Calls {
    pub(super) fn new(queues: usize) -> Self {
        Self((0..queues).map(|_| Mutex::default()).collect())
    }

    pub(super) fn set(&self, index: usize, call: Option<EventFd>) {
        if let Some(slot) = self.0.get(index) {
            *lock(slot) = call;
        }
    }
}

impl Interrupt for Calls {
    fn queue(&self, index: usize) {
        if let Some(slot) = self.0.get(index)
            && let Some(call) = &*lock(slot)
        {
            // It fails when the counter is about to overflow, which is an interrupt too, or if it is no event
            // descriptor: the guest's loss.
            let _ = call.write(1);
        }
    }

    fn config(&self) {
        // The configuration space is the hypervisor's copy; no device of ours changes it.
    }
}

/// Takes a descriptor of the hypervisor's for an event descriptor that never blocks.
pub(super) fn event(file: File) -> std::io::Result<EventFd> {
    let flags = rustix::fs::fcntl_getfl(&file)?;
    if !flags.contains(OFlags::NONBLOCK) {
        rustix::fs::fcntl_setfl(&file, flags | OFlags::NONBLOCK)?;
    }
    // SAFETY: the descriptor is open and owned by nobody else.
    Ok(unsafe { EventFd::from_raw_fd(file.into_raw_fd()) })
}
