//! Makes the devices that were asked for, connects them to the machine and gives each a thread to run on.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;

use cella_proto::snapshot::DeviceState;

use super::worker::{Worker, WorkerThread};
use super::{Confine, Machine, MachineError};
use crate::device::block::{Block, BlockError};
use crate::device::fs::{Fs, FsError};
use crate::device::mem::Mem;
use crate::device::net::{Net, NextTap};
use crate::device::rng::Rng;
use crate::device::vsock::Vsock;
use crate::device::{Device, DeviceError};
use crate::jail::{self, ThreadKind};
use crate::snapshot::SnapshotError;
use crate::transport::Transport;
use crate::transport::mmio::{Frozen, MmioTransport};
use crate::transport::vhost_user::{OnEnd, VhostUserTransport};

/// A device as it was asked for, its files open.
#[derive(Debug)]
pub enum DeviceSpec {
    /// virtio-vsock.
    Vsock {
        /// The guest's address.
        guest_cid: u64,
        /// Where host programs connect.
        listener: UnixListener,
    },
    /// virtio-fs over the jail's shared directory.
    Fs {
        /// What the guest mounts it by: 1 to 36 bytes.
        tag: String,
    },
    /// virtio-blk.
    Block {
        /// A raw image.
        file: File,
        /// The guest may not write.
        read_only: bool,
        /// At most 20 bytes.
        serial: String,
    },
    /// virtio-mem.
    Mem {
        /// Guest-physical address of its range, which is mapped.
        start: u64,
        /// Whole blocks.
        bytes: u64,
        /// What the range is mapped from, shared; none if it is a snapshot's.
        file: Option<File>,
    },
    /// virtio-rng.
    Rng,
    /// virtio-net.
    Net {
        /// The tap, opened as `vmm.proto` says.
        tap: File,
        /// The guest's hardware address.
        mac: [u8; 6],
        /// At least 68.
        mtu: u16,
    },
}

/// Why a device could not be made or connected.
#[derive(Debug, thiserror::Error)]
pub enum DevicesError {
    /// The image cannot be used.
    #[error("making a block device: {0}")]
    Block(#[source] BlockError),
    /// The listener cannot be used.
    #[error("making the vsock device: {0}")]
    Vsock(#[source] DeviceError),
    /// The shared directory cannot be served.
    #[error("making the file system device: {0}")]
    Fs(#[source] FsError),
    /// The machine has no room, or KVM refused.
    #[error("connecting device {name}: {source}")]
    Connect {
        /// The kind of device.
        name: &'static str,
        /// The machine's answer.
        #[source]
        source: MachineError,
    },
    /// Event file descriptors, an event loop or a thread could not be made.
    #[error("running device {name}: {source}")]
    Run {
        /// The kind of device.
        name: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The machine's devices, running.
#[derive(Default)]
pub struct Devices {
    /// Those that run on the main thread.
    of_main: Vec<Arc<dyn Transport>>,
    threads: Vec<WorkerThread>,
    /// Those behind registers, in the order in which they were asked for.
    mmio: Vec<Arc<MmioTransport>>,
    /// Those that a hypervisor elsewhere uses.
    vhost_user: Vec<Arc<VhostUserTransport>>,
    /// The first network device, and where it finds another tap.
    network: Option<(Arc<MmioTransport>, NextTap)>,
}

/// A device, its name in log lines, the kinds of thread that it needs for itself, if any, behind each transport, and how
/// many of its queues a vhost-user hypervisor hands over.
struct Made {
    name: &'static str,
    device: Box<dyn Device>,
    thread: Option<Threads>,
    handed: usize,
    next_tap: Option<NextTap>,
}

/// The kind of thread of a device, by its transport.
struct Threads {
    mmio: ThreadKind,
    vhost_user: ThreadKind,
}

impl Threads {
    fn both(kind: ThreadKind) -> Self {
        Self {
            mmio: kind,
            vhost_user: kind,
        }
    }
}

impl Devices {
    /// Makes and connects the devices of `specs` in their order. vsock and rng run in `main`, each of the others on a
    /// confined thread of its own.
    ///
    /// # Errors
    /// See [`DevicesError`].
    pub fn connect(
        machine: &mut Machine,
        specs: Vec<DeviceSpec>,
        main: &mut Worker,
        confine: &Confine,
    ) -> Result<Self, DevicesError> {
        let mut devices = Self::default();
        for spec in specs {
            let made = make(spec)?;
            let name = made.name;
            let thread = made.thread.as_ref().map(|threads| threads.mmio);
            let mut plugged = Vec::new();
            devices.run(name, thread, main, confine, |worker| {
                let transport = plug(machine, name, made.device, worker)?;
                plugged.push(transport.clone());
                Ok(transport)
            })?;
            if let (Some(transport), Some(next), None) =
                (plugged.first(), made.next_tap, &devices.network)
            {
                devices.network = Some((transport.clone(), next));
            }
            devices.mmio.append(&mut plugged);
        }
        Ok(devices)
    }

    /// Makes the devices of `specs` and serves each through its socket, connected to a hypervisor elsewhere. Each runs
    /// where [`Self::connect`] would have it run. `on_end` hears, on the thread of the device, of a connection that ended.
    ///
    /// # Errors
    /// See [`DevicesError`].
    pub fn serve(
        specs: Vec<(DeviceSpec, UnixStream)>,
        main: &mut Worker,
        confine: &Confine,
        on_end: &OnEnd,
    ) -> Result<Self, DevicesError> {
        let mut devices = Self::default();
        for (spec, socket) in specs {
            let made = make(spec)?;
            let name = made.name;
            let thread = made.thread.as_ref().map(|threads| threads.vhost_user);
            let mut served = Vec::new();
            devices.run(name, thread, main, confine, |worker| {
                let transport = VhostUserTransport::new(
                    name,
                    made.device,
                    made.handed,
                    socket,
                    worker.watcher(),
                    on_end.clone(),
                );
                served.push(transport.clone());
                Ok(transport)
            })?;
            devices.vhost_user.append(&mut served);
        }
        Ok(devices)
    }

    /// Has a device run in `main`, or on a thread of its own of kind `thread`, behind the transport that `transport`
    /// makes for the event loop.
    fn run<T: Transport + 'static>(
        &mut self,
        name: &'static str,
        thread: Option<ThreadKind>,
        main: &mut Worker,
        confine: &Confine,
        transport: impl FnOnce(&Worker) -> Result<Arc<T>, DevicesError>,
    ) -> Result<(), DevicesError> {
        let run = |source| DevicesError::Run { name, source };
        match thread {
            None => {
                let transport = transport(main)?;
                main.add(transport.clone()).map_err(run)?;
                self.of_main.push(transport);
            }
            Some(kind) => {
                let mut worker = Worker::new().map_err(run)?;
                let transport = transport(&worker)?;
                worker.add(transport).map_err(run)?;
                let thread = WorkerThread::spawn(name, worker, kind, confine.clone());
                self.threads.push(thread.map_err(run)?);
            }
        }
        Ok(())
    }

    /// Where guest memory is mapped for the devices that a hypervisor elsewhere uses.
    pub fn guest_ranges(&self) -> Vec<Range<u64>> {
        let transports = self.vhost_user.iter();
        transports
            .flat_map(|transport| transport.guest_ranges())
            .collect()
    }

    /// Ends the devices' use, each on its own thread, and their threads. The vCPUs must have stopped.
    pub fn shut_down(self) {
        drop(self.threads);
        for transport in &self.of_main {
            transport.shut_down();
        }
    }

    /// Gives the first network device another tap; false if there is none.
    pub fn plug(&self, tap: File) -> bool {
        let Some((transport, next)) = &self.network else {
            return false;
        };
        next.leave(tap);
        if let Some(kick) = transport.kicks().first() {
            // It fails only when the counter is about to overflow: a kick is pending then.
            let _ = kick.write(1);
        }
        true
    }

    /// Holds every device still.
    pub fn freeze(&self) -> Vec<Frozen<'_>> {
        self.mmio.iter().map(|device| device.freeze()).collect()
    }

    /// How many of `spares` slots are left over if as many devices as were `saved` are these, and the others are new in
    /// spare slots.
    ///
    /// # Errors
    /// There are fewer devices than were saved, or more than there are slots.
    pub fn left_over(&self, saved: &[DeviceState], spares: u32) -> Result<u32, SnapshotError> {
        self.mmio
            .len()
            .checked_sub(saved.len())
            .and_then(|added| spares.checked_sub(u32::try_from(added).ok()?))
            .ok_or_else(|| SnapshotError::Shape {
                what: "a number of devices of",
                saved: format!("{} with room for {spares} more", saved.len()),
                wanted: self.mmio.len().to_string(),
            })
    }

    /// Makes the first devices, none of which was used yet, those that were saved. After the machine has its state
    /// ([`Machine::spawn`]), before it runs.
    ///
    /// # Errors
    /// They are not the same devices in the same order.
    pub fn restore(&self, saved: &[DeviceState]) -> Result<(), SnapshotError> {
        for (transport, saved) in self.mmio.iter().zip(saved) {
            transport.restore(saved)?;
        }
        Ok(())
    }
}

/// Puts `device` behind registers of `machine`, to run in `worker`.
fn plug(
    machine: &mut Machine,
    name: &'static str,
    device: Box<dyn Device>,
    worker: &Worker,
) -> Result<Arc<MmioTransport>, DevicesError> {
    let transport = MmioTransport::new(name, device, machine.memory(), worker.watcher())
        .map_err(|source| DevicesError::Run { name, source })?;
    let connect = |source| DevicesError::Connect { name, source };
    let slot = machine.allocate_slot().map_err(connect)?;
    machine
        .connect(slot, transport.clone(), transport.irq(), transport.kicks())
        .map_err(connect)?;
    Ok(transport)
}

fn make(spec: DeviceSpec) -> Result<Made, DevicesError> {
    Ok(match spec {
        DeviceSpec::Block {
            file,
            read_only,
            serial,
        } => Made {
            name: "block",
            device: Box::new(Block::new(file, read_only, &serial).map_err(DevicesError::Block)?),
            // A hypervisor elsewhere has disks of its own.
            thread: Some(Threads::both(ThreadKind::Block)),
            handed: 1,
            next_tap: None,
        },
        DeviceSpec::Mem { start, bytes, file } => Made {
            name: "mem",
            device: Box::new(Mem::new(start, bytes, file)),
            thread: None,
            handed: 1,
            next_tap: None,
        },
        DeviceSpec::Rng => Made {
            name: "rng",
            device: Box::new(Rng::new()),
            thread: None,
            handed: 1,
            next_tap: None,
        },
        // Not on the main thread: whoever floods the guest's network shall not delay control and vsock, and the thread
        // that reads what strangers send has the smallest filter.
        DeviceSpec::Net { tap, mac, mtu } => {
            let net = Net::new(tap, mac, mtu);
            Made {
                name: "net",
                next_tap: Some(net.next_tap()),
                device: Box::new(net),
                // As with disks.
                thread: Some(Threads::both(ThreadKind::Net)),
                handed: 2,
            }
        }
        DeviceSpec::Vsock {
            guest_cid,
            listener,
        } => Made {
            name: "vsock",
            device: Box::new(
                Vsock::new(guest_cid, listener, jail::SOCKETS.into())
                    .map_err(DevicesError::Vsock)?,
            ),
            thread: None,
            // The event queue stays with the hypervisor.
            handed: 2,
            next_tap: None,
        },
        DeviceSpec::Fs { tag } => Made {
            name: "fs",
            device: Box::new(Fs::new(&tag, Path::new(jail::SHARE)).map_err(DevicesError::Fs)?),
            thread: Some(Threads {
                mmio: ThreadKind::Fs,
                vhost_user: ThreadKind::VhostUserFs,
            }),
            handed: 2,
            next_tap: None,
        },
    })
}
