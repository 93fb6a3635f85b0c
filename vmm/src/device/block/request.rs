//! Requests of the driver: taken apart from descriptor chains, checked, done.

use std::ops::Deref;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestMemory, GuestMemoryMmap, VolatileSlice};

use super::file::Image;
use super::{ID_BYTES, MAX_RANGE_SECTORS, MAX_RANGES, SECTOR};

/// Most buffers of one request. A ring is 128 long; an indirect table could have 65,535 entries.
const MAX_BUFFERS: usize = 1024;

const HEADER: usize = 16;
const RANGE: usize = 16;

/// What a driver is told of its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Ok = VIRTIO_BLK_S_OK as isize,
    IoError = VIRTIO_BLK_S_IOERR as isize,
    Unsupported = VIRTIO_BLK_S_UNSUPP as isize,
}

/// Guest memory of a request, each buffer inside of a region: framing is the driver's choice (virtio 1.2, section
/// 2.7.4.1), so header, data and status may share buffers or span several.
pub(super) struct Chain<'a> {
    readable: Buffers<'a>,
    writable: Buffers<'a>,
    status: VolatileSlice<'a>,
    /// Every buffer is inside of guest memory, and readable ones come first.
    sound: bool,
}

impl<'a> Chain<'a> {
    /// Takes a chain apart; `None` if there is no status byte to answer in.
    pub(super) fn new<M>(memory: &'a GuestMemoryMmap, chain: DescriptorChain<M>) -> Option<Self>
    where
        M: Deref<Target = GuestMemoryMmap> + Clone,
    {
        let (mut readable, mut writable) = (Buffers::default(), Buffers::default());
        let mut sound = true;
        for descriptor in chain {
            let to_write = descriptor.is_write_only();
            sound &= to_write || writable.0.is_empty();
            let buffers = if to_write {
                &mut writable
            } else {
                &mut readable
            };
            for slice in memory.get_slices(descriptor.addr(), descriptor.len() as usize) {
                match slice {
                    Ok(slice) => buffers.0.push(slice),
                    Err(_) => {
                        sound = false;
                        break;
                    }
                }
            }
            if readable.0.len() + writable.0.len() > MAX_BUFFERS {
                return None;
            }
        }
        let status = writable.take_last_byte()?;
        Some(Self {
            readable,
            writable,
            status,
            sound,
        })
    }

    /// Writes the status; false if it could not be.
    pub(super) fn finish(&self, status: Status) -> bool {
        self.status.write_obj(status as u8, 0).is_ok()
    }
}

/// Guest memory in pieces, never empty ones.
#[derive(Default)]
pub(super) struct Buffers<'a>(Vec<VolatileSlice<'a>>);

impl<'a> Buffers<'a> {
    pub(super) fn slices(&self) -> &[VolatileSlice<'a>] {
        &self.0
    }

    /// Bytes in all; a chain has at most 2^32.
    pub(super) fn len(&self) -> u64 {
        self.0.iter().map(|slice| slice.len() as u64).sum()
    }

    fn take_last_byte(&mut self) -> Option<VolatileSlice<'a>> {
        loop {
            let last = self.0.pop()?;
            if let Some(at) = last.len().checked_sub(1) {
                let (rest, byte) = last.split_at(at).ok()?;
                self.0.push(rest);
                return Some(byte);
            }
        }
    }

    /// Copies the first `N` bytes out, once, and drops them from the front.
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        let mut filled = 0;
        let mut used = 0;
        while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            let slice = self.0.get_mut(used)?;
            let count = slice.copy_to(rest);
            filled += count;
            *slice = slice.offset(count).ok()?;
            if slice.is_empty() {
                used += 1;
            }
        }
        self.0.drain(..used);
        Some(bytes)
    }

    /// Copies `bytes` to the front, as far as there is room; returns how much.
    fn put(&self, mut bytes: &[u8]) -> usize {
        let all = bytes.len();
        for slice in &self.0 {
            let count = slice.len().min(bytes.len());
            let (now, later) = bytes.split_at(count);
            slice.copy_from(now);
            bytes = later;
        }
        all - bytes.len()
    }
}

/// A range of a discard or write-zeroes request, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    offset: u64,
    len: u64,
    unmap: bool,
}

/// A request as its header and, for ranges, its payload have it.
pub(super) enum Request {
    Read { offset: u64 },
    Write { offset: u64 },
    Flush,
    GetId,
    Discard(Vec<Range>),
    WriteZeroes(Vec<Range>),
}

impl Request {
    /// Reads the header, and what else is read of guest memory before the request is done: nothing is read twice,
    /// so that what was checked is what is used.
    pub(super) fn parse(chain: &mut Chain<'_>) -> Result<Self, Status> {
        if !chain.sound {
            return Err(Status::IoError);
        }
        let header = chain.readable.take::<HEADER>().ok_or(Status::IoError)?;
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let offset = || sector.checked_mul(SECTOR).ok_or(Status::IoError);
        match u32::from_le_bytes([k0, k1, k2, k3]) {
            VIRTIO_BLK_T_IN => Ok(Self::Read { offset: offset()? }),
            VIRTIO_BLK_T_OUT => Ok(Self::Write { offset: offset()? }),
            VIRTIO_BLK_T_FLUSH => Ok(Self::Flush),
            VIRTIO_BLK_T_GET_ID => Ok(Self::GetId),
            VIRTIO_BLK_T_DISCARD => ranges(chain, 0).map(Self::Discard),
            VIRTIO_BLK_T_WRITE_ZEROES => {
                ranges(chain, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP).map(Self::WriteZeroes)
            }
            _ => Err(Status::Unsupported),
        }
    }

    /// Does the request; returns its status and the bytes of data written to guest memory.
    pub(super) fn perform(
        &self,
        image: &Image,
        id: &[u8; ID_BYTES],
        chain: &Chain<'_>,
    ) -> (Status, u32) {
        let done = match self {
            Self::Read { offset } => image.read(*offset, &chain.writable),
            Self::Write { offset } => image.write(*offset, &chain.readable),
            Self::Flush => image.flush(),
            Self::GetId => return (Status::Ok, chain.writable.put(id) as u32),
            Self::Discard(ranges) => each(ranges, |range| image.discard(range.offset, range.len)),
            Self::WriteZeroes(ranges) => each(ranges, |range| {
                image.write_zeroes(range.offset, range.len, range.unmap)
            }),
        };
        match (done, self) {
            (Ok(()), Self::Read { .. }) => {
                let written = u32::try_from(chain.writable.len()).unwrap_or(u32::MAX);
                (Status::Ok, written)
            }
            (Ok(()), _) => (Status::Ok, 0),
            (Err(error), _) => (image.report(&error), 0),
        }
    }
}

fn each(
    ranges: &[Range],
    mut call: impl FnMut(&Range) -> std::io::Result<()>,
) -> std::io::Result<()> {
    ranges.iter().try_for_each(&mut call)
}

/// Reads the ranges of a discard or write-zeroes request whose flags may be `allowed`.
fn ranges(chain: &mut Chain<'_>, allowed: u32) -> Result<Vec<Range>, Status> {
    let len = chain.readable.len();
    if len == 0 || !len.is_multiple_of(RANGE as u64) || len / RANGE as u64 > u64::from(MAX_RANGES) {
        return Err(Status::IoError);
    }
    let mut ranges = Vec::new();
    while let Some(wire) = chain.readable.take::<RANGE>() {
        let [s0, s1, s2, s3, s4, s5, s6, s7, c0, c1, c2, c3, flags @ ..] = wire;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let count = u32::from_le_bytes([c0, c1, c2, c3]);
        let flags = u32::from_le_bytes(flags);
        if flags & !allowed != 0 {
            return Err(Status::Unsupported);
        }
        if count > MAX_RANGE_SECTORS {
            return Err(Status::IoError);
        }
        ranges.push(Range {
            offset: sector.checked_mul(SECTOR).ok_or(Status::IoError)?,
            len: u64::from(count) * SECTOR,
            unmap: flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0,
        });
    }
    Ok(ranges)
}
