//! The zero page (`struct boot_params`): memory map, initrd and command line, as the kernel's
//! Documentation/arch/x86/boot.rst has them.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{ByteValued, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};

use super::{BootError, Initrd, layout};

const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// Protocol 2.15, the last one.
const PROTOCOL: u16 = 0x020f;
/// "Undefined" boot loader.
const LOADER_TYPE: u8 = 0xff;
const E820_RAM: u32 = 1;
/// `SETUP_RNG_SEED` of the kernel's `asm/setup_data.h`. The kernel credits it and clears it.
const SETUP_RNG_SEED: u32 = 9;

pub(super) fn write(
    memory: &GuestMemoryMmap,
    initrd: Option<Initrd>,
    seed: &[u8; layout::SEED_BYTES],
) -> Result<(), BootError> {
    // struct setup_data: the next one's address (there is none), type, length, data.
    let mut data = [0; 16 + layout::SEED_BYTES];
    data[8..12].copy_from_slice(&SETUP_RNG_SEED.to_le_bytes());
    data[12..16].copy_from_slice(&(layout::SEED_BYTES as u32).to_le_bytes());
    data[16..].copy_from_slice(seed);
    super::write(memory, "random seed", &data, layout::SEED)?;
    let params = build(memory, initrd);
    super::write(
        memory,
        "boot parameters",
        params.as_slice(),
        layout::ZERO_PAGE,
    )
}

fn build(memory: &GuestMemoryMmap, initrd: Option<Initrd>) -> boot_params {
    let mut params = boot_params::default();
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.version = PROTOCOL;
    params.hdr.type_of_loader = LOADER_TYPE;
    // Both constants fit: CMDLINE lies below 1 MiB, CMDLINE_BYTES is 2048.
    params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    params.hdr.cmdline_size = layout::CMDLINE_BYTES as u32;
    params.hdr.setup_data = layout::SEED;
    if let Some(initrd) = initrd {
        params.hdr.ramdisk_image = initrd.address;
        params.hdr.ramdisk_size = initrd.bytes;
    }
    let map = e820(memory);
    // At most three entries of 128.
    params.e820_entries = map.len() as u8;
    let mut table = params.e820_table;
    for (entry, range) in table.iter_mut().zip(map) {
        *entry = range;
    }
    params.e820_table = table;
    params
}

/// RAM, without the hole between 639 KiB and 1 MiB.
fn e820(memory: &GuestMemoryMmap) -> Vec<boot_e820_entry> {
    let ram = |addr, end: u64| boot_e820_entry {
        addr,
        size: end.saturating_sub(addr),
        type_: E820_RAM,
    };
    let mut map = vec![ram(0, layout::MP_TABLE)];
    for region in memory.iter() {
        let start = region.start_addr().0;
        map.push(ram(start.max(layout::HIGH_MEMORY), start + region.len()));
    }
    map
}
