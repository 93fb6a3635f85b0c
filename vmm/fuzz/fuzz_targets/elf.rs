//! A hostile kernel file: its header and program headers are the input's, the rest of it too. Whatever they say, the
//! loader refuses or loads inside of the guest's memory.

#![no_main]

use std::fs::File;
use std::io::{Seek, Write};

use cella_vmm::boot::{self, BootImage};
use libfuzzer_sys::fuzz_target;
use vm_memory::{GuestAddress, GuestMemoryMmap};

const MEMORY: usize = 4 << 20;
const ENTRY: u64 = 1 << 20;
/// What the input may change of a file that is otherwise good: ELF header, program header, content.
const HEADERS: usize = 64 + 56;

fn good() -> Vec<u8> {
    let mut elf = Vec::new();
    elf.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    elf.extend(2u16.to_le_bytes());
    elf.extend(62u16.to_le_bytes());
    elf.extend(1u32.to_le_bytes());
    for value in [ENTRY, 64, 0] {
        elf.extend(value.to_le_bytes());
    }
    elf.extend(0u32.to_le_bytes());
    for value in [64u16, 56, 1, 0, 0, 0] {
        elf.extend(value.to_le_bytes());
    }
    elf.extend(1u32.to_le_bytes());
    elf.extend(5u32.to_le_bytes());
    for value in [120, ENTRY, ENTRY, 8, 0x1000, 0x1000] {
        elf.extend(u64::to_le_bytes(value));
    }
    elf.resize(HEADERS + 8, 0xf4);
    elf
}

fn file(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file.rewind().unwrap();
    file
}

fuzz_target!(|data: &[u8]| {
    let Some((&form, data)) = data.split_first() else {
        return;
    };
    let mut kernel = good();
    let mut rest = data;
    if form & 1 == 0 {
        // Changes, each of an offset and a byte.
        while let [at, byte, tail @ ..] = rest {
            let at = usize::from(*at) % kernel.len();
            kernel[at] = *byte;
            rest = tail;
            if form & 2 == 0 && rest.len() < 16 {
                break;
            }
        }
    }
    kernel.extend(rest);
    let initrd = (form & 4 == 0).then(|| file(rest));
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
    let image = BootImage {
        kernel: file(&kernel),
        initrd,
        cmdline: "reboot=k",
        vcpus: 1,
        seed: [0; 32],
    };
    if let Ok(entry) = boot::load(&memory, image) {
        assert!(entry.0 >= ENTRY && entry.0 < MEMORY as u64);
    }
});
