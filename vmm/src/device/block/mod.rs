//! The block device (virtio 1.2, section 5.2) over a raw image.
//!
//! Requests are done one after the other, in the driver's order, straight between guest memory and the file.

mod file;
mod request;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::GuestAddressSpace;

use super::lent::{Lent, broken, read_config};
use super::{Device, DeviceError, Resources, Watcher};
use request::Chain;

/// Bytes of a sector, the unit of every position and of the capacity, whatever the image's block size.
const SECTOR: u64 = 512;

const QUEUE_SIZES: [u16; 1] = [128];

/// Data buffers of a request: a ring's length less header and status.
const SEG_MAX: u32 = QUEUE_SIZES[0] as u32 - 2;

/// Ranges of a discard or write-zeroes request.
const MAX_RANGES: u32 = 16;

/// Sectors of one such range: 1 GiB, so that one request cannot keep the file busy for long.
const MAX_RANGE_SECTORS: u32 = 1 << 21;

/// Bytes of the device's id: the serial number, padded with zeros.
const ID_BYTES: usize = 20;

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The size cannot be read.
    #[error("reading the size of the image: {0}")]
    Size(#[source] std::io::Error),
    /// The size is no whole number of sectors.
    #[error("the image has {0} bytes, which is no multiple of 512 above 0")]
    Sectors(u64),
    /// The serial number is too long.
    #[error("serial number {0:?} is longer than 20 bytes")]
    Serial(String),
}

/// A virtio block device.
pub struct Block {
    image: file::Image,
    id: [u8; ID_BYTES],
    active: Lent,
}

impl Block {
    /// A disk with the contents of `file`, a raw image or a block device, and of its present size.
    ///
    /// # Errors
    /// See [`BlockError`].
    pub fn new(mut file: File, read_only: bool, serial: &str) -> Result<Self, BlockError> {
        let bytes = file.seek(SeekFrom::End(0)).map_err(BlockError::Size)?;
        if bytes == 0 || !bytes.is_multiple_of(SECTOR) {
            return Err(BlockError::Sectors(bytes));
        }
        let mut id = [0; ID_BYTES];
        id.get_mut(..serial.len())
            .ok_or_else(|| BlockError::Serial(serial.to_owned()))?
            .copy_from_slice(serial.as_bytes());
        Ok(Self {
            image: file::Image::new(file, bytes, read_only),
            id,
            active: Lent::default(),
        })
    }

    /// The configuration space (virtio 1.2, section 5.2.4); what is left zero has no feature bit.
    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| {
            if let Some(field) = config.get_mut(at..at + bytes.len()) {
                field.copy_from_slice(bytes);
            }
        };
        put(0, &(self.image.bytes() / SECTOR).to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        // Discard: sectors, ranges and alignment. Write zeroes: sectors, ranges and "may unmap".
        put(36, &MAX_RANGE_SECTORS.to_le_bytes());
        put(40, &MAX_RANGES.to_le_bytes());
        put(44, &1u32.to_le_bytes());
        put(48, &MAX_RANGE_SECTORS.to_le_bytes());
        put(52, &MAX_RANGES.to_le_bytes());
        put(56, &[1]);
        config
    }
}

impl Device for Block {
    fn id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let common = 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_FLUSH;
        common
            | match self.image.read_only() {
                true => 1 << VIRTIO_BLK_F_RO,
                false => 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES,
            }
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
        loop {
            let queue = resources.queue(index)?;
            queue.disable_notification(&*memory).map_err(broken)?;
            // An index that runs ahead of the ring is an error here.
            let chains: Vec<_> = queue.iter(memory.clone()).map_err(broken)?.collect();
            for chain in chains {
                let head = chain.head_index();
                let written = answer(&self.image, &self.id, Chain::new(&memory, chain));
                queue.add_used(&*memory, head, written).map_err(broken)?;
            }
            let more = queue.enable_notification(&*memory).map_err(broken)?;
            resources.notify(index)?;
            // A driver that never stops adding keeps this thread busy, and nobody else: vCPUs that are paused or
            // stopped add nothing.
            if !more {
                return Ok(());
            }
        }
    }

    fn reset(&mut self) -> Option<Resources> {
        self.active.give_back()
    }
}

/// Does one request, writes its status where there is a byte for it, and returns how many bytes of guest
/// memory were written.
fn answer(image: &file::Image, id: &[u8; ID_BYTES], chain: Option<Chain<'_>>) -> u32 {
    // Without a status byte there is no way to answer, and nothing is done.
    let Some(mut chain) = chain else {
        return 0;
    };
    let (status, written) = match request::Request::parse(&mut chain) {
        Ok(request) => request.perform(image, id, &chain),
        Err(status) => (status, 0),
    };
    match chain.finish(status) {
        true => written.saturating_add(1),
        false => 0,
    }
}
