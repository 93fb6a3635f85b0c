//! The guest's page tables, walked as the processor does for an access by the guest's kernel: with the
//! permissions that `KVM_TRANSLATE` does not look at, and leaving accessed and dirty bits behind
//! (Intel SDM volume 3, section 4.5).

use std::sync::atomic::{AtomicU64, Ordering};

use kvm_bindings::kvm_sregs;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, VolatileMemory};

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
/// Bits 12 to 51 of an entry: a physical address.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const PAGE_BITS: u32 = 12;
const PAGE_BYTES: u64 = 1 << PAGE_BITS;
const INDEX_BITS: u32 = 9;
const INDEX: u64 = (1 << INDEX_BITS) - 1;
/// Levels at which an entry may map a large page: 2 MiB, 1 GiB.
const LARGE_LEVELS: std::ops::RangeInclusive<u32> = 2..=3;

const CR0_WRITE_PROTECT: u64 = 1 << 16;
const CR4_FIVE_LEVELS: u64 = 1 << 12;

/// Whether an access reads or writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// A read.
    Read,
    /// A write.
    Write,
}

/// Why an address could not be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// #GP: not canonical.
    NotCanonical,
    /// #PF, with what belongs into CR2 and the error code.
    Page {
        /// The address that could not be reached.
        address: u64,
        /// The page fault's error code.
        code: u32,
    },
    /// A page table, or the page, is not in RAM. No processor would fault; we cannot go on.
    NotMemory(GuestAddress),
}

/// An address space of the guest.
pub struct AddressSpace<'a> {
    memory: &'a GuestMemoryMmap,
    root: u64,
    levels: u32,
    write_protect: bool,
}

impl<'a> AddressSpace<'a> {
    /// The one that `sregs` has: 64-bit mode, four or five levels.
    pub fn new(memory: &'a GuestMemoryMmap, sregs: &kvm_sregs) -> Self {
        Self {
            memory,
            root: sregs.cr3 & ADDRESS,
            levels: if sregs.cr4 & CR4_FIVE_LEVELS != 0 {
                5
            } else {
                4
            },
            write_protect: sregs.cr0 & CR0_WRITE_PROTECT != 0,
        }
    }

    /// Reads from `linear` on.
    ///
    /// # Errors
    /// See [`Fault`].
    pub fn read(&self, linear: u64, data: &mut [u8]) -> Result<(), Fault> {
        let pieces = self.pieces(linear, data.len(), Access::Read)?;
        let mut rest = data;
        for (at, len) in pieces {
            let (piece, tail) = rest.split_at_mut(len);
            self.memory
                .read_slice(piece, at)
                .map_err(|_| Fault::NotMemory(at))?;
            rest = tail;
        }
        Ok(())
    }

    /// Changes the `len` bytes from `linear` on: all or, with an error, nothing.
    ///
    /// # Errors
    /// See [`Fault`].
    pub fn modify(
        &self,
        linear: u64,
        len: usize,
        change: impl FnOnce(&mut [u8]),
    ) -> Result<(), Fault> {
        let pieces = self.pieces(linear, len, Access::Write)?;
        let mut data = vec![0; len];
        let mut rest = data.as_mut_slice();
        for (at, len) in &pieces {
            let (piece, tail) = rest.split_at_mut(*len);
            self.memory
                .read_slice(piece, *at)
                .map_err(|_| Fault::NotMemory(*at))?;
            rest = tail;
        }
        change(&mut data);
        let mut rest = data.as_slice();
        for (at, len) in pieces {
            let (piece, tail) = rest.split_at(len);
            self.memory
                .write_slice(piece, at)
                .map_err(|_| Fault::NotMemory(at))?;
            rest = tail;
        }
        Ok(())
    }

    /// Where the `len` bytes from `linear` on are, page by page.
    fn pieces(
        &self,
        linear: u64,
        len: usize,
        access: Access,
    ) -> Result<Vec<(GuestAddress, usize)>, Fault> {
        let mut pieces = Vec::new();
        let (mut at, mut left) = (linear, len);
        while left > 0 {
            let in_page = (PAGE_BYTES - at % PAGE_BYTES) as usize;
            let piece = left.min(in_page);
            let physical = self.translate(at, access)?;
            if !self.memory.check_range(physical, piece) {
                return Err(Fault::NotMemory(physical));
            }
            pieces.push((physical, piece));
            at = at.wrapping_add(piece as u64);
            left -= piece;
        }
        Ok(pieces)
    }

    /// The physical address of `linear`.
    fn translate(&self, linear: u64, access: Access) -> Result<GuestAddress, Fault> {
        let bits = PAGE_BITS + INDEX_BITS * self.levels;
        // All bits from the highest translated one on must be equal.
        let sign = linear.cast_signed() >> (bits - 1);
        if sign != 0 && sign != -1 {
            return Err(Fault::NotCanonical);
        }
        let mut table = self.root;
        let mut writable = true;
        let mut level = self.levels;
        loop {
            let shift = PAGE_BITS + INDEX_BITS * (level - 1);
            let slot = GuestAddress(table + ((linear >> shift) & INDEX) * 8);
            let entry = self.mark(slot, ACCESSED)?;
            if entry & PRESENT == 0 {
                return Err(page_fault(linear, access, false));
            }
            writable &= entry & WRITABLE != 0;
            let large = entry & LARGE != 0 && LARGE_LEVELS.contains(&level);
            if level > 1 && !large {
                table = entry & ADDRESS;
                level -= 1;
                continue;
            }
            if access == Access::Write {
                if !writable && self.write_protect {
                    return Err(page_fault(linear, access, true));
                }
                self.mark(slot, DIRTY)?;
            }
            let within = (1 << shift) - 1;
            return Ok(GuestAddress(
                (entry & ADDRESS & !within) | (linear & within),
            ));
        }
    }

    /// Sets `bits` in the entry at `slot` if it is present, and returns it.
    fn mark(&self, slot: GuestAddress, bits: u64) -> Result<u64, Fault> {
        let lost = |_| Fault::NotMemory(slot);
        let bytes = self.memory.get_slice(slot, 8).map_err(lost)?;
        let entry = bytes
            .get_atomic_ref::<AtomicU64>(0)
            .map_err(|_| Fault::NotMemory(slot))?;
        let value = entry.load(Ordering::Acquire);
        if value & PRESENT != 0 && value & bits != bits {
            // Another vCPU may change the entry meanwhile, as with a processor's own walk.
            entry.fetch_or(bits, Ordering::AcqRel);
        }
        Ok(value)
    }
}

fn page_fault(address: u64, access: Access, present: bool) -> Fault {
    let write = u32::from(access == Access::Write) << 1;
    Fault::Page {
        address,
        code: u32::from(present) | write,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PML4: u64 = 0x1000;
    const LINEAR: u64 = 0xffff_8880_0040_1000;

    /// `LINEAR` and the page after it at 0x8000 and 0x6000, the first writable; 2 MiB below them at 2 MiB.
    fn guest() -> (GuestMemoryMmap, kvm_sregs) {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap();
        let set = |table: u64, index: u64, entry: u64| {
            memory
                .write_obj(entry, GuestAddress(table + index * 8))
                .unwrap();
        };
        set(PML4, 0x111, 0x2003);
        set(0x2000, 0, 0x3003);
        set(0x3000, 1, 0x20_0000 | 0x83);
        set(0x3000, 2, 0x4003);
        set(0x4000, 1, 0x8003);
        set(0x4000, 2, 0x6001);
        set(0x4000, 3, 0x4000_0003);
        let sregs = kvm_sregs {
            cr0: CR0_WRITE_PROTECT,
            cr3: PML4,
            ..Default::default()
        };
        (memory, sregs)
    }

    fn entry(memory: &GuestMemoryMmap, at: u64) -> u64 {
        memory.read_obj(GuestAddress(at)).unwrap()
    }

    fn write(space: &AddressSpace<'_>, linear: u64, data: &[u8]) -> Result<(), Fault> {
        space.modify(linear, data.len(), |bytes| bytes.copy_from_slice(data))
    }

    #[test]
    fn bytes_across_pages_come_from_where_each_page_is() {
        let (memory, sregs) = guest();
        memory.write_slice(b"front", GuestAddress(0x8ffb)).unwrap();
        memory.write_slice(b"back", GuestAddress(0x6000)).unwrap();
        let space = AddressSpace::new(&memory, &sregs);
        let mut data = [0; 9];
        space.read(LINEAR + 0xffb, &mut data).unwrap();
        assert_eq!(&data, b"frontback");
        assert_eq!(
            entry(&memory, 0x4008),
            0x8003 | ACCESSED,
            "read, not written"
        );
        write(&space, LINEAR + 0x10, b"new").unwrap();
        let mut written = [0; 3];
        memory
            .read_slice(&mut written, GuestAddress(0x8010))
            .unwrap();
        assert_eq!(&written, b"new");
        assert_eq!(entry(&memory, 0x4008), 0x8003 | ACCESSED | DIRTY);
    }

    #[test]
    fn large_pages_are_walked() {
        let (memory, sregs) = guest();
        let space = AddressSpace::new(&memory, &sregs);
        let linear = LINEAR - 0x20_0000 + 0x123;
        let at = space.translate(linear, Access::Read).unwrap();
        assert_eq!(at.0, 0x20_0000 + 0x1123);
    }

    #[test]
    fn faults_say_what_a_processor_would() {
        let (memory, mut sregs) = guest();
        let space = AddressSpace::new(&memory, &sregs);
        let page = |address, code| Err(Fault::Page { address, code });
        let mut data = [0; 16];
        assert_eq!(space.read(0, &mut data), page(0, 0));
        assert_eq!(write(&space, 0x1000, &data), page(0x1000, 2));
        // The second page is read-only, so that nothing of the first is written either.
        memory.write_slice(&[7; 16], GuestAddress(0x8ff0)).unwrap();
        let across = LINEAR + 0xff8;
        assert_eq!(write(&space, across, &[1; 16]), page(LINEAR + 0x1000, 3));
        memory.read_slice(&mut data, GuestAddress(0x8ff0)).unwrap();
        assert_eq!(data, [7; 16]);
        let gap = 0x0000_8000_0000_0000;
        assert_eq!(space.read(gap, &mut data), Err(Fault::NotCanonical));
        let device = LINEAR + 0x2000;
        let lost = GuestAddress(0x4000_0000);
        assert_eq!(space.read(device, &mut data), Err(Fault::NotMemory(lost)));
        // Without CR0.WP the kernel may write to read-only pages.
        sregs.cr0 = 0;
        write(&AddressSpace::new(&memory, &sregs), across, &[1; 16]).unwrap();
        // Page tables outside of RAM.
        sregs.cr3 = 0xf000_0000;
        let space = AddressSpace::new(&memory, &sregs);
        assert!(matches!(
            space.read(LINEAR, &mut data),
            Err(Fault::NotMemory(_))
        ));
    }

    #[test]
    fn five_levels_reach_further() {
        let (memory, mut sregs) = guest();
        memory
            .write_obj(PML4 | 3, GuestAddress(0x9000 + 0x1ff * 8))
            .unwrap();
        sregs.cr3 = 0x9000;
        sregs.cr4 = CR4_FIVE_LEVELS;
        let space = AddressSpace::new(&memory, &sregs);
        assert_eq!(space.translate(LINEAR, Access::Read).unwrap().0, 0x8000);
    }
}
