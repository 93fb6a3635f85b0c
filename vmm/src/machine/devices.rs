//! Makes the devices that were asked for, connects them to the machine and gives each a thread to run on.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;

use cella_proto::snapshot::DeviceState;

use super::worker::{Worker, WorkerThread};
use super::{Confine, Machine, MachineError};
use crate::device::block::{Block, BlockError};
use crate::device::fs::{Fs, FsError};
use crate::device::rng::Rng;
use crate::device::vsock::Vsock;
use crate::device::{Device, DeviceError};
use crate::jail::{self, ThreadKind};
use crate::snapshot::SnapshotError;
use crate::transport::mmio::{Frozen, MmioTransport};

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
    /// virtio-rng.
    Rng,
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
pub struct Devices {
    /// All, in the order in which they were asked for.
    all: Vec<(Arc<MmioTransport>, OnThread)>,
    threads: Vec<WorkerThread>,
}

/// Where a device runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OnThread {
    Main,
    Own,
}

/// A device, its name in log lines, and the kind of thread that it needs for itself, if any.
struct Made {
    name: &'static str,
    device: Box<dyn Device>,
    thread: Option<ThreadKind>,
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
        let mut devices = Self {
            all: Vec::new(),
            threads: Vec::new(),
        };
        for spec in specs {
            let Made {
                name,
                device,
                thread,
            } = make(spec)?;
            let run = |source| DevicesError::Run { name, source };
            match thread {
                None => {
                    let transport = plug(machine, name, device, main)?;
                    main.add(transport.clone()).map_err(run)?;
                    devices.all.push((transport, OnThread::Main));
                }
                Some(kind) => {
                    let mut worker = Worker::new().map_err(run)?;
                    let transport = plug(machine, name, device, &worker)?;
                    worker.add(transport.clone()).map_err(run)?;
                    devices.all.push((transport, OnThread::Own));
                    let thread = WorkerThread::spawn(name, worker, kind, confine.clone());
                    devices.threads.push(thread.map_err(run)?);
                }
            }
        }
        Ok(devices)
    }

    /// Ends the devices' use, each on its own thread, and their threads. The vCPUs must have stopped.
    pub fn shut_down(self) {
        drop(self.threads);
        for (transport, thread) in &self.all {
            if *thread == OnThread::Main {
                transport.shut_down();
            }
        }
    }

    /// Holds every device still.
    pub fn freeze(&self) -> Vec<Frozen<'_>> {
        self.all
            .iter()
            .map(|(transport, _)| transport.freeze())
            .collect()
    }

    /// Makes the devices, none of which was used yet, those that were saved. After the machine has its state
    /// ([`Machine::spawn`]), before it runs.
    ///
    /// # Errors
    /// They are not the same devices in the same order.
    pub fn restore(&self, saved: &[DeviceState]) -> Result<(), SnapshotError> {
        if saved.len() != self.all.len() {
            return Err(SnapshotError::Shape {
                what: "a number of devices of",
                saved: saved.len().to_string(),
                wanted: self.all.len().to_string(),
            });
        }
        for ((transport, _), saved) in self.all.iter().zip(saved) {
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
            thread: Some(ThreadKind::Block),
        },
        DeviceSpec::Rng => Made {
            name: "rng",
            device: Box::new(Rng::new()),
            thread: None,
        },
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
        },
        DeviceSpec::Fs { tag } => Made {
            name: "fs",
            device: Box::new(Fs::new(&tag, Path::new(jail::SHARE)).map_err(DevicesError::Fs)?),
            thread: Some(ThreadKind::Fs),
        },
    })
}
