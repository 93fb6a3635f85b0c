//! virtio over memory-mapped registers (virtio 1.2, section 4.2; version 2, no legacy interface).
//!
//! A vCPU thread reads and writes the registers, a worker thread runs the device. Two locks keep them apart:
//! the registers' is held for moments only, so that no vCPU waits for a device's work while it reads a
//! register; the device's is held while the device works, is activated or reset. Whoever needs both takes the
//! registers' first.

mod registers;
mod state;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_queue::Queue;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Transport, guarded, lock};
use crate::device::{Device, DeviceError, GuestMemory, Interrupt, Readiness, Resources, Watcher};
use crate::machine::bus::BusDevice;

pub use registers::{QueueState, TransportState};
use registers::{Register, StatusChange};
pub use state::Frozen;

/// Bytes of guest-physical address space that a device answers in.
pub const WINDOW: u64 = 0x1000;

/// Offset of `QueueNotify` in the window: where an ioeventfd for queue `n` matches a 4-byte write of `n`.
pub const QUEUE_NOTIFY: u64 = Register::QueueNotify as u64;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"CELA");
const CONFIG: u64 = virtio_bindings::virtio_mmio::VIRTIO_MMIO_CONFIG as u64;
const STATUS_NEEDS_RESET: u32 = virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;

/// How many failures of a device are logged: a guest can make one as often as it likes.
const LOGGED_FAILURES: u32 = 8;

/// Interrupts a guest's driver: the status bits that it reads, and an irqfd.
pub struct MmioInterrupt {
    status: AtomicU32,
    generation: AtomicU32,
    irq: EventFd,
}

impl MmioInterrupt {
    fn raise(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::SeqCst);
        // It fails only when the counter is about to overflow: an interrupt is pending then.
        let _ = self.irq.write(1);
    }
}

impl Interrupt for MmioInterrupt {
    fn queue(&self, _index: usize) {
        self.raise(virtio_bindings::virtio_mmio::VIRTIO_MMIO_INT_VRING);
    }

    fn config(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.raise(virtio_bindings::virtio_mmio::VIRTIO_MMIO_INT_CONFIG);
    }
}

/// A device behind virtio-mmio registers.
pub struct MmioTransport {
    name: &'static str,
    id: u32,
    features: u64,
    memory: GuestMemory,
    watcher: Arc<dyn Watcher + Send + Sync>,
    interrupt: Arc<MmioInterrupt>,
    kicks: Vec<EventFd>,
    registers: Mutex<TransportState>,
    slot: Mutex<Slot>,
    // Changed under the lock of `slot` only; read without, so that reading the status never waits.
    failed: AtomicBool,
}

struct Slot {
    device: Box<dyn Device>,
    active: bool,
    failures: u32,
}

impl MmioTransport {
    /// Puts `device` behind registers. `name` is what log lines call it; `watcher` is where it will watch
    /// its file descriptors.
    ///
    /// # Errors
    /// No more event file descriptors.
    pub fn new(
        name: &'static str,
        device: Box<dyn Device>,
        memory: GuestMemory,
        watcher: Arc<dyn Watcher + Send + Sync>,
    ) -> std::io::Result<Arc<Self>> {
        let sizes = device.queue_sizes();
        let kicks = sizes
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK))
            .collect::<Result<_, _>>()?;
        let interrupt = MmioInterrupt {
            status: AtomicU32::new(0),
            generation: AtomicU32::new(0),
            irq: EventFd::new(EFD_NONBLOCK)?,
        };
        Ok(Arc::new(Self {
            name,
            id: device.id(),
            features: device.features(),
            memory,
            watcher,
            interrupt: Arc::new(interrupt),
            kicks,
            registers: Mutex::new(TransportState::new(sizes)),
            slot: Mutex::new(Slot {
                device,
                active: false,
                failures: 0,
            }),
            failed: AtomicBool::new(false),
        }))
    }

    /// What the driver kicks, one for each queue: for ioeventfds at [`QUEUE_NOTIFY`] and for the worker.
    pub fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    /// What interrupts the guest: for an irqfd.
    pub fn irq(&self) -> &EventFd {
        &self.interrupt.irq
    }

    /// What log lines call the device.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Hands a kick of queue `index` to the device, on the worker's thread. A device that is not in use or has
    /// failed is left alone.
    pub fn kick(&self, index: usize) {
        self.run("kicked", |device| device.kick(index));
    }

    fn run(&self, doing: &str, call: impl FnOnce(&mut dyn Device) -> Result<(), DeviceError>) {
        let mut slot = lock(&self.slot);
        if !slot.active || self.failed.load(Ordering::SeqCst) {
            return;
        }
        if let Err(failure) = guarded(|| call(slot.device.as_mut())) {
            self.fail(&mut slot, doing, &failure);
        }
    }

    /// The device is of no more use until the driver resets it (virtio 1.2, section 2.1.2).
    fn fail(&self, slot: &mut Slot, doing: &str, failure: &str) {
        self.failed.store(true, Ordering::SeqCst);
        self.interrupt.config();
        slot.failures = slot.failures.saturating_add(1);
        if slot.failures <= LOGGED_FAILURES {
            eprintln!("cella-vmm: device {} failed {doing}: {failure}", self.name);
        }
    }

    fn activate(&self, registers: &TransportState) {
        let mut slot = lock(&self.slot);
        let outcome = registers
            .build_queues(&*self.memory.memory())
            .ok_or_else(|| "a queue is not set up".to_owned())
            .and_then(|queues| {
                let resources = self.resources(registers, queues);
                let watcher = self.watcher.clone();
                guarded(|| slot.device.activate(resources, watcher))
            });
        match outcome {
            Ok(()) => slot.active = true,
            Err(failure) => self.fail(&mut slot, "on activation", &failure),
        }
    }

    fn resources(&self, registers: &TransportState, queues: Vec<Queue>) -> Resources {
        Resources {
            memory: self.memory.clone(),
            queues,
            interrupt: self.interrupt.clone(),
            features: registers.driver_features,
        }
    }

    fn reset(&self, registers: &mut TransportState) {
        let mut slot = lock(&self.slot);
        // Also when it is not active: a failed activation may have left something behind.
        if let Err(failure) = guarded(|| {
            drop(slot.device.reset());
            Ok(())
        }) {
            eprintln!("cella-vmm: device {} failed on reset: {failure}", self.name);
        }
        slot.active = false;
        self.failed.store(false, Ordering::SeqCst);
        self.interrupt.status.store(0, Ordering::SeqCst);
        registers.reset();
    }

    fn read_register(&self, register: Register) -> u32 {
        let interrupt = &self.interrupt;
        match register {
            Register::MagicValue => MAGIC,
            Register::Version => VERSION,
            Register::DeviceId => self.id,
            Register::VendorId => VENDOR,
            // Read for every interrupt: without the registers' lock.
            Register::InterruptStatus => interrupt.status.load(Ordering::SeqCst),
            Register::ConfigGeneration => interrupt.generation.load(Ordering::SeqCst),
            Register::Status => {
                let needs_reset = match self.failed.load(Ordering::SeqCst) {
                    true => STATUS_NEEDS_RESET,
                    false => 0,
                };
                lock(&self.registers).status | needs_reset
            }
            other => lock(&self.registers).read(other, self.features),
        }
    }

    fn write_register(&self, register: Register, value: u32) {
        match register {
            Register::InterruptAck => {
                self.interrupt.status.fetch_and(!value, Ordering::SeqCst);
            }
            Register::QueueNotify => {
                // Where no ioeventfd took it. The device runs on its worker, never on a vCPU's thread.
                if let Some(kick) = usize::try_from(value)
                    .ok()
                    .and_then(|at| self.kicks.get(at))
                {
                    let _ = kick.write(1);
                }
            }
            Register::Status => {
                let mut registers = lock(&self.registers);
                match registers.change_status(value, self.features) {
                    StatusChange::Reset => self.reset(&mut registers),
                    StatusChange::Activate => self.activate(&registers),
                    StatusChange::None => {}
                }
            }
            other => {
                let memory = self.memory.memory();
                lock(&self.registers).write(other, value, &*memory);
            }
        }
    }
}

impl Transport for MmioTransport {
    fn start(&self, watcher: Arc<dyn Watcher + Send + Sync>) -> io::Result<()> {
        let readable = Readiness {
            read: true,
            write: false,
        };
        (0..)
            .zip(&self.kicks)
            .try_for_each(|(index, kick)| watcher.watch(kick.as_raw_fd(), index, readable))
    }

    fn ready(&self, token: u64) {
        let index = usize::try_from(token).unwrap_or(usize::MAX);
        if let Some(kick) = self.kicks.get(index) {
            // Emptied first, so that a kick while the device runs comes back.
            let _ = kick.read();
            self.kick(index);
        }
    }

    fn event(&self, token: u64, readiness: Readiness) {
        self.run("handling an event", |device| device.event(token, readiness));
    }

    fn shut_down(&self) {
        let mut registers = lock(&self.registers);
        self.reset(&mut registers);
    }
}

impl BusDevice for MmioTransport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(CONFIG) {
            let slot = lock(&self.slot);
            let _ = guarded(|| {
                slot.device.read_config(offset, data);
                Ok(())
            });
        } else if let (Some(register), 4) = (Register::at(offset), data.len()) {
            data.copy_from_slice(&self.read_register(register).to_le_bytes());
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        // No device of ours has a configuration space that its driver writes.
        if let (Some(register), Ok(bytes)) = (Register::at(offset), <[u8; 4]>::try_from(data)) {
            self.write_register(register, u32::from_le_bytes(bytes));
        }
    }
}

/// The feature bit without which a device is a legacy one.
pub(crate) const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
