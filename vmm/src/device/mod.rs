//! Virtio devices, as the virtio 1.2 specification has them.
//!
//! A device is its feature bits, its configuration space and what it does with its queues. It knows no
//! transport, owns no thread and no event loop: a transport hands it memory, queues and an interrupt at
//! activation, calls it when the driver has kicked a queue or a watched file descriptor is ready, and takes
//! everything back at reset.

pub mod block;
pub mod fs;
mod lent;
pub mod mem;
pub mod net;
pub mod rng;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod vsock;

use std::os::fd::RawFd;
use std::sync::Arc;

use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// The guest's memory as every device and transport sees it.
pub type GuestMemory = GuestMemoryAtomic<GuestMemoryMmap>;

/// What a device can fail of. An error makes the transport set `DEVICE_NEEDS_RESET`: the device stops, the
/// VMM and the other devices go on.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The driver broke the virtio protocol in a way that leaves the queue unusable.
    #[error("virtio queue {queue}: {source}")]
    Queue {
        /// Index of the queue.
        queue: usize,
        /// What virtio-queue found.
        #[source]
        source: virtio_queue::Error,
    },
    /// A system call on the host failed.
    #[error("{action}: {source}")]
    Host {
        /// What was being done, on what.
        action: &'static str,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// The transport called an inactive device, or activated an active one or one with the wrong queues.
    #[error("device used in the wrong state: {0}")]
    State(&'static str),
    /// What the guest has of it cannot be saved, or what was saved is not what a device of its kind writes.
    #[error("{0}")]
    Snapshot(&'static str),
}

/// Tells the driver that a queue or the configuration has changed. Implemented by each transport.
pub trait Interrupt: Send + Sync {
    /// Buffers of queue `index` were used.
    fn queue(&self, index: usize);
    /// The configuration space has changed.
    fn config(&self);
}

/// What a transport lends to a device from activation to reset.
pub struct Resources {
    /// The guest's memory.
    pub memory: GuestMemory,
    /// One queue for each entry of [`Device::queue_sizes`], configured by the driver and marked ready.
    pub queues: Vec<Queue>,
    /// The way to the driver.
    pub interrupt: Arc<dyn Interrupt>,
    /// Feature bits that device and driver agreed on.
    pub features: u64,
}

impl Resources {
    /// Queue `index`.
    ///
    /// # Errors
    /// It is no queue of this device.
    pub fn queue(&mut self, index: usize) -> Result<&mut Queue, DeviceError> {
        self.queues
            .get_mut(index)
            .ok_or(DeviceError::State("it has no such queue"))
    }

    /// Interrupts the driver for queue `index` unless it asked not to be (`VIRTIO_F_EVENT_IDX`,
    /// `VIRTQ_AVAIL_F_NO_INTERRUPT`).
    ///
    /// # Errors
    /// The queue's rings lie outside of guest memory, or `index` is no queue of this device.
    pub fn notify(&mut self, index: usize) -> Result<(), DeviceError> {
        let memory = self.memory.clone();
        let needed = self
            .queue(index)?
            .needs_notification(&*vm_memory::GuestAddressSpace::memory(&memory))
            .map_err(lent::broken(index))?;
        if needed {
            self.interrupt.queue(index);
        }
        Ok(())
    }
}

/// What a watched file descriptor should be, or is, ready for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Readiness {
    /// Data, a connection or an end of file can be read.
    pub read: bool,
    /// Data can be written.
    pub write: bool,
}

/// Watches file descriptors on a device's behalf; the event loop behind it calls [`Device::event`],
/// level-triggered. Hang-ups and errors are reported as readable and writable.
pub trait Watcher {
    /// Watches `fd` for `interest` under `token`, or changes what is watched of it.
    ///
    /// # Errors
    /// `epoll_ctl` failed.
    fn watch(&self, fd: RawFd, token: u64, interest: Readiness) -> std::io::Result<()>;
    /// Stops watching `fd`. Call it before closing the descriptor.
    ///
    /// # Errors
    /// `epoll_ctl` failed.
    fn unwatch(&self, fd: RawFd) -> std::io::Result<()>;
}

/// What a device is asked for when the machine that it belongs to is saved, or goes on from a snapshot.
#[derive(Debug)]
pub enum SnapshotStep<'a> {
    /// No vCPU runs: append what it keeps outside of guest memory. The device stays in use.
    Save(&'a mut Vec<u8>),
    /// It has just been activated in place of a device that saved this.
    Restore(&'a [u8]),
}

/// A virtio device without its transport.
///
/// Between calls a device holds no descriptor chain: what it took off a queue is used, or back in its place. So the
/// positions of its queues can be read from guest memory when the machine is saved.
///
/// Every method is called from one thread at a time (the transport holds the device's lock). Guest input
/// is hostile: a method never panics and never touches memory outside of the guest, whatever the queues hold.
pub trait Device: Send {
    /// The virtio device id (virtio 1.2, section 5).
    fn id(&self) -> u32;

    /// The feature bits offered, `VIRTIO_F_VERSION_1` among them.
    fn features(&self) -> u64;

    /// The largest size of each queue; its length is the number of queues.
    fn queue_sizes(&self) -> &[u16];

    /// Reads the configuration space at `offset`. What lies past its end reads as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Takes the device into use: the driver has set `DRIVER_OK`.
    ///
    /// # Errors
    /// [`DeviceError::State`] if it is active already or the queues are not as many as it has.
    fn activate(
        &mut self,
        resources: Resources,
        watcher: Arc<dyn Watcher + Send + Sync>,
    ) -> Result<(), DeviceError>;

    /// The driver has kicked queue `index`.
    ///
    /// # Errors
    /// See [`DeviceError`].
    fn kick(&mut self, index: usize) -> Result<(), DeviceError>;

    /// A file descriptor watched under `token` is ready. Devices without descriptors never see this.
    ///
    /// # Errors
    /// See [`DeviceError`].
    fn event(&mut self, token: u64, readiness: Readiness) -> Result<(), DeviceError> {
        let _ = (token, readiness);
        Ok(())
    }

    /// Takes part in a snapshot. Devices that keep nothing between calls have nothing to do.
    ///
    /// # Errors
    /// [`DeviceError::Snapshot`]: what the guest has of it cannot be saved, or the device does not take what was saved.
    fn snapshot(&mut self, step: SnapshotStep<'_>) -> Result<(), DeviceError> {
        let _ = step;
        Ok(())
    }

    /// Ends the device's use and gives back what [`Device::activate`] lent; `None` if it was not active.
    /// Every descriptor is unwatched, every connection closed.
    fn reset(&mut self) -> Option<Resources>;
}
