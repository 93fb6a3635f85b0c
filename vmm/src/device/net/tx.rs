//! From the driver to the tap.

use std::io::ErrorKind;

use virtio_queue::QueueT;
use vm_memory::GuestAddressSpace;

use super::tap::Tap;
use super::{LARGEST, TX, pieces};
use crate::device::lent::{broken, pop};
use crate::device::{DeviceError, Resources};

/// How a round of sending ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sent {
    /// Everything is sent; the driver kicks when there is more.
    All,
    /// A ring's length was sent, and there is more.
    More,
    /// The tap takes nothing now.
    Blocked,
}

/// Sends at most a ring's length of frames. A frame that the tap refuses, or that no driver would send, is dropped,
/// as a cable does.
pub(super) fn transmit(tap: &Tap, resources: &mut Resources) -> Result<Sent, DeviceError> {
    let sent = send(tap, resources);
    let used = resources.notify(TX);
    let sent = sent?;
    used?;
    Ok(sent)
}

fn send(tap: &Tap, resources: &mut Resources) -> Result<Sent, DeviceError> {
    let broken = broken(TX);
    let memory = resources.memory.memory();
    let queue = resources.queue(TX)?;
    queue.disable_notification(&*memory).map_err(broken)?;
    for _ in 0..queue.size() {
        let Some(chain) = pop(queue, &memory, TX)? else {
            match queue.enable_notification(&*memory).map_err(broken)? {
                true => continue,
                false => return Ok(Sent::All),
            }
        };
        let head = chain.head_index();
        let frame = pieces::of(&memory, chain, false).filter(|frame| pieces::len(frame) <= LARGEST);
        if let Some(frame) = frame
            && let Err(error) = tap.write(&frame)
            && error.kind() == ErrorKind::WouldBlock
        {
            queue.set_next_avail(queue.next_avail().wrapping_sub(1));
            return Ok(Sent::Blocked);
        }
        queue.add_used(&*memory, head, 0).map_err(broken)?;
    }
    Ok(Sent::More)
}
