//! Used rings, for a frame that fills several chains: the driver must see all of them at once (virtio 1.2,
//! section 5.1.6.4), which `add_used` of virtio-queue, one chain at a time, cannot do.

use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Error, Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Used chains of a queue, and how many of them the driver was not told of yet.
#[derive(Default)]
pub(super) struct Used {
    unannounced: u16,
}

impl Used {
    /// Gives `chains`, by their heads, back with the bytes written to each: all or, on an error, none.
    pub(super) fn add(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
        chains: impl Iterator<Item = (u16, u32)>,
    ) -> Result<(), Error> {
        let ring = queue.used_ring();
        let mut next = queue.next_used();
        let mut count = 0u16;
        for (head, len) in chains {
            let slot = next.checked_rem(queue.size()).unwrap_or_default();
            let mut entry = [0; 8];
            let (id, bytes) = entry.split_at_mut(4);
            id.copy_from_slice(&u32::from(head).to_le_bytes());
            bytes.copy_from_slice(&len.to_le_bytes());
            memory
                .write_slice(&entry, at(ring, 4 + 8 * u64::from(slot))?)
                .map_err(Error::GuestMemory)?;
            next = next.wrapping_add(1);
            count = count.wrapping_add(1);
        }
        memory
            .store(next.to_le(), at(ring, 2)?, Ordering::Release)
            .map_err(Error::GuestMemory)?;
        queue.set_next_used(next);
        self.unannounced = self.unannounced.wrapping_add(count);
        Ok(())
    }

    /// Whether the driver wants an interrupt for what was given back since the last call.
    pub(super) fn wants_interrupt(
        &mut self,
        queue: &Queue,
        memory: &GuestMemoryMmap,
    ) -> Result<bool, Error> {
        let new = std::mem::take(&mut self.unannounced);
        if new == 0 || !queue.event_idx_enabled() {
            return Ok(new > 0);
        }
        // The index must be out before the driver's wish is read.
        fence(Ordering::SeqCst);
        let place = at(queue.avail_ring(), 4 + 2 * u64::from(queue.size()))?;
        let event = memory
            .load(place, Ordering::Relaxed)
            .map(u16::from_le)
            .map_err(Error::GuestMemory)?;
        let passed = queue.next_used().wrapping_sub(event).wrapping_sub(1);
        Ok(passed < new)
    }
}

fn at(ring: u64, offset: u64) -> Result<GuestAddress, Error> {
    ring.checked_add(offset)
        .map(GuestAddress)
        .ok_or(Error::AddressOverflow)
}
