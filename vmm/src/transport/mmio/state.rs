//! A device with its registers, saved and taken back.

use std::sync::MutexGuard;
use std::sync::atomic::Ordering;

use cella_proto::snapshot::{DeviceState, QueueState as SavedQueue};
use virtio_queue::QueueT;
use vm_memory::GuestAddressSpace;

use super::{MmioTransport, QueueState, Slot, TransportState, guarded, lock};
use crate::device::{Device, DeviceError, SnapshotStep};
use crate::snapshot::SnapshotError;

/// A device that stands still: whatever kicks it or is ready for it waits until this is dropped.
pub struct Frozen<'a> {
    transport: &'a MmioTransport,
    registers: MutexGuard<'a, TransportState>,
    slot: MutexGuard<'a, Slot>,
}

impl Frozen<'_> {
    /// The device's state. Its queues' positions are in guest memory: between calls it holds no chain.
    ///
    /// # Errors
    /// [`SnapshotError::Device`]: it is used in a way that cannot be saved.
    pub fn save(&mut self) -> Result<DeviceState, SnapshotError> {
        let mut own = Vec::new();
        if self.slot.active {
            call(
                self.transport.name,
                self.slot.device.as_mut(),
                SnapshotStep::Save(&mut own),
            )?;
        }
        let registers = &self.registers;
        let interrupt = &self.transport.interrupt;
        Ok(DeviceState {
            id: self.transport.id,
            status: registers.status,
            driver_features: registers.driver_features,
            device_features_select: registers.device_features_select,
            driver_features_select: registers.driver_features_select,
            queue_select: registers.queue_select,
            queues: registers.queues.iter().map(save_queue).collect(),
            interrupt_status: interrupt.status.load(Ordering::SeqCst),
            config_generation: interrupt.generation.load(Ordering::SeqCst),
            active: self.slot.active,
            failed: self.transport.failed.load(Ordering::SeqCst),
            own,
            ..DeviceState::default()
        })
    }
}

impl MmioTransport {
    /// Holds the device still, so that what it saves and what guest memory holds belong together.
    pub fn freeze(&self) -> Frozen<'_> {
        let registers = lock(&self.registers);
        Frozen {
            transport: self,
            registers,
            slot: lock(&self.slot),
        }
    }

    /// Makes a device that was never used the one that was saved. The vCPUs do not run yet; their state and the
    /// interrupt controllers' are restored, so that an interrupt from here reaches them.
    ///
    /// # Errors
    /// The saved device is of another kind or has other queues, or this one does not take its state.
    pub fn restore(&self, saved: &DeviceState) -> Result<(), SnapshotError> {
        let mut registers = lock(&self.registers);
        let mut slot = lock(&self.slot);
        if saved.id != self.id {
            return Err(shape("a device of kind", &saved.id, &self.id));
        }
        let sizes = |queues: &[QueueState]| -> Vec<u32> {
            queues.iter().map(|queue| queue.max_size.into()).collect()
        };
        let saved_sizes: Vec<u32> = saved.queues.iter().map(|queue| queue.max_size).collect();
        let own_sizes = sizes(&registers.queues);
        if saved_sizes != own_sizes {
            let text = |sizes: &[u32]| format!("{sizes:?}");
            return Err(shape("queues of", &text(&saved_sizes), &text(&own_sizes)));
        }
        if saved.driver_features & !self.features != 0 {
            let offered = format!("{:#x}", self.features);
            let accepted = format!("{:#x}", saved.driver_features);
            return Err(shape("device features", &accepted, &offered));
        }
        *registers = TransportState {
            status: saved.status,
            driver_features: saved.driver_features,
            device_features_select: saved.device_features_select,
            driver_features_select: saved.driver_features_select,
            queue_select: saved.queue_select,
            queues: saved.queues.iter().zip(own_sizes).map(load_queue).collect(),
        };
        let interrupt = &self.interrupt;
        interrupt
            .generation
            .store(saved.config_generation, Ordering::SeqCst);
        interrupt
            .status
            .store(saved.interrupt_status, Ordering::SeqCst);
        if saved.active {
            self.take_up(&registers, &mut slot, &saved.own)?;
        }
        self.failed.store(saved.failed, Ordering::SeqCst);
        if saved.interrupt_status != 0 {
            // It may have been on its way: one too many is answered with a look at the status.
            let _ = interrupt.irq.write(1);
        }
        Ok(())
    }

    /// Activates the device with queues that go on where they were.
    fn take_up(
        &self,
        registers: &TransportState,
        slot: &mut Slot,
        own: &[u8],
    ) -> Result<(), SnapshotError> {
        let memory = self.memory.memory();
        let mut queues = registers
            .build_queues(&*memory)
            .ok_or(SnapshotError::Part {
                what: "a queue of a device that is in use",
            })?;
        for queue in &mut queues {
            let position =
                queue
                    .used_idx(&*memory, Ordering::Acquire)
                    .map_err(|_| SnapshotError::Part {
                        what: "the used ring of a queue",
                    })?;
            queue.set_next_avail(position.0);
            queue.set_next_used(position.0);
        }
        let resources = self.resources(registers, queues);
        let watcher = self.watcher.clone();
        let activated = guarded(|| slot.device.activate(resources, watcher));
        if activated.is_err() {
            return Err(SnapshotError::Device {
                name: self.name,
                source: DeviceError::State("it cannot be activated"),
            });
        }
        call(self.name, slot.device.as_mut(), SnapshotStep::Restore(own))?;
        slot.active = true;
        // A kick of the saved machine's may have been on its way.
        for kick in &self.kicks {
            let _ = kick.write(1);
        }
        Ok(())
    }
}

fn call(
    name: &'static str,
    device: &mut dyn Device,
    step: SnapshotStep<'_>,
) -> Result<(), SnapshotError> {
    device
        .snapshot(step)
        .map_err(|source| SnapshotError::Device { name, source })
}

fn shape(what: &'static str, saved: &dyn ToString, wanted: &dyn ToString) -> SnapshotError {
    SnapshotError::Shape {
        what,
        saved: saved.to_string(),
        wanted: wanted.to_string(),
    }
}

fn save_queue(queue: &QueueState) -> SavedQueue {
    SavedQueue {
        max_size: queue.max_size.into(),
        size: queue.size,
        ready: queue.ready,
        descriptors: queue.descriptors,
        available: queue.available,
        used: queue.used,
        ..SavedQueue::default()
    }
}

/// A queue and the largest size that this device has for it.
fn load_queue((saved, max_size): (&SavedQueue, u32)) -> QueueState {
    QueueState {
        // As this device gave it.
        max_size: u16::try_from(max_size).unwrap_or_default(),
        size: saved.size,
        ready: saved.ready,
        descriptors: saved.descriptors,
        available: saved.available,
        used: saved.used,
    }
}
