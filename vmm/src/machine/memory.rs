//! The guest's RAM: a memfd of the caller's, mapped shared, so that it can be given to others and saved; or a snapshot's
//! memory file, mapped privately: what the guest writes is its own, everything else is shared with its siblings.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryAtomic, GuestMemoryMmap, GuestRegionCollectionError,
    GuestRegionMmap,
};

use crate::boot::layout;
use crate::device::GuestMemory;

/// The least memory a machine may have: a kernel, its page structures and an agent need about this much.
pub const MIN_MEMORY_BYTES: u64 = 32 << 20;
/// The most: the size up to which the boot page tables, e820 and a memory slot have been thought through.
pub const MAX_MEMORY_BYTES: u64 = 1 << 40;

const PAGE_BYTES: u64 = 4096;

/// Memory that a machine has beyond that which it began with.
#[derive(Debug)]
pub struct AddedMemory {
    /// A memfd of `bytes`, to be mapped shared. None: it was saved as well, behind the other memory in its file.
    pub file: Option<File>,
    /// Whole blocks of [`mem::BLOCK_BYTES`](crate::device::mem::BLOCK_BYTES).
    pub bytes: u64,
}

impl AddedMemory {
    /// Its bytes in the file of the other memory.
    pub fn saved_bytes(&self) -> u64 {
        match self.file {
            Some(_) => 0,
            None => self.bytes,
        }
    }
}

/// Why guest memory could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Too little, too much, or not whole pages.
    #[error(
        "guest memory of {bytes} bytes: it must be whole 4 KiB pages, {MIN_MEMORY_BYTES} to {MAX_MEMORY_BYTES} bytes"
    )]
    Size {
        /// What was asked for.
        bytes: u64,
    },
    /// The file is shorter or longer than the memory that it should hold.
    #[error("guest memory of {bytes} bytes: its file has {file_bytes} bytes")]
    FileSize {
        /// What was asked for.
        bytes: u64,
        /// What the file has.
        file_bytes: u64,
    },
    /// The file's size could not be read.
    #[error("guest memory: reading the size of its file: {0}")]
    Stat(#[source] io::Error),
    /// `mmap` failed.
    #[error("guest memory: mapping {bytes} bytes for guest address {address:#x}: {source}")]
    Map {
        /// Guest-physical address of the range.
        address: u64,
        /// Bytes of the range.
        bytes: u64,
        /// Why it failed.
        #[source]
        source: MmapRegionError,
    },
    /// The ranges do not make an address space.
    #[error("guest memory: {0}")]
    Regions(#[from] GuestRegionCollectionError),
}

/// Maps `bytes` of guest memory from `file`, which must have exactly that size.
///
/// Nothing is populated or reserved: a page exists from its first touch on.
///
/// # Errors
/// See [`MemoryError`].
pub fn map(file: File, bytes: u64) -> Result<GuestMemory, MemoryError> {
    collect(map_ram(&Arc::new(file), bytes, bytes, libc::MAP_SHARED)?)
}

/// Maps `bytes` of guest memory from `file`, which must have exactly that size (and that of `added` that was saved) and is never
/// written: a page that the guest writes becomes this process's own. `added` lies behind it.
///
/// # Errors
/// See [`MemoryError`].
pub fn map_private(
    file: File,
    bytes: u64,
    added: Option<AddedMemory>,
) -> Result<GuestMemory, MemoryError> {
    let file = Arc::new(file);
    let saved = added.as_ref().map_or(0, AddedMemory::saved_bytes);
    let file_bytes = bytes.saturating_add(saved);
    let mut regions = map_ram(&file, bytes, file_bytes, libc::MAP_PRIVATE)?;
    if let Some(AddedMemory {
        file: own,
        bytes: more,
    }) = added
    {
        let start = layout::added_start(bytes);
        regions.push(match own {
            Some(own) => {
                check_file(&own, more)?;
                map_range(&Arc::new(own), 0, start, more, libc::MAP_SHARED)?
            }
            None => map_range(&file, bytes, start, more, libc::MAP_PRIVATE)?,
        });
    }
    collect(regions)
}

fn map_ram(
    file: &Arc<File>,
    bytes: u64,
    file_bytes: u64,
    sharing: libc::c_int,
) -> Result<Vec<GuestRegionMmap>, MemoryError> {
    if !(MIN_MEMORY_BYTES..=MAX_MEMORY_BYTES).contains(&bytes) || !bytes.is_multiple_of(PAGE_BYTES)
    {
        return Err(MemoryError::Size { bytes });
    }
    check_file(file, file_bytes)?;
    let mut regions = Vec::new();
    let mut offset = 0;
    for (address, len) in layout::ram_ranges(bytes) {
        regions.push(map_range(file, offset, address, len, sharing)?);
        offset += len;
    }
    Ok(regions)
}

fn check_file(file: &File, bytes: u64) -> Result<(), MemoryError> {
    let file_bytes = file.metadata().map_err(MemoryError::Stat)?.size();
    match file_bytes == bytes {
        true => Ok(()),
        false => Err(MemoryError::FileSize { bytes, file_bytes }),
    }
}

fn collect(regions: Vec<GuestRegionMmap>) -> Result<GuestMemory, MemoryError> {
    let memory = GuestMemoryMmap::from_regions(regions)?;
    Ok(GuestMemoryAtomic::new(memory))
}

pub(crate) fn map_range(
    file: &Arc<File>,
    offset: u64,
    address: u64,
    bytes: u64,
    sharing: libc::c_int,
) -> Result<GuestRegionMmap, MemoryError> {
    let size = usize::try_from(bytes).map_err(|_| MemoryError::Size { bytes })?;
    let mapping = MmapRegionBuilder::new(size)
        .with_file_offset(FileOffset::from_arc(Arc::clone(file), offset))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(sharing | libc::MAP_NORESERVE)
        .build()
        .map_err(|source| MemoryError::Map {
            address,
            bytes,
            source,
        })?;
    GuestRegionMmap::new(mapping, GuestAddress(address)).ok_or(MemoryError::Size { bytes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;
    use vm_memory::{Bytes, GuestAddressSpace, GuestMemory as _};

    fn memfd(bytes: u64) -> File {
        let fd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(bytes).unwrap();
        file
    }

    #[test]
    fn what_the_guest_writes_is_in_the_file() {
        let file = memfd(MIN_MEMORY_BYTES);
        let memory = map(file.try_clone().unwrap(), MIN_MEMORY_BYTES).unwrap();
        memory
            .memory()
            .write_obj(0x1122_3344u32, GuestAddress(0x1000))
            .unwrap();
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, 0x1000).unwrap();
        assert_eq!(bytes, 0x1122_3344u32.to_le_bytes());
    }

    #[test]
    fn memory_beyond_the_hole_goes_on_in_the_file() {
        let bytes = layout::HOLE_START + 0x2000;
        let file = memfd(bytes);
        let memory = map(file.try_clone().unwrap(), bytes).unwrap();
        let memory = memory.memory();
        let at = GuestAddress(layout::HIGH_RAM_START + 0x1ff8);
        memory.write_obj(7u64, at).unwrap();
        let mut read = [0; 8];
        file.read_exact_at(&mut read, bytes - 8).unwrap();
        assert_eq!(read, 7u64.to_le_bytes());
        assert!(
            memory
                .find_region(GuestAddress(layout::HOLE_START))
                .is_none()
        );
    }

    #[test]
    fn wrong_sizes_are_refused() {
        for bytes in [
            0,
            4096,
            MIN_MEMORY_BYTES - 4096,
            MIN_MEMORY_BYTES + 1,
            u64::MAX,
        ] {
            let error = map(memfd(MIN_MEMORY_BYTES), bytes).unwrap_err();
            assert!(matches!(error, MemoryError::Size { .. }), "{error}");
        }
        for file_bytes in [0, MIN_MEMORY_BYTES - 1, MIN_MEMORY_BYTES + 4096] {
            let error = map(memfd(file_bytes), MIN_MEMORY_BYTES).unwrap_err();
            assert!(matches!(error, MemoryError::FileSize { .. }), "{error}");
        }
    }
}
