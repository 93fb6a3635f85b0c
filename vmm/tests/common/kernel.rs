//! Kernels of a few instructions.

use std::fs::File;
use std::io::{Seek, Write};

/// Turns assembly into the bytes of a guest. The code must not depend on where it lies.
macro_rules! guest {
    ($($line:literal),* $(,)?) => {{
        let (start, end): (*const u8, *const u8);
        // SAFETY: only two addresses are taken; the guest's code between them is jumped over.
        unsafe {
            std::arch::asm!(
                "lea {0}, [rip + 88f]", "lea {1}, [rip + 99f]", "jmp 99f",
                "88:", $($line,)* "99:",
                out(reg) start, out(reg) end, options(nomem, nostack, preserves_flags),
            );
        }
        // SAFETY: both addresses are in this function's text, in this order.
        unsafe { std::slice::from_raw_parts(start, end.offset_from(start) as usize) }
    }};
}

/// Where the guest's first instruction is.
pub const ENTRY: u64 = 0x100_0000;
/// An executable of one segment that takes `bytes` of memory.
pub fn elf(code: &[u8], bytes: u64) -> File {
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
    elf.extend(7u32.to_le_bytes());
    for value in [120, ENTRY, ENTRY, code.len() as u64, bytes, 0x1000] {
        elf.extend(value.to_le_bytes());
    }
    elf.extend(code);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&elf).unwrap();
    file.rewind().unwrap();
    file
}
