//! Guest memory of a chain, checked.

use std::ops::Deref;

use virtio_queue::DescriptorChain;
use vm_memory::{GuestMemory, GuestMemoryMmap, VolatileSlice};

/// Most pieces of one frame: what one system call takes (`UIO_MAXIOV`). An indirect table could have 65,535 entries.
pub(super) const MAX_PIECES: usize = 1024;

/// A chain's buffers, each inside of a region of guest memory. `None` if one is outside, is not `writable` or not
/// readable as it should be, or if they are too many.
pub(super) fn of<'a, M>(
    memory: &'a GuestMemoryMmap,
    chain: DescriptorChain<M>,
    writable: bool,
) -> Option<Vec<VolatileSlice<'a>>>
where
    M: Deref<Target = GuestMemoryMmap> + Clone,
{
    let mut pieces = Vec::new();
    for descriptor in chain {
        if descriptor.is_write_only() != writable {
            return None;
        }
        for slice in memory.get_slices(descriptor.addr(), descriptor.len() as usize) {
            pieces.push(slice.ok()?);
        }
        if pieces.len() > MAX_PIECES {
            return None;
        }
    }
    Some(pieces)
}

/// Bytes in all. A chain has at most 2^32, and there are at most 2^16 of them.
pub(super) fn len(pieces: &[VolatileSlice<'_>]) -> usize {
    pieces.iter().map(VolatileSlice::len).sum()
}
