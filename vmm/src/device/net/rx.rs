//! From the tap to the driver.

use std::collections::VecDeque;
use std::io::ErrorKind;

use virtio_queue::{Queue, QueueT};
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryMmap, VolatileSlice,
};

use super::pieces::{self, MAX_PIECES};
use super::tap::Tap;
use super::used::Used;
use super::{HEADER, RX};
use crate::device::lent::{broken, pop};
use crate::device::{DeviceError, Resources};

/// Frames that are received before the event loop gets its turn.
const BATCH: usize = 64;

/// Where the header says how many chains a frame fills (`num_buffers`).
pub(super) const NUM_BUFFERS: usize = 10;

/// How a round of receiving ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Received {
    /// There is room for more: watch the tap.
    Watch,
    /// The driver has no room: it kicks when it has.
    Starved,
    /// The tap's interface exists no more.
    Gone,
}

/// A chain that the driver has offered. One that is not fit to receive in has no bytes.
struct Offered {
    head: u16,
    buffers: Vec<(GuestAddress, usize)>,
    len: usize,
}

/// The receiving side. Chains are taken from the ring ahead, because a frame's length is known only when it has
/// been read, and what does not fit is lost: there must be room for the largest. Those that are left when a call ends go
/// back, so that between calls the device holds none.
pub(super) struct Rx {
    offered: VecDeque<Offered>,
    bytes: usize,
    buffers: usize,
    /// The largest frame with its header.
    largest: usize,
    /// A frame may fill several chains (`VIRTIO_NET_F_MRG_RXBUF`).
    mergeable: bool,
    used: Used,
}

impl Rx {
    pub(super) fn new(largest: usize, mergeable: bool) -> Self {
        Self {
            offered: VecDeque::new(),
            bytes: 0,
            buffers: 0,
            largest,
            mergeable,
            used: Used::default(),
        }
    }

    /// Receives frames until there are none, a batch is done or the driver has no room.
    pub(super) fn receive(
        &mut self,
        tap: &Tap,
        resources: &mut Resources,
    ) -> Result<Received, DeviceError> {
        let memory = resources.memory.memory();
        let queue = resources.queue(RX)?;
        let received = self.frames(tap, queue, &memory);
        self.put_back(queue);
        let told = self.used.wants_interrupt(queue, &memory);
        if told.map_err(broken(RX))? {
            resources.interrupt.queue(RX);
        }
        received
    }

    fn frames(
        &mut self,
        tap: &Tap,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
    ) -> Result<Received, DeviceError> {
        for _ in 0..BATCH {
            if !self.has_room(queue, memory)? {
                return Ok(Received::Starved);
            }
            let room = self.room(memory);
            if room.is_empty() {
                self.finish(queue, memory, &room, 0)?;
                continue;
            }
            match tap.read(&room) {
                // No frame is empty: the other end of a socket was closed.
                Ok(0) => return Ok(Received::Gone),
                Ok(len) => self.finish(queue, memory, &room, len)?,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => return Ok(Received::Gone),
            }
        }
        Ok(Received::Watch)
    }

    /// Takes chains from the ring until there is room for the largest frame. If the driver has not offered so much,
    /// it will kick for the next chain. A driver that can never offer so much gets what fits.
    fn has_room(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
    ) -> Result<bool, DeviceError> {
        loop {
            if self.is_enough(queue) {
                return Ok(true);
            }
            let Some(chain) = pop(queue, memory, RX)? else {
                match queue.enable_notification(memory).map_err(broken(RX))? {
                    true => continue,
                    false => return Ok(false),
                }
            };
            queue.disable_notification(memory).map_err(broken(RX))?;
            let head = chain.head_index();
            let (buffers, len) = buffers(memory, chain).unwrap_or_default();
            if len == 0 && self.offered.is_empty() {
                // Given back empty: the driver sees a frame that is too short.
                let used = std::iter::once((head, 0));
                self.used.add(queue, memory, used).map_err(broken(RX))?;
                continue;
            }
            self.bytes = self.bytes.saturating_add(len);
            self.buffers = self.buffers.saturating_add(buffers.len());
            self.offered.push_back(Offered { head, buffers, len });
        }
    }

    fn is_enough(&self, queue: &Queue) -> bool {
        match self.mergeable {
            true => {
                self.bytes >= self.largest
                    || self.buffers >= MAX_PIECES
                    || self.offered.len() >= usize::from(queue.size())
            }
            false => !self.offered.is_empty(),
        }
    }

    /// Puts the chains that are left back into the ring. They are in its order, and the last that were taken.
    fn put_back(&mut self, queue: &mut Queue) {
        // No more than the ring has.
        let left = self.offered.len() as u16;
        queue.set_next_avail(queue.next_avail().wrapping_sub(left));
        self.offered.clear();
        (self.bytes, self.buffers) = (0, 0);
    }

    /// Where the next frame goes.
    fn room<'a>(&self, memory: &'a GuestMemoryMmap) -> Vec<VolatileSlice<'a>> {
        let chains = match self.mergeable {
            true => self.offered.len(),
            false => 1,
        };
        self.offered
            .iter()
            .take(chains)
            .flat_map(|chain| &chain.buffers)
            .filter_map(|&(address, len)| memory.get_slice(address, len).ok())
            .collect()
    }

    /// Gives the chains that a frame of `len` bytes fills back to the driver.
    fn finish(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
        room: &[VolatileSlice<'_>],
        len: usize,
    ) -> Result<(), DeviceError> {
        let mut rest = len.min(pieces::len(room));
        let mut filled = Vec::new();
        while rest > 0 || filled.is_empty() {
            let Some(chain) = self.offered.pop_front() else {
                break;
            };
            self.bytes = self.bytes.saturating_sub(chain.len);
            self.buffers = self.buffers.saturating_sub(chain.buffers.len());
            let used = rest.min(chain.len);
            rest -= used;
            filled.push((chain.head, u32::try_from(used).unwrap_or(u32::MAX)));
        }
        if len >= HEADER {
            let count = u16::try_from(filled.len()).unwrap_or(u16::MAX);
            put(room, NUM_BUFFERS, count.to_le_bytes());
        }
        self.used
            .add(queue, memory, filled.into_iter())
            .map_err(broken(RX))
    }
}

/// A chain's places and bytes; `None` if it is no chain to write to.
fn buffers(
    memory: &GuestMemoryMmap,
    chain: virtio_queue::DescriptorChain<&GuestMemoryMmap>,
) -> Option<(Vec<(GuestAddress, usize)>, usize)> {
    let places: Vec<_> = chain
        .clone()
        .take(MAX_PIECES + 1)
        .map(|descriptor| (descriptor.addr(), descriptor.len() as usize))
        .collect();
    let len = pieces::len(&pieces::of(memory, chain, true)?);
    // A buffer across two regions would be two pieces; no driver has one, and it is not worth a case.
    let whole = places
        .iter()
        .all(|&(address, len)| memory.get_slice(address, len).is_ok());
    (whole && len > 0).then_some((places, len))
}

/// Writes `bytes` at `offset` of `room`.
fn put(room: &[VolatileSlice<'_>], mut offset: usize, bytes: [u8; 2]) {
    let mut bytes = bytes.into_iter();
    for piece in room {
        while offset < piece.len() {
            let Some(byte) = bytes.next() else {
                return;
            };
            // Inside of the piece, so it cannot fail.
            let _ = piece.write_obj(byte, offset);
            offset += 1;
        }
        offset -= piece.len();
    }
}
