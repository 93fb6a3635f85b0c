//! The network device (virtio 1.2, section 5.1) over a tap that was opened before: one pair of queues, no control queue.
//!
//! Frames go straight between guest memory and the tap, one system call each. The header that virtio puts before
//! each frame is the tap's own (`IFF_VNET_HDR`), so checksums and segmentation are left to whoever can do them: the
//! other guest, the host's kernel or its hardware.

mod pieces;
mod rx;
mod tap;
#[cfg(test)]
mod tests;
mod tx;
mod used;

use std::fs::File;
use std::sync::{Arc, Mutex, PoisonError};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_LINK_UP,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::lent::read_config;
use super::{Device, DeviceError, Readiness, Resources, SnapshotStep, Watcher};
use rx::{Received, Rx};
use tap::Tap;
use tx::Sent;

const RX: usize = 0;
const TX: usize = 1;
const QUEUE_SIZES: [u16; 2] = [256, 256];

/// Bytes of `struct virtio_net_hdr_v1` (section 5.1.6), which precedes every frame in either direction.
const HEADER: usize = 12;

/// Bytes of the largest frame with its header: what a segmentation offload leaves in one piece (section 5.1.6.3.1).
const LARGEST: usize = 65550 + HEADER;

/// Bytes around the payload of a frame that is not segmented: addresses and type, and a VLAN tag.
const FRAMING: usize = 14 + 4;

const TOKEN: u64 = 0;

/// What a tap can do for the guest, and the guest for it.
const OFFLOADS: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN;

/// The device while a driver uses it.
struct Active {
    resources: Resources,
    watcher: Arc<dyn Watcher + Send + Sync>,
    rx: Rx,
    /// The tap knows what the driver takes. It is told by the device's own thread: the vCPU that activates the
    /// device may not.
    configured: bool,
    /// What the tap is watched for now.
    watched: Readiness,
    /// What it is to be watched for: reading while the driver has room, writing while the tap has none.
    wanted: Readiness,
}

/// Where another tap is left for a device, which takes it when it is kicked the next time.
#[derive(Clone, Debug, Default)]
pub struct NextTap(Arc<Mutex<Option<File>>>);

impl NextTap {
    /// Leaves `tap`, of the same kind as the device's own.
    pub fn leave(&self, tap: File) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(tap);
    }

    fn take(&self) -> Option<File> {
        let mut left = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        left.take()
    }
}

/// A virtio network device.
pub struct Net {
    tap: Tap,
    next: NextTap,
    mac: [u8; 6],
    mtu: u16,
    /// The tap's interface is gone; the driver sees its link down.
    gone: bool,
    active: Option<Active>,
}

impl Net {
    /// A network card with the address `mac` whose cable ends in `tap`: nonblocking, with a header of 12 bytes
    /// before each frame. `mtu` is the largest packet in bytes, without its Ethernet header; at least 68.
    ///
    /// A `tap` that is none (a socket that keeps message boundaries) works too, without offloads.
    pub fn new(tap: File, mac: [u8; 6], mtu: u16) -> Self {
        Self {
            tap: Tap::new(tap),
            next: NextTap::default(),
            mac,
            mtu,
            gone: false,
            active: None,
        }
    }

    /// Where another tap can be left for it.
    pub fn next_tap(&self) -> NextTap {
        self.next.clone()
    }

    /// Takes the tap that was left for it, if one was.
    fn change_tap(&mut self) -> Result<(), DeviceError> {
        let Some(tap) = self.next.take() else {
            return Ok(());
        };
        if let Some(active) = &mut self.active {
            if active.watched != Readiness::default() {
                let unwatched = active.watcher.unwatch(self.tap.fd());
                unwatched.map_err(host("letting a tap go"))?;
            }
            active.watched = Readiness::default();
            // The driver offered its buffers before, and will not kick for them again.
            active.wanted.read = true;
            active.configured = false;
        }
        self.tap = Tap::new(tap);
        Ok(())
    }

    /// The configuration space (section 5.1.4): address, status, pairs of queues, MTU.
    fn config(&self) -> [u8; 12] {
        let [a, b, c, d, e, f] = self.mac;
        let up = match self.gone {
            true => 0,
            false => VIRTIO_NET_S_LINK_UP as u16,
        };
        let [status, status_high] = up.to_le_bytes();
        let [mtu, mtu_high] = self.mtu.to_le_bytes();
        [a, b, c, d, e, f, status, status_high, 1, 0, mtu, mtu_high]
    }

    fn active(&mut self) -> Result<(&mut Active, &Tap), DeviceError> {
        let active = self.active.as_mut();
        Ok((
            active.ok_or(DeviceError::State("it is inactive"))?,
            &self.tap,
        ))
    }

    /// Tells the tap once what the driver takes.
    fn configure(&mut self) -> Result<(), DeviceError> {
        let (active, tap) = self.active()?;
        if !active.configured {
            tap.set_offloads(active.resources.features)
                .map_err(host("setting the offloads of a tap"))?;
            active.configured = true;
        }
        Ok(())
    }

    /// Hands the tap's frames to the driver: a batch, then the event loop gets its turn.
    fn receive(&mut self) -> Result<(), DeviceError> {
        if self.gone {
            return Ok(());
        }
        let (active, tap) = self.active()?;
        let received = active.rx.receive(tap, &mut active.resources)?;
        active.wanted.read = received == Received::Watch;
        if received == Received::Gone {
            eprintln!("cella-vmm: the tap of a network device is gone");
            active.wanted = Readiness::default();
            active.resources.interrupt.config();
            self.gone = true;
        }
        Ok(())
    }

    /// Hands the driver's frames to the tap until there are none. A driver that never stops sending must not keep
    /// what it shall receive waiting.
    fn transmit(&mut self) -> Result<(), DeviceError> {
        loop {
            let (active, tap) = self.active()?;
            let sent = tx::transmit(tap, &mut active.resources)?;
            active.wanted.write = sent == Sent::Blocked;
            if sent != Sent::More {
                return Ok(());
            }
            self.receive()?;
        }
    }

    /// Watches the tap for what is wanted of it.
    fn watch(&mut self) -> Result<(), DeviceError> {
        let (active, tap) = self.active()?;
        if active.wanted == active.watched {
            return Ok(());
        }
        let watched = match active.wanted == Readiness::default() {
            true => active.watcher.unwatch(tap.fd()),
            false => active.watcher.watch(tap.fd(), TOKEN, active.wanted),
        };
        watched.map_err(host("watching a tap"))?;
        active.watched = active.wanted;
        Ok(())
    }
}

impl Device for Net {
    fn id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        let common = 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_NET_F_MAC
            | 1 << VIRTIO_NET_F_MTU
            | 1 << VIRTIO_NET_F_STATUS
            | 1 << VIRTIO_NET_F_MRG_RXBUF;
        match self.tap.has_offloads() {
            true => common | OFFLOADS,
            false => common,
        }
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.config(), offset, data);
    }

    fn activate(
        &mut self,
        resources: Resources,
        watcher: Arc<dyn Watcher + Send + Sync>,
    ) -> Result<(), DeviceError> {
        if self.active.is_some() {
            return Err(DeviceError::State("it is active already"));
        }
        if resources.queues.len() != QUEUE_SIZES.len() {
            return Err(DeviceError::State("it has two queues"));
        }
        let segmented = 1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_GUEST_TSO6;
        let largest = match resources.features & segmented {
            0 => HEADER + FRAMING + usize::from(self.mtu),
            _ => LARGEST,
        };
        let mergeable = resources.features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0;
        self.active = Some(Active {
            resources,
            watcher,
            rx: Rx::new(largest, mergeable),
            configured: false,
            watched: Readiness::default(),
            wanted: Readiness::default(),
        });
        Ok(())
    }

    fn kick(&mut self, index: usize) -> Result<(), DeviceError> {
        self.change_tap()?;
        self.configure()?;
        match index {
            RX => self.receive()?,
            TX => self.transmit()?,
            _ => return Err(DeviceError::State("no such queue")),
        }
        self.watch()
    }

    fn event(&mut self, _token: u64, readiness: Readiness) -> Result<(), DeviceError> {
        self.configure()?;
        if readiness.write {
            self.transmit()?;
        }
        if readiness.read {
            self.receive()?;
        }
        self.watch()
    }

    fn snapshot(&mut self, step: SnapshotStep<'_>) -> Result<(), DeviceError> {
        match step {
            // Frames on their way are the network's to lose.
            SnapshotStep::Save(_) => Ok(()),
            // The driver offered its buffers before, and will not kick for them again.
            SnapshotStep::Restore(_) => {
                let (active, _) = self.active()?;
                active.wanted.read = true;
                self.watch()
            }
        }
    }

    fn reset(&mut self) -> Option<Resources> {
        let active = self.active.take()?;
        if active.watched != Readiness::default()
            && let Err(error) = active.watcher.unwatch(self.tap.fd())
        {
            eprintln!("cella-vmm: a network device no longer watches its tap: {error}");
        }
        Some(active.resources)
    }
}

fn host(action: &'static str) -> impl FnOnce(std::io::Error) -> DeviceError {
    move |source| DeviceError::Host { action, source }
}
