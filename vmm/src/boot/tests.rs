//! Kernels, initrds and memory maps, good and bad.

use std::io::Write;

use linux_loader::loader::bootparam::boot_params;
use proptest::prelude::*;

use super::*;

const ENTRY: u64 = 0x100_0000;
const SEGMENT: &[u8] = b"\xf4 a kernel of one instruction";

fn memory(bytes: usize) -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes)]).unwrap()
}

fn file(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file
}

/// An ELF file with one segment of `memsz` bytes at `paddr`.
fn elf(entry: u64, paddr: u64, memsz: u64) -> Vec<u8> {
    let mut elf = Vec::new();
    elf.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    elf.extend(2u16.to_le_bytes());
    elf.extend(62u16.to_le_bytes());
    elf.extend(1u32.to_le_bytes());
    for value in [entry, 64, 0] {
        elf.extend(value.to_le_bytes());
    }
    elf.extend(0u32.to_le_bytes());
    for value in [64u16, 56, 1, 0, 0, 0] {
        elf.extend(value.to_le_bytes());
    }
    elf.extend(1u32.to_le_bytes());
    elf.extend(5u32.to_le_bytes());
    for value in [120, paddr, paddr, SEGMENT.len() as u64, memsz, 0x1000] {
        elf.extend(value.to_le_bytes());
    }
    elf.extend(SEGMENT);
    elf
}

fn image(kernel: &[u8], initrd: Option<&[u8]>) -> BootImage<'static> {
    BootImage {
        kernel: file(kernel),
        initrd: initrd.map(file),
        cmdline: "reboot=k",
        vcpus: 1,
        seed: [0x5e; layout::SEED_BYTES],
    }
}

#[test]
fn a_kernel_is_loaded_with_all_that_it_looks_for() {
    let memory = memory(64 << 20);
    let initrd = [0xab; 5000];
    let kernel = elf(ENTRY, ENTRY, 0x2000);
    let entry = load(&memory, image(&kernel, Some(&initrd))).unwrap();
    assert_eq!(entry.0, ENTRY);

    let mut loaded = vec![0; SEGMENT.len()];
    memory.read_slice(&mut loaded, entry).unwrap();
    assert_eq!(loaded, SEGMENT);

    let params: boot_params = memory.read_obj(GuestAddress(layout::ZERO_PAGE)).unwrap();
    let (magic, ramdisk, size) = (
        params.hdr.header,
        params.hdr.ramdisk_image,
        params.hdr.ramdisk_size,
    );
    assert_eq!(magic, 0x5372_6448);
    assert_eq!((ramdisk, size), ((64 << 20) - 0x2000, 5000));
    let mut content = vec![0; 5000];
    memory
        .read_slice(&mut content, GuestAddress(u64::from(ramdisk)))
        .unwrap();
    assert_eq!(content, initrd);

    let mut line = [0; 9];
    let at = params.hdr.cmd_line_ptr;
    memory
        .read_slice(&mut line, GuestAddress(u64::from(at)))
        .unwrap();
    assert_eq!(&line, b"reboot=k\0");

    let mut mp = [0; 4];
    memory
        .read_slice(&mut mp, GuestAddress(layout::MP_TABLE))
        .unwrap();
    assert_eq!(&mp, b"_MP_");

    // No further setup_data, type 9, 32 bytes.
    let at = GuestAddress(params.hdr.setup_data);
    let header: [u8; 16] = memory.read_obj(at).unwrap();
    assert_eq!(header, [0, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 32, 0, 0, 0]);
    let seed: [u8; 32] = memory.read_obj(GuestAddress(at.0 + 16)).unwrap();
    assert_eq!(seed, [0x5e; 32]);
}

#[test]
fn the_memory_map_has_the_ram_and_nothing_of_the_holes() {
    let map = |ranges: &[(GuestAddress, usize)]| {
        let memory = GuestMemoryMmap::from_ranges(ranges).unwrap();
        params::write(&memory, None, &[0; layout::SEED_BYTES]).unwrap();
        let params: boot_params = memory.read_obj(GuestAddress(layout::ZERO_PAGE)).unwrap();
        let table = params.e820_table;
        table[..usize::from(params.e820_entries)]
            .iter()
            .map(|entry| (entry.addr, entry.size, entry.type_))
            .collect::<Vec<_>>()
    };
    let low = (0, 0x9_fc00, 1);
    assert_eq!(
        map(&[(GuestAddress(0), 32 << 20)]),
        [low, (1 << 20, 31 << 20, 1)]
    );
    assert_eq!(
        map(&[
            (GuestAddress(0), 32 << 20),
            (GuestAddress(1 << 32), 1 << 20)
        ]),
        [low, (1 << 20, 31 << 20, 1), (1 << 32, 1 << 20, 1)]
    );
}

#[test]
fn the_first_gib_is_mapped_one_to_one() {
    let memory = memory(32 << 20);
    tables::write(&memory).unwrap();
    let read = |address| memory.read_obj::<u64>(GuestAddress(address)).unwrap();
    assert_eq!(read(layout::PML4), layout::PDPT | 3);
    assert_eq!(read(layout::PDPT), layout::PAGE_DIRECTORY | 3);
    assert_eq!(read(layout::PAGE_DIRECTORY), 0x83);
    assert_eq!(read(layout::PAGE_DIRECTORY + 511 * 8), (511 << 21) | 0x83);
    assert_eq!(read(layout::PDPT + 8), 0, "nothing above");
    assert_eq!(read(layout::GDT + 0x10), 0x00af_9b00_0000_ffff);
}

#[test]
fn files_that_are_no_kernel_are_refused() {
    let good = elf(ENTRY, ENTRY, 0x2000);
    let change = |at: usize, bytes: &[u8]| {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        bad
    };
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("empty", vec![]),
        ("half a header", good[..40].to_vec()),
        ("not ELF", change(0, b"MZ")),
        ("32 bits", change(4, &[1])),
        ("big-endian", change(5, &[2])),
        ("shared object", change(16, &[3, 0])),
        ("another processor", change(18, &[0xb7, 0])),
        ("entry below 1 MiB", change(24, &0x1000u64.to_le_bytes())),
        (
            "entry past the end",
            change(24, &0x200_0000u64.to_le_bytes()),
        ),
        ("headers past the end", change(32, &u64::MAX.to_le_bytes())),
        ("65535 headers", change(56, &[0xff, 0xff])),
        ("no header", change(56, &[0, 0])),
        (
            "segment offset past the end",
            change(72, &0x10_0000u64.to_le_bytes()),
        ),
        (
            "segment past memory",
            change(88, &0x1000_0000u64.to_le_bytes()),
        ),
        (
            "segment at the top of addresses",
            change(88, &u64::MAX.to_le_bytes()),
        ),
        ("huge segment", change(96, &u64::MAX.to_le_bytes())),
        ("bss past memory", change(104, &(64u64 << 20).to_le_bytes())),
        (
            "bss past all addresses",
            change(104, &u64::MAX.to_le_bytes()),
        ),
        ("truncated segment", good[..good.len() - 1].to_vec()),
    ];
    let memory = memory(64 << 20);
    load(&memory, image(&good, None)).unwrap();
    for (what, content) in cases {
        let error = load(&memory, image(&content, None)).unwrap_err();
        let kind = matches!(error, BootError::NotAKernel(_) | BootError::LoadKernel(_));
        assert!(kind, "{what}: {error}");
    }
}

#[test]
fn an_initrd_that_does_not_fit_is_refused() {
    let memory = memory(32 << 20);
    let kernel = elf(ENTRY, ENTRY, 0x2000);
    let initrd = tempfile::tempfile().unwrap();
    initrd.set_len((16 << 20) - 0x2000).unwrap();
    let boot = |initrd: &File| {
        let mut image = image(&kernel, None);
        image.initrd = Some(initrd.try_clone().unwrap());
        load(&memory, image)
    };
    boot(&initrd).unwrap();
    for bytes in [(16 << 20) - 0x1fff, 64 << 20, 1 << 40] {
        initrd.set_len(bytes).unwrap();
        let error = boot(&initrd).unwrap_err();
        assert!(matches!(error, BootError::InitrdSize { .. }), "{error}");
    }
}

proptest! {
    // The loader may succeed or fail, but never panics, whatever the headers say.
    #[test]
    fn no_header_makes_the_loader_panic(at in 0usize..120, bytes in prop::collection::vec(any::<u8>(), 1..16)) {
        let mut kernel = elf(ENTRY, ENTRY, 0x2000);
        for (place, byte) in kernel[at..].iter_mut().zip(bytes) {
            *place = byte;
        }
        let memory = memory(32 << 20);
        let _ = kernel::load(&memory, file(&kernel));
    }
}
