//! Where things are in the guest's physical address space.
//!
//! RAM lies from 0 to [`HOLE_START`] and, what does not fit there, from [`HIGH_RAM_START`]. The hole between
//! the two holds the virtio-mmio window, the APICs and the pages that KVM keeps for itself.

/// First address of the hole below 4 GiB: 3 GiB.
pub const HOLE_START: u64 = 0xc000_0000;
/// First address of RAM above the hole: 4 GiB.
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;

/// First address of the virtio-mmio window; each device has [`MMIO_SLOT_BYTES`].
pub const MMIO_START: u64 = 0xd000_0000;
/// Bytes of a virtio-mmio device's register page.
pub const MMIO_SLOT_BYTES: u64 = 0x1000;
/// First interrupt line of a virtio-mmio device: below are the timer, the cascade and the serial ports.
pub const FIRST_GSI: u32 = 5;
/// Last line of KVM's IOAPIC.
pub const LAST_GSI: u32 = 23;

/// First I/O port of the serial console (COM1), which has eight.
pub const SERIAL_PORT: u64 = 0x3f8;
/// Interrupt line of the serial console.
pub const SERIAL_GSI: u32 = 4;

/// The IOAPIC's and the local APICs' default addresses.
pub const IOAPIC_ADDRESS: u32 = 0xfec0_0000;
/// See [`IOAPIC_ADDRESS`].
pub const LAPIC_ADDRESS: u32 = 0xfee0_0000;

/// Page that KVM needs for the identity map of real mode on old Intel processors.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages that KVM needs for its real mode TSS, on the same processors.
pub const KVM_TSS: u64 = 0xfffb_d000;

/// The boot GDT: five descriptors.
pub const GDT: u64 = 0x500;
/// An empty IDT.
pub const IDT: u64 = 0x5f0;
/// `struct boot_params` (the zero page).
pub const ZERO_PAGE: u64 = 0x7000;
/// Top of the stack that the boot processor enters the kernel with (it makes its own at once).
pub const BOOT_STACK: u64 = 0x8ff0;
/// The three page tables of the boot identity map: PML4, then PDPT, then one page directory.
pub const PML4: u64 = 0x9000;
/// See [`PML4`].
pub const PDPT: u64 = 0xa000;
/// See [`PML4`].
pub const PAGE_DIRECTORY: u64 = 0xb000;
/// The kernel's command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Its greatest length in bytes, with the NUL that ends it (`COMMAND_LINE_SIZE` of x86).
pub const CMDLINE_BYTES: usize = 2048;
/// A seed for the kernel's random number generator: a `struct setup_data` with [`SEED_BYTES`] of data.
pub const SEED: u64 = 0x2_1000;
/// Bytes of the seed: what fills the generator's key.
pub const SEED_BYTES: usize = 32;
/// The MP floating pointer and table: the last KiB of base memory, which the kernel scans for it.
pub const MP_TABLE: u64 = 0x9_fc00;
/// Bytes there are for the MP table: base memory ends at 640 KiB.
pub const MP_TABLE_BYTES: usize = 0x400;
/// Where RAM goes on above the legacy hole: 1 MiB. The kernel and the initrd lie above.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// Where memory that is added to a machine lies: at a multiple of this, the largest unit in which Linux takes memory into
/// use on x86 (`MAX_BLOCK_SIZE` in its arch/x86/mm/init_64.c).
const ADDED_ALIGN: u64 = 2 << 30;

/// The most vCPUs a machine has.
pub const MAX_VCPUS: u32 = 32;

/// The ranges of RAM, as (address, bytes), of a machine with `bytes` of memory.
pub fn ram_ranges(bytes: u64) -> Vec<(u64, u64)> {
    let low = bytes.min(HOLE_START);
    let mut ranges = vec![(0, low)];
    if bytes > low {
        ranges.push((HIGH_RAM_START, bytes - low));
    }
    ranges
}

/// Guest-physical address of the memory that is added to a machine with `bytes` of RAM, which is at most 1 TiB.
pub fn added_start(bytes: u64) -> u64 {
    let end = ram_ranges(bytes)
        .last()
        .map_or(0, |(start, len)| start.saturating_add(*len));
    end.max(HIGH_RAM_START).next_multiple_of(ADDED_ALIGN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_leaves_the_hole_free() {
        assert_eq!(ram_ranges(64 << 20), [(0, 64 << 20)]);
        assert_eq!(ram_ranges(HOLE_START), [(0, HOLE_START)]);
        assert_eq!(
            ram_ranges(HOLE_START + 4096),
            [(0, HOLE_START), (HIGH_RAM_START, 4096)]
        );
    }

    #[test]
    fn added_memory_lies_behind_the_ram_and_the_hole() {
        const GIB: u64 = 1 << 30;
        for (bytes, start) in [
            (GIB / 8, 4 * GIB),
            (HOLE_START, 4 * GIB),
            (HOLE_START + 4096, 6 * GIB),
            (5 * GIB, 6 * GIB),
            (5 * GIB + 4096, 8 * GIB),
            (1 << 40, 1026 * GIB),
        ] {
            assert_eq!(added_start(bytes), start, "{bytes:#x}");
        }
    }

    #[test]
    fn nothing_of_the_boot_structures_overlaps() {
        let blocks = [
            (GDT, 5 * 8),
            (IDT, 8),
            (ZERO_PAGE, 0x1000),
            (PML4, 0x1000),
            (PDPT, 0x1000),
            (PAGE_DIRECTORY, 0x1000),
            (CMDLINE, CMDLINE_BYTES as u64),
            (SEED, 16 + SEED_BYTES as u64),
            (MP_TABLE, MP_TABLE_BYTES as u64),
            (HIGH_MEMORY, 1),
        ];
        for pair in blocks.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:x?}");
        }
        const { assert!(MMIO_START >= HOLE_START) };
        let devices = u64::from(LAST_GSI - FIRST_GSI + 1) * MMIO_SLOT_BYTES;
        assert!(MMIO_START + devices <= u64::from(IOAPIC_ADDRESS));
    }
}
