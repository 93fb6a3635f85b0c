//! The guest's memory on disk: only pages that hold something are written, each at its place; the rest are holes.
//!
//! The file is mapped by whoever goes on from it and never read whole, so that no digest of all of it can be checked. A few
//! pages spread over it are: a memory file that was cut, replaced or belongs to another state is found out by them.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use cella_proto::snapshot::Page;
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use sha2::{Digest, Sha256};
use vm_memory::{
    Bytes, GuestMemory as _, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress,
};

use super::SnapshotError;

const PAGE: usize = 4096;
/// Pages looked at in one go.
const BATCH: usize = 64;
/// The most pages whose content is checked before a machine goes on.
const SAMPLES: usize = 32;

/// Writes what `memory` holds to `file`, which is as long as the memory is and has holes only; returns samples of it.
///
/// # Errors
/// The memory cannot be read, or the file not be written.
pub fn write(memory: &GuestMemoryMmap, file: &File) -> Result<Vec<Page>, SnapshotError> {
    let io = |source| SnapshotError::Io {
        action: "writing the snapshot's memory",
        source,
    };
    let len = file.metadata().map_err(io)?.len();
    let bytes = memory.iter().map(GuestMemoryRegion::len).sum::<u64>();
    if len != bytes {
        return Err(SnapshotError::MemoryLength {
            found: len,
            expected: bytes,
        });
    }
    let mut out = Out {
        file,
        samples: Samples::default(),
    };
    let mut base = 0;
    for region in memory.iter() {
        let mut at = 0;
        while let Some((start, end)) = next_used(region, at).map_err(io)? {
            out.copy(region, base, start, end).map_err(io)?;
            at = end;
        }
        base += region.len();
    }
    Ok(out.samples.pages)
}

/// Checks that `file` has `bytes` bytes, the sampled pages among them.
///
/// # Errors
/// [`SnapshotError::MemoryLength`] or [`SnapshotError::Memory`]: it has not.
pub fn check(file: &File, bytes: u64, samples: &[Page]) -> Result<(), SnapshotError> {
    let action = "reading the snapshot's memory";
    let found = file.metadata().map_err(SnapshotError::io(action))?.len();
    if found != bytes {
        return Err(SnapshotError::MemoryLength {
            found,
            expected: bytes,
        });
    }
    let mut page = [0; PAGE];
    for sample in samples {
        file.read_exact_at(&mut page, sample.offset)
            .map_err(SnapshotError::io(action))?;
        if Sha256::digest(page).as_slice() != sample.sha256 {
            return Err(SnapshotError::Memory {
                offset: sample.offset,
            });
        }
    }
    Ok(())
}

/// The next range of `region` from `at` on that may hold something. Memory that is a private mapping has pages that its
/// file does not know of: all of it counts.
fn next_used(region: &GuestRegionMmap, at: u64) -> io::Result<Option<(u64, u64)>> {
    let len = region.len();
    if at >= len {
        return Ok(None);
    }
    let shared = region.flags() & libc::MAP_SHARED != 0;
    let Some(backing) = region.file_offset().filter(|_| shared) else {
        return Ok(Some((at, len)));
    };
    let (file, first) = (backing.file(), backing.start());
    let start = match rustix::fs::seek(file, SeekFrom::Data(first + at)) {
        Ok(start) => start - first,
        // Nothing but a hole up to the file's end.
        Err(Errno::NXIO) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    if start >= len {
        return Ok(None);
    }
    let end = rustix::fs::seek(file, SeekFrom::Hole(first + start))? - first;
    Ok(Some((start, end.min(len))))
}

struct Out<'a> {
    file: &'a File,
    samples: Samples,
}

impl Out<'_> {
    /// Writes the pages of `region` from `start` to `end` that are not all zero; the region begins at `base` of the file.
    fn copy(
        &mut self,
        region: &GuestRegionMmap,
        base: u64,
        start: u64,
        end: u64,
    ) -> io::Result<()> {
        let mut buffer = vec![0; BATCH * PAGE];
        let mut at = start;
        while at < end {
            let len = (end - at).min(buffer.len() as u64) as usize;
            let batch = buffer.get_mut(..len).unwrap_or_default();
            region
                .read_slice(batch, MemoryRegionAddress(at))
                .map_err(io::Error::other)?;
            self.write_used(batch, base + at)?;
            at += len as u64;
        }
        Ok(())
    }

    /// Writes each run of used pages of `batch`, whose first byte belongs at `offset`.
    fn write_used(&mut self, batch: &[u8], offset: u64) -> io::Result<()> {
        let mut run = 0..0;
        for (index, page) in batch.chunks(PAGE).enumerate() {
            let begin = index * PAGE;
            if is_zero(page) {
                self.flush(batch, run.clone(), offset)?;
                run = begin + page.len()..begin + page.len();
            } else {
                self.samples.take(page, offset + begin as u64);
                run.end = begin + page.len();
            }
        }
        self.flush(batch, run, offset)
    }

    fn flush(&self, batch: &[u8], run: std::ops::Range<usize>, offset: u64) -> io::Result<()> {
        let at = offset + run.start as u64;
        match batch.get(run) {
            Some(bytes) if !bytes.is_empty() => self.file.write_all_at(bytes, at),
            _ => Ok(()),
        }
    }
}

fn is_zero(page: &[u8]) -> bool {
    // By words: guest memory is hundreds of megabytes.
    let (words, rest) = page.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|&byte| byte == 0)
}

/// Digests of pages that lie evenly among those written, without knowing beforehand how many there will be.
#[derive(Default)]
struct Samples {
    pages: Vec<Page>,
    seen: usize,
    // Every page of a number that this divides is taken: a power of two less one, as a mask.
    mask: usize,
}

impl Samples {
    fn take(&mut self, page: &[u8], offset: u64) {
        let number = self.seen;
        self.seen = self.seen.wrapping_add(1);
        if number & self.mask != 0 {
            return;
        }
        if self.pages.len() >= SAMPLES {
            let mut keep = false;
            self.pages.retain(|_| {
                keep = !keep;
                keep
            });
            self.mask = self.mask << 1 | 1;
            if number & self.mask != 0 {
                return;
            }
        }
        self.pages.push(Page {
            offset,
            sha256: Sha256::digest(page).to_vec(),
            ..Page::default()
        });
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use vm_memory::{GuestAddress, GuestAddressSpace};

    use super::*;
    use crate::boot::layout;
    use crate::machine::memory::{self, AddedMemory, MIN_MEMORY_BYTES};

    fn memfd() -> File {
        let fd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(MIN_MEMORY_BYTES).unwrap();
        file
    }

    fn target() -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(MIN_MEMORY_BYTES).unwrap();
        file
    }

    #[test]
    fn used_pages_alone_are_written_and_come_back() {
        let memory = memory::map(memfd(), MIN_MEMORY_BYTES).unwrap();
        let places = [0, 0x5ff8, 0x10_0000, MIN_MEMORY_BYTES - 8];
        for at in places {
            memory
                .memory()
                .write_obj(at ^ 0x55, GuestAddress(at))
                .unwrap();
        }
        // Touched, and zero again.
        memory
            .memory()
            .write_obj(0_u64, GuestAddress(0x20_0000))
            .unwrap();
        let file = target();
        let samples = write(&memory.memory(), &file).unwrap();
        assert_eq!(samples.len(), 4);
        assert_eq!(file.metadata().unwrap().blocks() * 512, 4 * 4096);
        check(&file, MIN_MEMORY_BYTES, &samples).unwrap();
        let clone = memory::map_private(file.try_clone().unwrap(), MIN_MEMORY_BYTES, None).unwrap();
        for at in places {
            let value: u64 = clone.memory().read_obj(GuestAddress(at)).unwrap();
            assert_eq!(value, at ^ 0x55);
        }
        // What a clone writes stays its own, and is in a snapshot of it.
        let at = GuestAddress(0x30_0000);
        clone.memory().write_obj(9_u64, at).unwrap();
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at.0).unwrap();
        assert_eq!(bytes, [0; 8]);
        let second = target();
        assert_eq!(write(&clone.memory(), &second).unwrap().len(), 5);
        assert_eq!(second.metadata().unwrap().blocks() * 512, 5 * 4096);
    }

    #[test]
    fn added_memory_lies_behind_the_rest_and_comes_back() {
        let bytes = MIN_MEMORY_BYTES;
        let added = |file| Some(AddedMemory { file, bytes });
        let memory = memory::map_private(memfd(), bytes, added(Some(memfd()))).unwrap();
        let places = [0x1000, layout::added_start(bytes) + 0x2000];
        for at in places {
            memory.memory().write_obj(at, GuestAddress(at)).unwrap();
        }
        let file = target();
        assert!(matches!(
            write(&memory.memory(), &file),
            Err(SnapshotError::MemoryLength { .. })
        ));
        file.set_len(2 * bytes).unwrap();
        assert_eq!(write(&memory.memory(), &file).unwrap().len(), 2);
        assert_eq!(file.metadata().unwrap().blocks() * 512, 2 * 4096);
        let restored = memory::map_private(file.try_clone().unwrap(), bytes, added(None)).unwrap();
        for at in places {
            let value: u64 = restored.memory().read_obj(GuestAddress(at)).unwrap();
            assert_eq!(value, at);
        }
        // Its own from there on.
        restored
            .memory()
            .write_obj(0_u64, GuestAddress(places[1]))
            .unwrap();
        assert_eq!(file.metadata().unwrap().blocks() * 512, 2 * 4096);
        file.set_len(bytes).unwrap();
        assert!(memory::map_private(file, bytes, added(None)).is_err());
    }

    #[test]
    fn samples_find_an_altered_file_out() {
        let memory = memory::map(memfd(), MIN_MEMORY_BYTES).unwrap();
        let pages = 1000;
        for page in 0..pages {
            let at = GuestAddress(page * 4096);
            memory.memory().write_obj(page + 1, at).unwrap();
        }
        let file = target();
        let samples = write(&memory.memory(), &file).unwrap();
        assert!((16..=SAMPLES).contains(&samples.len()));
        let last = samples.last().unwrap().offset;
        assert!(last > pages / 2 * 4096, "they end at {last:#x}");
        file.write_all_at(b"altered", last + 99).unwrap();
        let error = check(&file, MIN_MEMORY_BYTES, &samples).unwrap_err();
        assert!(matches!(error, SnapshotError::Memory { offset } if offset == last));
        file.set_len(last).unwrap();
        assert!(matches!(
            check(&file, MIN_MEMORY_BYTES, &samples),
            Err(SnapshotError::MemoryLength { .. })
        ));
    }

    #[test]
    fn a_file_of_another_length_and_a_full_disk_are_refused() {
        let memory = memory::map(memfd(), MIN_MEMORY_BYTES).unwrap();
        memory
            .memory()
            .write_obj(1_u8, GuestAddress(0x1000))
            .unwrap();
        let short = tempfile::tempfile().unwrap();
        assert!(matches!(
            write(&memory.memory(), &short),
            Err(SnapshotError::MemoryLength { found: 0, .. })
        ));
        let full = File::from(
            rustix::fs::memfd_create("full", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap(),
        );
        full.set_len(MIN_MEMORY_BYTES).unwrap();
        rustix::fs::fcntl_add_seals(&full, rustix::fs::SealFlags::WRITE).unwrap();
        assert!(matches!(
            write(&memory.memory(), &full),
            Err(SnapshotError::Io { .. })
        ));
    }
}
