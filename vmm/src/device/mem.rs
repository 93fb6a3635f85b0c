//! Memory that the guest takes into use while it runs (virtio 1.2, section 5.15): how a sandbox that goes on from a
//! template gets more memory than the template had.
//!
//! The device asks the guest from its first moment on to plug all that there is, and the guest plugs one block after the
//! other. That is bookkeeping: all of it is the guest's and mapped for it already, so that a guest that touches memory
//! which it has not plugged gets nothing that it was not given.

#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{Read, Write};
use std::ops::Range;
use std::sync::Arc;

use rustix::fs::FallocateFlags;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_MEM;
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};

use super::lent::{Lent, broken, read_config};
use super::{Device, DeviceError, Resources, SnapshotStep, Watcher};

const QUEUE_SIZES: [u16; 1] = [16];

/// Bytes of a block, the unit in which memory is plugged: a huge page of x86.
pub const BLOCK_BYTES: u64 = 2 << 20;

/// The region is a multiple of this: Linux takes only memory blocks into use of which no part lies behind the region. On x86
/// they have 128 MiB (`MIN_MEMORY_BLOCK_SIZE`) in a machine that began with less than 64 GiB.
const REGION_ALIGN: u64 = 128 << 20;

/// Memory that is not plugged may not be there: the end of the region is not
/// (`VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE` in linux/virtio_mem.h).
const UNPLUGGED_INACCESSIBLE: u32 = 1;

/// Bytes of `struct virtio_mem_req` and `struct virtio_mem_resp` (linux/virtio_mem.h).
const REQUEST_BYTES: usize = 24;
const RESPONSE_BYTES: usize = 10;
const CONFIG_BYTES: usize = 56;

/// A request's type.
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

/// A response's type, and how blocks are that were asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Ack,
    Error,
    State(BlockState),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BlockState {
    Plugged = 0,
    Unplugged = 1,
    Mixed = 2,
}

/// A virtio memory device.
pub struct Mem {
    /// Guest-physical address of its range.
    start: u64,
    /// What the range is mapped from, as long as the range, if it is this machine's alone.
    file: Option<File>,
    /// Of each block, whether the guest has it in use.
    plugged: Vec<bool>,
    active: Lent,
}

impl Mem {
    /// An inactive device whose range is at guest address `start`, of `bytes`: whole blocks. It is mapped, shared, from all of
    /// `file`; without one, privately from a snapshot.
    pub fn new(start: u64, bytes: u64, file: Option<File>) -> Self {
        let blocks = usize::try_from(bytes / BLOCK_BYTES).unwrap_or_default();
        Self {
            start,
            file,
            plugged: vec![false; blocks],
            active: Lent::default(),
        }
    }

    /// `struct virtio_mem_config`.
    fn config(&self) -> [u8; CONFIG_BYTES] {
        let bytes = |blocks: usize| (blocks as u64).saturating_mul(BLOCK_BYTES);
        let asked = bytes(self.plugged.len());
        let region = asked
            .checked_next_multiple_of(REGION_ALIGN)
            .unwrap_or(asked);
        let plugged = bytes(self.plugged.iter().filter(|plugged| **plugged).count());
        let mut config = [0; CONFIG_BYTES];
        // The second word is the NUMA node, which there is none of.
        let words = [BLOCK_BYTES, 0, self.start, region, region, plugged, asked];
        for (place, word) in config.chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        config
    }

    /// The blocks of a request; `None` if they are not all of the device's.
    fn blocks(&self, address: u64, count: u16) -> Option<Range<usize>> {
        let offset = address.checked_sub(self.start)?;
        let first = usize::try_from(offset / BLOCK_BYTES).ok()?;
        let end = first.checked_add(usize::from(count))?;
        let valid = offset.is_multiple_of(BLOCK_BYTES) && count > 0 && end <= self.plugged.len();
        valid.then_some(first..end)
    }

    fn state_of(&self, blocks: &Range<usize>) -> BlockState {
        let blocks = self.plugged.get(blocks.clone()).unwrap_or_default();
        match blocks.iter().filter(|plugged| **plugged).count() {
            0 => BlockState::Unplugged,
            count if count == blocks.len() => BlockState::Plugged,
            _ => BlockState::Mixed,
        }
    }

    fn perform(&mut self, request: [u8; REQUEST_BYTES]) -> Answer {
        let [
            t0,
            t1,
            _,
            _,
            _,
            _,
            _,
            _,
            address @ ..,
            c0,
            c1,
            _,
            _,
            _,
            _,
            _,
            _,
        ] = request;
        let blocks = self.blocks(u64::from_le_bytes(address), u16::from_le_bytes([c0, c1]));
        match (u16::from_le_bytes([t0, t1]), blocks) {
            (PLUG, Some(blocks)) => self.change(blocks, BlockState::Unplugged),
            (UNPLUG, Some(blocks)) => self.change(blocks, BlockState::Plugged),
            (UNPLUG_ALL, _) => self.set(0..self.plugged.len(), false),
            (STATE, Some(blocks)) => Answer::State(self.state_of(&blocks)),
            _ => Answer::Error,
        }
    }

    /// Plugs or unplugs blocks that all have to be in the state `from`.
    fn change(&mut self, blocks: Range<usize>, from: BlockState) -> Answer {
        match self.state_of(&blocks) == from {
            true => self.set(blocks, from == BlockState::Unplugged),
            false => Answer::Error,
        }
    }

    /// Memory that is given up goes back to the host. Not that of a snapshot: what the snapshot has of it would be there again.
    fn set(&mut self, blocks: Range<usize>, plugged: bool) -> Answer {
        if let Some(file) = self
            .file
            .as_ref()
            .filter(|_| !plugged && !blocks.is_empty())
        {
            let at = |block: usize| (block as u64).saturating_mul(BLOCK_BYTES);
            let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let (offset, bytes) = (at(blocks.start), at(blocks.len()));
            if rustix::fs::fallocate(file, punch, offset, bytes).is_err() {
                return Answer::Error;
            }
        }
        if let Some(blocks) = self.plugged.get_mut(blocks) {
            blocks.fill(plugged);
        }
        Answer::Ack
    }
}

impl Device for Mem {
    fn id(&self) -> u32 {
        VIRTIO_ID_MEM
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << UNPLUGGED_INACCESSIBLE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.config(), offset, data);
    }

    fn activate(
        &mut self,
        resources: Resources,
        _watcher: Arc<dyn Watcher + Send + Sync>,
    ) -> Result<(), DeviceError> {
        self.active.take_up(resources, QUEUE_SIZES.len())
    }

    fn kick(&mut self, index: usize) -> Result<(), DeviceError> {
        let resources = self.active.get()?;
        let memory = resources.memory.memory();
        let broken = broken(index);
        // As with the entropy device: one kick is at most a ring's length of work.
        let queue = resources.queue(index)?;
        let chains: Vec<_> = queue.iter(memory.clone()).map_err(broken)?.collect();
        for chain in chains {
            let head = chain.head_index();
            let answer = read(&memory, chain.clone()).map(|request| self.perform(request));
            let written = answer.map_or(0, |answer| write(&memory, chain, answer));
            let queue = self.active.get()?.queue(index)?;
            queue.add_used(&*memory, head, written).map_err(broken)?;
        }
        self.active.get()?.notify(index)
    }

    /// A byte for each block: 1 if it is plugged.
    fn snapshot(&mut self, step: SnapshotStep<'_>) -> Result<(), DeviceError> {
        match step {
            SnapshotStep::Save(own) => own.extend(self.plugged.iter().copied().map(u8::from)),
            SnapshotStep::Restore(own) => {
                if own.len() != self.plugged.len() || own.iter().any(|&byte| byte > 1) {
                    return Err(DeviceError::Snapshot("its blocks are not this memory's"));
                }
                for (block, byte) in self.plugged.iter_mut().zip(own) {
                    *block = *byte == 1;
                }
            }
        }
        Ok(())
    }

    fn reset(&mut self) -> Option<Resources> {
        self.active.give_back()
    }
}

/// Reads a request, once; `None` if the chain is too short or leaves guest memory. Without a request there is no answer.
fn read<M>(memory: &GuestMemoryMmap, chain: DescriptorChain<M>) -> Option<[u8; REQUEST_BYTES]>
where
    M: std::ops::Deref<Target = GuestMemoryMmap> + Clone,
{
    let mut request = [0; REQUEST_BYTES];
    chain.reader(memory).ok()?.read_exact(&mut request).ok()?;
    Some(request)
}

/// Writes a response, and returns how many bytes of it found room.
fn write<M>(memory: &GuestMemoryMmap, chain: DescriptorChain<M>, answer: Answer) -> u32
where
    M: std::ops::Deref<Target = GuestMemoryMmap> + Clone,
{
    /// `VIRTIO_MEM_RESP_ACK` and `VIRTIO_MEM_RESP_ERROR`.
    const ACK: u16 = 0;
    const ERROR: u16 = 3;
    let (kind, state) = match answer {
        Answer::Ack => (ACK, 0),
        Answer::Error => (ERROR, 0),
        Answer::State(state) => (ACK, state as u16),
    };
    let mut response = [0; RESPONSE_BYTES];
    let (head, tail) = response.split_at_mut(RESPONSE_BYTES - 2);
    tail.copy_from_slice(&state.to_le_bytes());
    if let Some(place) = head.first_chunk_mut() {
        *place = kind.to_le_bytes();
    }
    let written = chain.writer(memory).map(|mut room| {
        let _ = room.write_all(&response);
        room.bytes_written()
    });
    u32::try_from(written.unwrap_or_default()).unwrap_or_default()
}
