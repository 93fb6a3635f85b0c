//! Interfaces that a guest has before anybody knows which network they are of: a template's, whose driver has found them.

use std::io;

use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::{Error, TAP, tap};
use crate::hypervisor::Nic;

/// The hardware address of all of them, which is nobody else's; and as text.
const MAC: [u8; 6] = [0x02, 0xce, 0x11, 0xa0, 0, 0];
/// See [`spares`].
pub const SPARE_ADDRESS: &str = "02:ce:11:a0:00:00";

/// The guest's driver allows no larger MTU than it has found: the largest that there is.
const MTU: u16 = u16::MAX;

/// `count` interfaces with the hardware address [`SPARE_ADDRESS`]. They end in taps where nothing else is: in a network
/// namespace of their own, which goes with them.
///
/// # Errors
/// The host has no taps, or we may not make any.
pub async fn spares(count: u32) -> Result<Vec<Nic>, Error> {
    if count == 0 {
        return Ok(Vec::new());
    }
    // The thread ends with its namespace, and serves nothing else.
    let made = tokio::task::spawn_blocking(move || std::thread::spawn(move || make(count)).join());
    match made.await {
        Ok(Ok(made)) => made.map_err(Error::Spare),
        _ => Err(Error::Spare(io::Error::other(
            "the thread that did it died",
        ))),
    }
}

fn make(count: u32) -> io::Result<Vec<Nic>> {
    // SAFETY: the network namespace alone is unshared: no file descriptor table.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
    (0..count)
        .map(|number| {
            Ok(Nic {
                tap: tap::make(&format!("{TAP}{number}"))?,
                mac: MAC,
                mtu: MTU,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_is_the_address() {
        assert_eq!(super::super::facts::mac_text(&MAC), SPARE_ADDRESS);
    }
}
