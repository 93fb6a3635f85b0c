//! Taps: network devices whose other end is a file descriptor.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

/// `_IOW('T', 202, int)` and `_IOW('T', 216, int)` of `linux/if_tun.h`.
const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
const TUNSETVNETHDRSZ: libc::Ioctl = 0x4004_54d8;

/// Bytes of the header before each frame: virtio 1's (`struct virtio_net_hdr_v1`).
static HEADER: libc::c_int = 12;

/// Makes the tap `name` in the calling thread's network namespace. It is gone when its last descriptor is closed.
///
/// # Errors
/// `ResourceBusy`: there is a tap of that name, which another process holds.
pub(super) fn make(name: &str) -> io::Result<OwnedFd> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    // SAFETY: all zeros are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let room = request.ifr_name.len().saturating_sub(1);
    for (to, from) in request.ifr_name.iter_mut().take(room).zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    ioctl(&file, TUNSETIFF, (&raw const request).cast())?;
    ioctl(&file, TUNSETVNETHDRSZ, (&raw const HEADER).cast())?;
    Ok(file.into())
}

/// `argument` must be what `request` reads.
fn ioctl(file: &File, request: libc::Ioctl, argument: *const libc::c_void) -> io::Result<()> {
    // SAFETY: both callers pass a live object of the type that their request reads and nothing writes.
    match unsafe { libc::ioctl(file.as_raw_fd(), request, argument) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
