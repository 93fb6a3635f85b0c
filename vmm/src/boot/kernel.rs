//! The kernel's ELF file: checked, then loaded where it is linked.

use std::fs::File;
use std::os::unix::fs::FileExt;

use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::{BootError, layout, low_ram_end};

/// More program headers than any kernel has: a file with more is not read on.
const MAX_PROGRAM_HEADERS: u16 = 64;

/// Bytes of an ELF64 header, of which the fields below are checked here (ELF-64 object file format, section 2).
const HEADER_BYTES: usize = 64;
const CLASS: usize = 4;
const CLASS_64: u8 = 2;
const TYPE: usize = 16;
const TYPE_EXECUTABLE: u16 = 2;
const MACHINE: usize = 18;
const MACHINE_X86_64: u16 = 62;
const PROGRAM_HEADERS: usize = 56;

/// A kernel in memory.
#[derive(Debug)]
pub(super) struct Kernel {
    /// Where its first instruction is.
    pub(super) entry: GuestAddress,
    /// First address after its last segment.
    pub(super) end: u64,
}

/// Loads the kernel at the physical addresses that its program headers name.
pub(super) fn load(memory: &GuestMemoryMmap, mut file: File) -> Result<Kernel, BootError> {
    check_header(&file)?;
    // An explicit offset of nothing: the loader then ignores the notes, whose sizes it adds up unchecked.
    let offset = Some(GuestAddress(0));
    let lowest = Some(GuestAddress(layout::HIGH_MEMORY));
    let loaded = Elf::load(memory, offset, &mut file, lowest).map_err(BootError::LoadKernel)?;
    // `kernel_end` counts the zeroed tail (bss), which the loader does not touch and so does not check.
    if loaded.kernel_end > low_ram_end(memory) {
        return Err(BootError::NotAKernel("it ends beyond the guest's memory"));
    }
    if loaded.kernel_load.0 >= loaded.kernel_end {
        return Err(BootError::NotAKernel("its entry point is in no segment"));
    }
    Ok(Kernel {
        entry: loaded.kernel_load,
        end: loaded.kernel_end,
    })
}

/// What the loader does not look at.
fn check_header(file: &File) -> Result<(), BootError> {
    let mut header = [0; HEADER_BYTES];
    match file.read_exact_at(&mut header, 0) {
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            return Err(BootError::NotAKernel("it is shorter than an ELF header"));
        }
        other => other.map_err(BootError::ReadKernel)?,
    }
    if !header.starts_with(b"\x7fELF") {
        return Err(BootError::NotAKernel(
            "it is not an ELF file (a compressed bzImage cannot be started)",
        ));
    }
    if header[CLASS] != CLASS_64 || half(&header, MACHINE) != MACHINE_X86_64 {
        return Err(BootError::NotAKernel("it is not for x86-64"));
    }
    if half(&header, TYPE) != TYPE_EXECUTABLE {
        return Err(BootError::NotAKernel("it is not an executable"));
    }
    if half(&header, PROGRAM_HEADERS) > MAX_PROGRAM_HEADERS {
        return Err(BootError::NotAKernel("it has too many program headers"));
    }
    Ok(())
}

/// The 16-bit field at a constant offset inside of the header.
fn half(header: &[u8; HEADER_BYTES], at: usize) -> u16 {
    u16::from_le_bytes([header[at], header[at + 1]])
}
