//! The guest's memory as the hypervisor gives it: regions of files, at guest addresses, and at addresses of the
//! hypervisor's own, by which it names the rings.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::sync::Arc;

use rustix::fs::SealFlags;
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::{GuestMemoryMmap, GuestRegionMmap};

use crate::machine::memory::map_range;

/// What the hypervisor calls a range of guest memory.
struct Named {
    hypervisor: u64,
    guest: u64,
    bytes: u64,
}

/// The table of a `SET_MEM_TABLE`.
#[derive(Default)]
pub(super) struct Table {
    names: Vec<Named>,
    /// Where the regions are mapped in this process.
    pub(super) mapped: Vec<Range<u64>>,
}

impl Table {
    /// Maps the regions. A file must be a memfd that is sealed against shrinking: the hypervisor could take memory
    /// away under the mapping otherwise, and end this process by `SIGBUS`. So could a mapping beyond the file's end.
    pub(super) fn map(
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
    ) -> io::Result<(Self, GuestMemoryMmap)> {
        let mut table = Self::default();
        let mut mapped = Vec::new();
        for (region, mut file) in regions.iter().zip(files) {
            // Copied out of a packed structure.
            let (guest, bytes) = (region.guest_phys_addr, region.memory_size);
            let (hypervisor, offset) = (region.user_addr, region.mmap_offset);
            let seals = rustix::fs::fcntl_get_seals(&file)?;
            if !seals.contains(SealFlags::SHRINK) {
                return Err(io::Error::other(
                    "guest memory that can be taken away again",
                ));
            }
            let end = offset.checked_add(bytes);
            let size = file.seek(SeekFrom::End(0))?;
            if end.is_none_or(|end| end > size) {
                return Err(io::Error::other("guest memory that its file does not hold"));
            }
            let region: GuestRegionMmap =
                map_range(&Arc::new(file), offset, guest, bytes, libc::MAP_SHARED)
                    .map_err(io::Error::other)?;
            let start = region.as_ptr() as u64;
            table.mapped.push(start..start.saturating_add(bytes));
            table.names.push(Named {
                hypervisor,
                guest,
                bytes,
            });
            mapped.push(region);
        }
        let memory = GuestMemoryMmap::from_regions(mapped).map_err(io::Error::other)?;
        Ok((table, memory))
    }

    /// The guest address of what is at `address` of the hypervisor's.
    pub(super) fn guest_address(&self, address: u64) -> Option<u64> {
        self.names.iter().find_map(|named| {
            let offset = address.checked_sub(named.hypervisor)?;
            (offset < named.bytes).then(|| named.guest.checked_add(offset))?
        })
    }
}
