//! The virtio socket device (virtio 1.2, section 5.10): stream connections between the guest and Unix sockets of
//! the host.
//!
//! | direction | how |
//! | --- | --- |
//! | host to guest | connect to the listening socket, write `CONNECT <port>\n`, read `OK <host port>\n`; what follows is the connection. A refused one is closed. |
//! | guest to host | the guest connects to context id 2, port P; the device connects to the socket `<directory>/<P>`. If it cannot, the guest is refused. |
//!
//! | module | what lives there |
//! | --- | --- |
//! | [`packet`] | headers on the wire |
//! | [`buffers`] | the memory of a descriptor chain |
//! | [`csm`] | the state machine of one connection |
//! | [`handshake`] | the host's `CONNECT` line |
//! | [`muxer`] | all connections and their sockets |

pub mod buffers;
pub mod csm;
pub mod handshake;
pub mod muxer;
pub mod packet;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::buffers::Buffers;
use self::muxer::Muxer;
use self::packet::{HEADER_LEN, Header};
use super::lent::{Lent, broken, pop, read_config};
use super::{Device, DeviceError, Readiness, Resources, SnapshotStep, Watcher};

/// `VIRTIO_VSOCK_F_STREAM`.
const F_STREAM: u32 = 0;

/// Receive queue: packets for the guest.
const RX: usize = 0;
/// Transmit queue: packets of the guest's.
const TX: usize = 1;
/// Event queue: what happens to the device itself.
const EVENTS: usize = 2;

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`: every connection is lost (virtio 1.2, section 5.10.6.7).
const TRANSPORT_RESET: [u8; 4] = 0_u32.to_le_bytes();

// A Linux driver fills the receive queue with 4 KiB buffers when it starts: a larger queue is a longer boot.
const QUEUE_SIZES: [u16; 3] = [128, 128, 8];

/// The most chains of the guest's that one call handles, so that other devices of the event loop get their turn.
const BATCH: usize = 256;

// The token of the device's own event descriptor, which has it go on after a batch.
const CONTINUE: u64 = 2;

const READ: Readiness = Readiness {
    read: true,
    write: false,
};

/// The socket device. See the module.
pub struct Vsock {
    guest_cid: u64,
    muxer: Muxer,
    go_on: EventFd,
    active: Lent,
    watcher: Option<Arc<dyn Watcher + Send + Sync>>,
    // The guest has been told that every connection is lost, and gets no packet until it knows: it would take a new
    // connection for an old one. How far it had offered room for events then.
    resetting: Option<u16>,
}

impl Vsock {
    /// A socket device for the guest with context id `guest_cid` (3 or more). The host's connections come through
    /// `listener`; the guest's go to the sockets in `sockets_dir`, a directory as the process sees it when the
    /// guest runs: in its jail.
    ///
    /// # Errors
    /// The listener cannot be made nonblocking, or an event or timer descriptor cannot be had.
    pub fn new(
        guest_cid: u64,
        listener: UnixListener,
        sockets_dir: PathBuf,
    ) -> Result<Self, DeviceError> {
        let host = |action| move |source| DeviceError::Host { action, source };
        Ok(Self {
            guest_cid,
            muxer: Muxer::new(guest_cid, listener, sockets_dir)
                .map_err(host("preparing the vsock listener and its timer"))?,
            go_on: EventFd::new(EFD_NONBLOCK).map_err(host("making vsock's event descriptor"))?,
            active: Lent::default(),
            watcher: None,
            resetting: None,
        })
    }

    // Handles what the guest sent, then gives it what there is for it.
    fn run(&mut self) -> Result<(), DeviceError> {
        let sent_all = self.transmit()?;
        let gave_all = self.receive()?;
        if sent_all && gave_all {
            return Ok(());
        }
        self.put_off()
    }

    // Tells the guest that the connections that it knows of are lost: their sockets end with ECONNRESET.
    fn reset_connections(&mut self) -> Result<(), DeviceError> {
        let resources = self.active.get()?;
        let guard = resources.memory.memory();
        let queue = resources
            .queues
            .get_mut(EVENTS)
            .ok_or(DeviceError::State("vsock has three queues"))?;
        // A driver without room for the event hears of it when it uses a connection: nobody answers for that.
        let Some(chain) = pop(queue, &guard, EVENTS)? else {
            return Ok(());
        };
        let head = chain.head_index();
        let mut len = 0;
        if let Ok(mut room) = Buffers::new(&guard, chain, true)
            && let Some(mut event) = room.reserve(TRANSPORT_RESET.len())
        {
            event.write(&TRANSPORT_RESET);
            len = TRANSPORT_RESET.len() as u32;
        }
        queue.add_used(&*guard, head, len).map_err(broken(EVENTS))?;
        // The kick with which the driver gives the buffer back says that it has acted. It is asked for behind the
        // buffers that are there already.
        let next = queue.next_avail();
        let end = queue
            .avail_idx(&*guard, Ordering::Acquire)
            .map_err(broken(EVENTS))?;
        queue.set_next_avail(end.0);
        queue.enable_notification(&*guard).map_err(broken(EVENTS))?;
        queue.set_next_avail(next);
        self.resetting = Some(end.0);
        resources.notify(EVENTS)
    }

    // The guest offers room for events. It has taken the one that it got, if there is more room than there was: a restored
    // device is kicked once without the guest, too.
    fn offer_events(&mut self) -> Result<(), DeviceError> {
        let Some(end) = self.resetting else {
            return Ok(());
        };
        let resources = self.active.get()?;
        let guard = resources.memory.memory();
        let offered = resources
            .queue(EVENTS)?
            .avail_idx(&*guard, Ordering::Acquire)
            .map_err(broken(EVENTS))?;
        if offered.0 == end {
            return Ok(());
        }
        self.resetting = None;
        self.run()
    }

    // Has the event loop call again, after the other devices' turns.
    fn put_off(&self) -> Result<(), DeviceError> {
        self.go_on.write(1).map_err(|source| DeviceError::Host {
            action: "putting off the rest of vsock's queues",
            source,
        })
    }

    // Handles packets of the guest's; false if some are left for later.
    fn transmit(&mut self) -> Result<bool, DeviceError> {
        let resources = self.active.get()?;
        let guard = resources.memory.memory();
        let queue = resources.queue(TX)?;
        let mut done = false;
        for _ in 0..BATCH {
            let Some(chain) = pop(queue, &guard, TX)? else {
                // Looks once more after asking for kicks, lest a packet that comes in between be missed.
                if queue.enable_notification(&*guard).map_err(broken(TX))? {
                    continue;
                }
                done = true;
                break;
            };
            let head = chain.head_index();
            // A chain that holds no packet is used up like any other.
            if let Ok(mut payload) = Buffers::new(&guard, chain, false)
                && let Some(wire) = payload.read_array::<HEADER_LEN>()
            {
                self.muxer
                    .packet(&Header::parse(&wire), payload)
                    .map_err(unwatchable)?;
            }
            queue.add_used(&*guard, head, 0).map_err(broken(TX))?;
        }
        resources.notify(TX)?;
        Ok(done)
    }

    // Fills the guest's buffers with packets for it; false if some could take more.
    fn receive(&mut self) -> Result<bool, DeviceError> {
        let resources = self.active.get()?;
        let guard = resources.memory.memory();
        let queue = resources.queue(RX)?;
        let mut done = false;
        let mut used = false;
        for _ in 0..BATCH {
            // Kicks are asked for only when buffers are missed: a guest that refills its queue is left alone.
            if self.resetting.is_some() || !self.muxer.has_packets() {
                done = true;
                break;
            }
            let Some(chain) = pop(queue, &guard, RX)? else {
                if queue.enable_notification(&*guard).map_err(broken(RX))? {
                    continue;
                }
                done = true;
                break;
            };
            let head = chain.head_index();
            let len = match fill(&mut self.muxer, Buffers::new(&guard, chain, true).ok()) {
                Filled::Packet(len) => len,
                Filled::Unusable => 0,
                Filled::Nothing => {
                    queue.go_to_previous_position();
                    continue;
                }
            };
            queue.add_used(&*guard, head, len).map_err(broken(RX))?;
            used = true;
        }
        if used {
            resources.notify(RX)?;
        }
        Ok(done)
    }
}

// What has become of a buffer of the guest's.
enum Filled {
    // It holds this many bytes.
    Packet(u32),
    // It has no room for a packet with data, or is not in guest memory.
    Unusable,
    // There was nothing for the guest after all.
    Nothing,
}

fn fill(muxer: &mut Muxer, buffers: Option<Buffers<'_>>) -> Filled {
    let Some(mut room) = buffers else {
        return Filled::Unusable;
    };
    let Some(mut front) = room.reserve(HEADER_LEN) else {
        return Filled::Unusable;
    };
    if room.is_empty() {
        return Filled::Unusable;
    }
    match muxer.next_packet(&mut room) {
        Some(header) => {
            front.write(&header.format());
            Filled::Packet((HEADER_LEN as u32).saturating_add(header.len))
        }
        None => Filled::Nothing,
    }
}

fn unwatchable(source: io::Error) -> DeviceError {
    DeviceError::Host {
        action: "watching vsock's descriptors",
        source,
    }
}

impl Device for Vsock {
    fn id(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << F_STREAM
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // `struct virtio_vsock_config` is the guest's context id alone.
        read_config(&self.guest_cid.to_le_bytes(), offset, data);
    }

    fn activate(
        &mut self,
        resources: Resources,
        watcher: Arc<dyn Watcher + Send + Sync>,
    ) -> Result<(), DeviceError> {
        self.active.take_up(resources, QUEUE_SIZES.len())?;
        watcher
            .watch(self.go_on.as_raw_fd(), CONTINUE, READ)
            .map_err(unwatchable)?;
        self.watcher = Some(watcher.clone());
        self.muxer.start(watcher).map_err(unwatchable)
    }

    fn kick(&mut self, index: usize) -> Result<(), DeviceError> {
        match index {
            RX => match self.receive()? {
                true => Ok(()),
                false => self.put_off(),
            },
            TX => self.run(),
            _ => self.offer_events(),
        }
    }

    fn snapshot(&mut self, step: SnapshotStep<'_>) -> Result<(), DeviceError> {
        match step {
            SnapshotStep::Save(own) => {
                // Nothing is saved where the guest knows of no connection.
                if self.muxer.connections() > 0 || self.muxer.has_packets() {
                    own.extend_from_slice(&self.muxer.next_port().to_le_bytes());
                }
                Ok(())
            }
            SnapshotStep::Restore([]) => Ok(()),
            SnapshotStep::Restore(own) => {
                let port = own.try_into().map(u32::from_le_bytes).map_err(|_| {
                    DeviceError::Snapshot("what vsock has saved is no port of the host's")
                })?;
                self.muxer.go_on_from(port);
                self.reset_connections()
            }
        }
    }

    fn event(&mut self, token: u64, readiness: Readiness) -> Result<(), DeviceError> {
        if token == CONTINUE {
            // Cleared; that it is empty already does no harm.
            let _ = self.go_on.read();
            return self.run();
        }
        self.muxer.event(token, readiness).map_err(unwatchable)?;
        match self.receive()? {
            true => Ok(()),
            false => self.put_off(),
        }
    }

    fn reset(&mut self) -> Option<Resources> {
        let resources = self.active.give_back()?;
        self.resetting = None;
        self.muxer.stop();
        if let Some(watcher) = self.watcher.take() {
            let _ = watcher.unwatch(self.go_on.as_raw_fd());
        }
        Some(resources)
    }
}
