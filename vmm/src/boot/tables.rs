//! The descriptor and page tables that the boot processor enters the kernel with: long mode, flat segments,
//! the first GiB mapped one to one. The kernel replaces all of it within its first instructions.

use kvm_bindings::kvm_segment;
use vm_memory::GuestMemoryMmap;

use super::{BootError, layout};

/// Selectors that the boot protocol demands: `__BOOT_CS` and `__BOOT_DS`.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;

/// Null, unused, code, data and TSS. The TSS descriptor's upper half would be a sixth entry; it is zero, as
/// the base is below 4 GiB, and lies in memory that is zero.
const DESCRIPTORS: [u64; 5] = [
    0,
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x008f_8b00_0000_ffff,
];

/// Limit of the GDT: its last byte.
pub const GDT_LIMIT: u16 = (DESCRIPTORS.len() * 8 - 1) as u16;

const PAGE_PRESENT: u64 = 1;
const PAGE_WRITABLE: u64 = 1 << 1;
/// In a page directory: the entry maps 2 MiB.
const PAGE_LARGE: u64 = 1 << 7;
const ENTRIES: u64 = 512;
const LARGE_PAGE_BYTES: u64 = 2 << 20;

pub(super) fn write(memory: &GuestMemoryMmap) -> Result<(), BootError> {
    let table = |entries: &mut dyn Iterator<Item = u64>| -> Vec<u8> {
        entries.flat_map(u64::to_le_bytes).collect()
    };
    let link = PAGE_PRESENT | PAGE_WRITABLE;
    let gdt = table(&mut DESCRIPTORS.into_iter());
    super::write(memory, "boot GDT", &gdt, layout::GDT)?;
    let pml4 = (layout::PDPT | link).to_le_bytes();
    super::write(memory, "boot page tables", &pml4, layout::PML4)?;
    let pdpt = (layout::PAGE_DIRECTORY | link).to_le_bytes();
    super::write(memory, "boot page tables", &pdpt, layout::PDPT)?;
    let directory = table(&mut (0..ENTRIES).map(|i| (i * LARGE_PAGE_BYTES) | link | PAGE_LARGE));
    super::write(
        memory,
        "boot page tables",
        &directory,
        layout::PAGE_DIRECTORY,
    )
}

/// The 64-bit code segment.
pub fn code_segment() -> kvm_segment {
    kvm_segment {
        selector: CODE_SELECTOR,
        type_: 11,
        s: 1,
        l: 1,
        ..flat()
    }
}

/// The data segment, also the stack's.
pub fn data_segment() -> kvm_segment {
    kvm_segment {
        selector: DATA_SELECTOR,
        type_: 3,
        s: 1,
        db: 1,
        ..flat()
    }
}

/// A busy 64-bit TSS, which VM entry demands though nothing uses it.
pub fn tss_segment() -> kvm_segment {
    kvm_segment {
        selector: TSS_SELECTOR,
        type_: 11,
        ..flat()
    }
}

fn flat() -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        present: 1,
        g: 1,
        ..Default::default()
    }
}
