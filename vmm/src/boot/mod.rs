//! What the guest finds in memory when it starts: the 64-bit Linux boot protocol with an ELF kernel, and an
//! Intel MP table in place of ACPI.
//!
//! [`load`] puts everything where [`layout`] says and returns the kernel's entry point; the boot processor's
//! registers are the vCPU module's business.

pub mod cmdline;
pub mod layout;

mod kernel;
mod mptable;
mod params;
mod tables;

use std::fs::File;
use std::io::{self, Seek};

use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion,
};

pub use tables::{GDT_LIMIT, code_segment, data_segment, tss_segment};

/// Why the guest could not be given what it boots from.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The file is not a kernel that this machine can start.
    #[error("guest kernel: {0}")]
    NotAKernel(&'static str),
    /// The kernel's file could not be read.
    #[error("guest kernel: reading its header: {0}")]
    ReadKernel(#[source] io::Error),
    /// A segment of the kernel could not be loaded: the file is truncated or does not fit into memory.
    #[error("guest kernel: loading its segments: {0}")]
    LoadKernel(#[source] linux_loader::loader::Error),
    /// The initrd's file has no size or no beginning.
    #[error("initrd: finding the size of its file: {0}")]
    StatInitrd(#[source] io::Error),
    /// The initrd's content could not be read into memory.
    #[error("initrd: reading {bytes} bytes into guest memory: {source}")]
    LoadInitrd {
        /// Size of the file.
        bytes: u64,
        /// Why it failed.
        #[source]
        source: GuestMemoryError,
    },
    /// Kernel and initrd do not fit below the hole together.
    #[error(
        "initrd: {bytes} bytes do not fit between the kernel's end {kernel_end:#x} and the end of memory {ram_end:#x}"
    )]
    InitrdSize {
        /// Size of the file.
        bytes: u64,
        /// First free address after the kernel.
        kernel_end: u64,
        /// End of low memory.
        ram_end: u64,
    },
    /// The command line is too long.
    #[error("kernel command line: {bytes} bytes, at most {} fit", layout::CMDLINE_BYTES - 1)]
    CmdlineLength {
        /// Its length.
        bytes: usize,
    },
    /// The command line holds a byte that it must not hold.
    #[error("kernel command line: byte {byte:#04x} at {at} is not printable ASCII")]
    CmdlineByte {
        /// The byte.
        byte: u8,
        /// Its offset.
        at: usize,
    },
    /// Guest memory is smaller than what was to be written.
    #[error("writing the {what} into guest memory: {source}")]
    Write {
        /// What was written.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: GuestMemoryError,
    },
}

/// What a guest boots from.
#[derive(Debug)]
pub struct BootImage<'a> {
    /// An ELF vmlinux.
    pub kernel: File,
    /// An uncompressed cpio archive.
    pub initrd: Option<File>,
    /// The whole command line: see [`cmdline::build`].
    pub cmdline: &'a str,
    /// Those that the guest is told of: 1 to [`layout::MAX_VCPUS`].
    pub vcpus: u32,
    /// Fresh randomness of the host: the guest has some before it has devices, also where RDRAND is hidden.
    pub seed: [u8; layout::SEED_BYTES],
}

/// Loads kernel, initrd, command line and tables into `memory`, which must be fresh (all zeroes), and returns
/// the kernel's 64-bit entry point.
///
/// # Errors
/// See [`BootError`].
pub fn load(memory: &GuestMemoryMmap, image: BootImage<'_>) -> Result<GuestAddress, BootError> {
    let kernel = kernel::load(memory, image.kernel)?;
    let initrd = image
        .initrd
        .map(|file| load_initrd(memory, file, kernel.end))
        .transpose()?;
    // After the kernel, so that no segment of it can lie over what follows.
    write_cmdline(memory, image.cmdline)?;
    params::write(memory, initrd, &image.seed)?;
    tables::write(memory)?;
    mptable::write(memory, image.vcpus)?;
    Ok(kernel.entry)
}

/// Where the initrd lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Initrd {
    address: u32,
    bytes: u32,
}

fn load_initrd(
    memory: &GuestMemoryMmap,
    mut file: File,
    kernel_end: u64,
) -> Result<Initrd, BootError> {
    let bytes = file.metadata().map_err(BootError::StatInitrd)?.len();
    let ram_end = low_ram_end(memory);
    let too_large = BootError::InitrdSize {
        bytes,
        kernel_end,
        ram_end,
    };
    let address = ram_end.checked_sub(bytes).map(|start| start & !0xfff);
    let Some(address) = address.filter(|start| *start >= kernel_end) else {
        return Err(too_large);
    };
    let (Ok(address), Ok(size), Ok(count)) = (
        u32::try_from(address),
        u32::try_from(bytes),
        usize::try_from(bytes),
    ) else {
        return Err(too_large);
    };
    file.rewind().map_err(BootError::StatInitrd)?;
    memory
        .read_exact_volatile_from(GuestAddress(u64::from(address)), &mut file, count)
        .map_err(|source| BootError::LoadInitrd { bytes, source })?;
    Ok(Initrd {
        address,
        bytes: size,
    })
}

fn write_cmdline(memory: &GuestMemoryMmap, cmdline: &str) -> Result<(), BootError> {
    cmdline::check(cmdline)?;
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    write(memory, "command line", &bytes, layout::CMDLINE)
}

/// The end of RAM below the hole.
fn low_ram_end(memory: &GuestMemoryMmap) -> u64 {
    memory
        .find_region(GuestAddress(0))
        .map_or(0, |region| region.len())
}

fn write(
    memory: &GuestMemoryMmap,
    what: &'static str,
    bytes: &[u8],
    address: u64,
) -> Result<(), BootError> {
    memory
        .write_slice(bytes, GuestAddress(address))
        .map_err(|source| BootError::Write { what, source })
}

#[cfg(test)]
mod tests;
