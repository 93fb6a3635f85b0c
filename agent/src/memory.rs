//! Memory that a clone has beyond its template's: a virtio-mem device in a slot that was empty, whose driver plugs all of it
//! when it is found. The kernel says of each block that it is in use; until the last, containers have to wait, because a
//! process would find less memory than its limit lets it have.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, sockopt};

use crate::slots;

/// Bytes of a memory block, in hexadecimal.
const BLOCK_BYTES: &str = "/sys/devices/system/memory/block_size_bytes";
/// The multicast group of the kernel's own events (linux/kobject.h).
const KERNEL_EVENTS: u32 = 1;
/// How an event begins: what happened, to what.
const ONLINE: &[u8] = b"online@/devices/system/memory/memory";
/// Bytes of an event at most (`UEVENT_BUFFER_SIZE` in linux/kobject.h).
const EVENT: usize = 2048;
/// The longest that a block may take: about two seconds were seen where the kernel is emulated.
const PATIENCE: Duration = Duration::from_secs(20);

/// Finds the device and returns when all of its `bytes` are in use. Nothing to do for none.
///
/// # Errors
/// The kernel takes none, or not all, or is silent for too long.
pub fn take_into_use(bytes: u64) -> io::Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    let text = std::fs::read_to_string(BLOCK_BYTES)?;
    let block = u64::from_str_radix(text.trim(), 16).map_err(io::Error::other)?;
    let blocks = bytes.div_ceil(block.max(1));
    let events = listen()?;
    slots::look_again();
    (0..blocks).try_for_each(|_| next_online(&events))
}

fn listen() -> io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(
        AddressFamily::NETLINK,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        Some(rustix::net::netlink::KOBJECT_UEVENT),
    )?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(PATIENCE))?;
    rustix::net::bind(&socket, &SocketAddrNetlink::new(0, KERNEL_EVENTS))?;
    Ok(socket)
}

/// Waits for the next block that is in use.
fn next_online(events: &OwnedFd) -> io::Result<()> {
    let end = Instant::now() + PATIENCE;
    let mut event = [0; EVENT];
    while Instant::now() < end {
        match rustix::net::recv(events, &mut event[..], RecvFlags::empty()) {
            Ok((_, len)) if is_online(event.get(..len).unwrap_or_default()) => return Ok(()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => break,
            Err(error) => return Err(error.into()),
        }
    }
    Err(io::Error::new(
        io::ErrorKind::TimedOut,
        format!("no block more within {} s", PATIENCE.as_secs()),
    ))
}

fn is_online(event: &[u8]) -> bool {
    event.starts_with(ONLINE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_in_use_are_known_by_their_events() {
        assert!(is_online(
            b"online@/devices/system/memory/memory32\0ACTION=online\0"
        ));
        for other in [
            &b"add@/devices/system/memory/memory32\0ACTION=add\0"[..],
            b"online@/devices/system/cpu/cpu1\0",
            b"",
        ] {
            assert!(!is_online(other));
        }
    }

    #[test]
    fn no_memory_is_no_work() {
        take_into_use(0).unwrap();
    }
}
