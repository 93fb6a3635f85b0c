//! The tap: its offloads, and the two system calls that move frames.

use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsRawFd, RawFd};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
};
use vm_memory::VolatileSlice;
use vm_memory::volatile_memory::PtrGuardMut;

use super::pieces::MAX_PIECES;

/// What the reader of a tap can take (`include/uapi/linux/if_tun.h`, `TUN_F_*`), by the driver's feature bit.
const OFFLOADS: [(u32, libc::c_ulong); 4] = [
    (VIRTIO_NET_F_GUEST_CSUM, 0x01),
    (VIRTIO_NET_F_GUEST_TSO4, 0x02),
    (VIRTIO_NET_F_GUEST_TSO6, 0x04),
    (VIRTIO_NET_F_GUEST_ECN, 0x08),
];

/// `TUNSETOFFLOAD`, `_IOW('T', 208, unsigned int)`.
const TUNSETOFFLOAD: libc::Ioctl = 0x4004_54d0;

pub(super) struct Tap {
    file: File,
    offloads: bool,
}

impl Tap {
    /// Asks the tap whether it has offloads.
    pub(super) fn new(file: File) -> Self {
        let mut tap = Self {
            file,
            offloads: true,
        };
        tap.offloads = tap.set_offloads(super::OFFLOADS).is_ok();
        tap
    }

    pub(super) fn has_offloads(&self) -> bool {
        self.offloads
    }

    pub(super) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Tells the kernel what the driver, by its features, takes. Without checksums there is no segmentation.
    pub(super) fn set_offloads(&self, features: u64) -> Result<()> {
        if !self.offloads {
            return Ok(());
        }
        let flags = match features & 1 << VIRTIO_NET_F_GUEST_CSUM {
            0 => 0,
            _ => OFFLOADS
                .iter()
                .filter(|(bit, _)| features & 1 << bit != 0)
                .fold(0, |flags, (_, flag)| flags | flag),
        };
        // SAFETY: the argument of this request is a number.
        match unsafe { libc::ioctl(self.fd(), TUNSETOFFLOAD, flags) } {
            0 => Ok(()),
            _ => Err(Error::last_os_error()),
        }
    }

    /// Reads one frame with its header. What `pieces` have no room for is dropped.
    pub(super) fn read(&self, pieces: &[VolatileSlice<'_>]) -> Result<usize> {
        self.transfer(pieces, libc::readv)
    }

    /// Writes one frame with its header.
    pub(super) fn write(&self, pieces: &[VolatileSlice<'_>]) -> Result<usize> {
        self.transfer(pieces, libc::writev)
    }

    fn transfer(
        &self,
        pieces: &[VolatileSlice<'_>],
        call: unsafe extern "C" fn(i32, *const libc::iovec, i32) -> isize,
    ) -> Result<usize> {
        let guards: Vec<PtrGuardMut> = pieces
            .iter()
            .take(MAX_PIECES)
            .map(VolatileSlice::ptr_guard_mut)
            .collect();
        let iovecs: Vec<libc::iovec> = guards
            .iter()
            .map(|guard| libc::iovec {
                iov_base: guard.as_ptr().cast(),
                iov_len: guard.len(),
            })
            .collect();
        loop {
            // SAFETY: `iovecs`, at most 1024, are pieces of guest memory that `guards` keeps accessible; the kernel
            // bears with a guest that changes them meanwhile.
            let moved = unsafe { call(self.fd(), iovecs.as_ptr(), iovecs.len() as i32) };
            if let Ok(moved) = usize::try_from(moved) {
                return Ok(moved);
            }
            let error = Error::last_os_error();
            if error.kind() != ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
}
