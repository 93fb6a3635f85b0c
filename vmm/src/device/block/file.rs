//! The image: its limits, and the system calls.

use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::FallocateFlags;
use vm_memory::volatile_memory::PtrGuardMut;

use super::SECTOR;
use super::request::{Buffers, Status};

/// Buffers that one system call takes (`UIO_MAXIOV`).
const MAX_IOVECS: usize = 1024;

/// How many failures of the file are logged: a guest can repeat a request that fails.
const LOGGED_FAILURES: u32 = 8;

/// A raw image of a fixed size.
pub(super) struct Image {
    file: File,
    bytes: u64,
    read_only: bool,
    failures: AtomicU32,
}

impl Image {
    pub(super) fn new(file: File, bytes: u64, read_only: bool) -> Self {
        Self {
            file,
            bytes,
            read_only,
            failures: AtomicU32::new(0),
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn read_only(&self) -> bool {
        self.read_only
    }

    /// What the driver is told of a failure. The host's own failures are logged.
    pub(super) fn report(&self, error: &Error) -> Status {
        if error.kind() == ErrorKind::Unsupported {
            return Status::Unsupported;
        }
        if error.kind() != ErrorKind::InvalidInput
            && self.failures.fetch_add(1, Ordering::Relaxed) < LOGGED_FAILURES
        {
            eprintln!("cella-vmm: a block device's image: {error}");
        }
        Status::IoError
    }

    pub(super) fn read(&self, offset: u64, buffers: &Buffers<'_>) -> Result<()> {
        self.check(offset, buffers.len())?;
        self.transfer(offset, buffers, libc::preadv64)
    }

    pub(super) fn write(&self, offset: u64, buffers: &Buffers<'_>) -> Result<()> {
        self.check_write(offset, buffers.len())?;
        self.transfer(offset, buffers, libc::pwritev64)
    }

    pub(super) fn flush(&self) -> Result<()> {
        match self.read_only {
            true => Ok(()),
            false => self.file.sync_data(),
        }
    }

    pub(super) fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.check_write(offset, len)?;
        self.fallocate(FallocateFlags::PUNCH_HOLE, offset, len)
    }

    /// Makes a range read as zeros; `unmap`: its space may be given back.
    pub(super) fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.check_write(offset, len)?;
        let how = match unmap {
            true => FallocateFlags::PUNCH_HOLE,
            false => FallocateFlags::ZERO_RANGE,
        };
        match self.fallocate(how, offset, len) {
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                self.write_all_zeroes(offset, len)
            }
            other => other,
        }
    }

    /// For file systems that cannot zero a range (tmpfs).
    fn write_all_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        let zeros = [0; 1 << 16];
        let mut done = 0;
        while done < len {
            let count = (len - done).min(zeros.len() as u64);
            let part = zeros.get(..count as usize).unwrap_or_default();
            self.file.write_all_at(part, offset + done)?;
            done += count;
        }
        Ok(())
    }

    fn fallocate(&self, how: FallocateFlags, offset: u64, len: u64) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        Ok(rustix::fs::fallocate(
            &self.file,
            how | FallocateFlags::KEEP_SIZE,
            offset,
            len,
        )?)
    }

    fn check_write(&self, offset: u64, len: u64) -> Result<()> {
        if self.read_only {
            return Err(ErrorKind::InvalidInput.into());
        }
        self.check(offset, len)
    }

    /// Whole sectors inside of the image.
    fn check(&self, offset: u64, len: u64) -> Result<()> {
        let end = offset.checked_add(len);
        match end.is_some_and(|end| end <= self.bytes) && len.is_multiple_of(SECTOR) {
            true => Ok(()),
            false => Err(ErrorKind::InvalidInput.into()),
        }
    }

    /// Moves all of `buffers` by `call`, `preadv64` or `pwritev64`.
    fn transfer(
        &self,
        mut offset: u64,
        buffers: &Buffers<'_>,
        call: unsafe extern "C" fn(i32, *const libc::iovec, i32, i64) -> isize,
    ) -> Result<()> {
        let guards: Vec<PtrGuardMut> = buffers
            .slices()
            .iter()
            .map(|slice| slice.ptr_guard_mut())
            .collect();
        let mut iovecs: Vec<libc::iovec> = guards
            .iter()
            .map(|guard| libc::iovec {
                iov_base: guard.as_ptr().cast(),
                iov_len: guard.len(),
            })
            .collect();
        let mut rest = iovecs.as_mut_slice();
        while !rest.is_empty() {
            let count = rest.len().min(MAX_IOVECS) as i32;
            let position = i64::try_from(offset).map_err(|_| ErrorKind::InvalidInput)?;
            // SAFETY: the first `count` of `rest` are pieces of guest memory that `guards` keeps accessible; the kernel
            // bears with a guest that changes them meanwhile.
            let moved = unsafe { call(self.file.as_raw_fd(), rest.as_ptr(), count, position) };
            let moved = match usize::try_from(moved) {
                // Somebody has truncated the image.
                Ok(0) if rest.iter().any(|iovec| iovec.iov_len > 0) => {
                    return Err(ErrorKind::UnexpectedEof.into());
                }
                Ok(moved) => moved,
                Err(_) => {
                    let error = Error::last_os_error();
                    if error.kind() == ErrorKind::Interrupted {
                        continue;
                    }
                    return Err(error);
                }
            };
            offset += moved as u64;
            rest = advance(rest, moved);
        }
        Ok(())
    }
}

/// Drops the first `count` bytes, and empty pieces, from the front.
fn advance(iovecs: &mut [libc::iovec], mut count: usize) -> &mut [libc::iovec] {
    let mut whole = 0;
    for iovec in iovecs.iter_mut() {
        if iovec.iov_len > count {
            iovec.iov_len -= count;
            iovec.iov_base = iovec.iov_base.wrapping_byte_add(count);
            break;
        }
        count -= iovec.iov_len;
        whole += 1;
    }
    iovecs.get_mut(whole..).unwrap_or_default()
}
