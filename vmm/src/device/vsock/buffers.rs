//! The memory of a descriptor chain, moved to and from a socket without a copy of our own.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use virtio_queue::DescriptorChain;
use vm_memory::{GuestMemory, GuestMemoryMmap, VolatileSlice};

/// The most memory slices that one system call is given; more take several calls.
const MAX_IOVECS: usize = 64;

/// Why a chain's memory cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("descriptor of {len} bytes at guest address {address:#x}: {source}")]
pub struct ChainError {
    address: u64,
    len: u32,
    #[source]
    source: vm_memory::GuestMemoryError,
}

/// Slices of guest memory in the order of their descriptors, consumed from the front.
///
/// The guest may write to the memory at any time: what is read twice may differ.
#[derive(Default)]
pub struct Buffers<'a> {
    slices: VecDeque<VolatileSlice<'a>>,
    len: usize,
}

impl<'a> Buffers<'a> {
    /// The device-writable or else the device-readable part of `chain`.
    ///
    /// # Errors
    /// A descriptor does not lie in guest memory.
    pub fn new(
        memory: &'a GuestMemoryMmap,
        chain: DescriptorChain<&'a GuestMemoryMmap>,
        writable: bool,
    ) -> Result<Self, ChainError> {
        let mut buffers = Self::default();
        for descriptor in chain.filter(|descriptor| descriptor.is_write_only() == writable) {
            let len = descriptor.len();
            for slice in memory.get_slices(descriptor.addr(), len as usize) {
                buffers.push(slice.map_err(|source| ChainError {
                    address: descriptor.addr().0,
                    len,
                    source,
                })?);
            }
        }
        Ok(buffers)
    }

    fn push(&mut self, slice: VolatileSlice<'a>) {
        // A chain is at most 4 GiB long (virtio-queue ends it there), which a usize holds.
        self.len = self.len.saturating_add(slice.len());
        self.slices.push_back(slice);
    }

    /// Bytes left.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if no bytes are left.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Drops everything past `len` bytes.
    pub fn truncate(&mut self, len: usize) {
        let rest = self.split(len);
        self.slices = rest.slices;
        self.len = rest.len;
    }

    // Takes the first `len` bytes (or all there are) off the front.
    fn split(&mut self, len: usize) -> Self {
        let mut front = Self::default();
        while front.len < len {
            let Some(slice) = self.slices.pop_front() else {
                break;
            };
            self.len = self.len.saturating_sub(slice.len());
            match slice.split_at(len - front.len) {
                Ok((head, tail)) => {
                    front.push(head);
                    if !tail.is_empty() {
                        self.len = self.len.saturating_add(tail.len());
                        self.slices.push_front(tail);
                    }
                }
                // The slice ends before the middle asked for.
                Err(_) => front.push(slice),
            }
        }
        front
    }

    /// Takes `N` bytes off the front; `None`, with everything consumed, if there are fewer.
    pub fn read_array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let front = self.split(N);
        let mut bytes = [0; N];
        let mut rest = bytes.as_mut_slice();
        for slice in &front.slices {
            let copied = slice.copy_to(rest);
            rest = rest.get_mut(copied..)?;
        }
        (front.len == N).then_some(bytes)
    }

    /// Takes the place of `N` bytes off the front, to be written later; `None` if there are fewer.
    pub fn reserve(&mut self, len: usize) -> Option<Buffers<'a>> {
        let front = self.split(len);
        (front.len == len).then_some(front)
    }

    /// Writes `bytes` to the front, as far as they fit.
    pub fn write(&mut self, mut bytes: &[u8]) {
        for slice in self.split(bytes.len()).slices {
            let (now, later) = bytes.split_at(slice.len().min(bytes.len()));
            slice.copy_from(now);
            bytes = later;
        }
    }

    /// Takes everything off, appended to `to`.
    pub fn drain_to(&mut self, to: &mut VecDeque<u8>) {
        let mut chunk = [0; 4096];
        while !self.is_empty() {
            for slice in self.split(chunk.len()).slices {
                let copied = slice.copy_to(&mut chunk);
                to.extend(chunk.iter().take(copied));
            }
        }
    }

    fn iovecs(&self) -> ([libc::iovec; MAX_IOVECS], usize) {
        let empty = libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        };
        let mut iovecs = [empty; MAX_IOVECS];
        let mut count = 0;
        for (iovec, slice) in iovecs.iter_mut().zip(&self.slices) {
            iovec.iov_base = slice.ptr_guard_mut().as_ptr().cast();
            iovec.iov_len = slice.len();
            count += 1;
        }
        (iovecs, count)
    }

    /// Sends from the front what `socket` takes now, and consumes it. Never blocks, never raises `SIGPIPE`.
    ///
    /// # Errors
    /// As sendmsg(2).
    pub fn send(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let (mut iovecs, count) = self.iovecs();
        let message = message(&mut iovecs, count);
        let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        // SAFETY: the message points at `count` iovecs, each a slice of guest memory that stays mapped for 'a.
        let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &message, flags) };
        let sent = usize::try_from(sent).map_err(|_| io::Error::last_os_error())?;
        self.split(sent);
        Ok(sent)
    }

    /// Receives to the front what `socket` has now, and consumes that room; 0 is the end of the stream.
    /// Never blocks. The receiver must have checked that there is room.
    ///
    /// # Errors
    /// As recvmsg(2).
    pub fn receive(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let (mut iovecs, count) = self.iovecs();
        let mut message = message(&mut iovecs, count);
        // SAFETY: as in `send`; the kernel writes to guest memory only.
        let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) };
        let got = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
        self.split(got);
        Ok(got)
    }
}

fn message(iovecs: &mut [libc::iovec; MAX_IOVECS], count: usize) -> libc::msghdr {
    // SAFETY: all zeros is a valid msghdr: no name, no iovecs, no control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iovecs.as_mut_ptr();
    message.msg_iovlen = count;
    message
}

/// Slices of a test's or a local buffer, as if it were guest memory.
impl<'a> From<&'a mut [u8]> for Buffers<'a> {
    fn from(bytes: &'a mut [u8]) -> Self {
        let mut buffers = Self::default();
        buffers.push(VolatileSlice::from(bytes));
        buffers
    }
}
