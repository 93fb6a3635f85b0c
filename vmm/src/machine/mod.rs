//! Memory, CPUs, interrupts and devices put together: the [`Machine`].
//!
//! A machine goes through these states, and no others:
//!
//! ```text
//! Configured --start--> Running <--pause / resume--> Paused
//!      \___________________ \________ stop, guest ______/----> Stopped
//! ```
//!
//! In `Configured`, devices are connected ([`Machine::allocate_slot`], [`Machine::connect`]), then
//! [`Machine::spawn`] loads the kernel and makes the vCPU threads, each confined before it waits for the
//! first command. [`Machine::start`] lets them run.

pub mod bus;
pub mod devices;
pub mod memory;
pub mod worker;

mod error;
mod slots;

use std::fs::File;
use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::device::GuestMemory;
use crate::jail::ThreadKind;
use bus::BusDevice;

pub use error::MachineError;
pub use slots::MmioSlot;

/// What a machine is made from. Every file is open already: nothing is opened by name.
#[derive(Debug)]
pub struct MachineConfig {
    /// `/dev/kvm`, open for reading and writing.
    pub kvm: File,
    /// A memfd of `memory_bytes`.
    pub memory: File,
    /// Guest RAM in bytes: whole pages, at least [`memory::MIN_MEMORY_BYTES`].
    pub memory_bytes: u64,
    /// 1 to 32.
    pub vcpus: u32,
    /// An ELF vmlinux for x86-64.
    pub kernel: File,
    /// An uncompressed cpio archive.
    pub initrd: Option<File>,
    /// Kernel command line, appended to what the machine itself adds.
    pub cmdline: String,
    /// Where the serial console's output goes; `None`: the guest has no serial port. Output that cannot be
    /// written at once is lost if the file is non-blocking, and holds up the guest if it is not.
    pub console: Option<File>,
}

/// Called at the start of each vCPU's thread, before its first `KVM_RUN`: the jail's filter for that thread.
pub type Confine = Arc<dyn Fn(ThreadKind) -> io::Result<()> + Send + Sync>;

/// Where a machine is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Made; devices can be connected.
    Configured,
    /// The guest runs.
    Running,
    /// No vCPU executes guest code, every exit is completed: state can be read.
    Paused,
    /// The end. The threads are gone or about to go.
    Stopped,
}

/// Why a machine stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// The guest reset or powered off the machine, or triple-faulted; says which.
    Guest(&'static str),
    /// [`Machine::stop`] was called.
    Requested,
    /// KVM or a vCPU's thread gave up, and why.
    Failure(String),
}

/// A virtual machine.
pub struct Machine {
    memory: GuestMemory,
    stopped: EventFd,
}

impl Machine {
    /// Makes the VM: memory, interrupt controllers, vCPUs. No thread yet, and no guest code loaded.
    ///
    /// # Errors
    /// A configuration that cannot be, or KVM refuses: see [`MachineError`].
    pub fn new(config: MachineConfig) -> Result<Self, MachineError> {
        let _ = config;
        Err(MachineError::NotYet)
    }

    /// The guest's RAM.
    pub fn memory(&self) -> GuestMemory {
        self.memory.clone()
    }

    /// Reserves a register page and an interrupt line for a virtio-mmio device.
    ///
    /// # Errors
    /// No slot is left (there are 19), or the machine is past `Configured`.
    pub fn allocate_slot(&mut self) -> Result<MmioSlot, MachineError> {
        Err(MachineError::NotYet)
    }

    /// Puts a virtio-mmio device into its slot: `device` answers the register page, a write to `irq` raises the
    /// slot's interrupt line, and a driver's write of `n` to QueueNotify (offset 0x50) signals
    /// `queue_notify[n]` without leaving KVM. The device is announced on the kernel's command line.
    ///
    /// # Errors
    /// KVM refuses a registration, or the machine is past `Configured`.
    pub fn connect(
        &mut self,
        slot: MmioSlot,
        device: Arc<dyn BusDevice>,
        irq: &EventFd,
        queue_notify: &[EventFd],
    ) -> Result<(), MachineError> {
        let _ = (slot, device, irq, queue_notify);
        Err(MachineError::NotYet)
    }

    /// Loads the kernel, sets up the vCPUs and makes their threads; each runs `confine` and then waits. From
    /// here on no device can be connected. Returns when every thread is confined.
    ///
    /// # Errors
    /// A kernel, initrd or command line that cannot be loaded; KVM; a thread that could not be made or confined.
    pub fn spawn(&mut self, confine: Confine) -> Result<(), MachineError> {
        let _ = confine;
        Err(MachineError::NotYet)
    }

    /// Lets the guest run. Legal once, after [`Machine::spawn`].
    ///
    /// # Errors
    /// [`MachineError::State`].
    pub fn start(&mut self) -> Result<(), MachineError> {
        Err(MachineError::NotYet)
    }

    /// Stops every vCPU where it can be continued. Returns when all have stopped executing guest code.
    ///
    /// # Errors
    /// [`MachineError::State`] unless running; a vCPU that does not answer.
    pub fn pause(&mut self) -> Result<(), MachineError> {
        Err(MachineError::NotYet)
    }

    /// Continues a paused guest.
    ///
    /// # Errors
    /// [`MachineError::State`] unless paused.
    pub fn resume(&mut self) -> Result<(), MachineError> {
        Err(MachineError::NotYet)
    }

    /// Ends the machine whatever its state, and waits for its threads. Idempotent. The stop reason is
    /// [`StopReason::Requested`] unless the machine had stopped before.
    pub fn stop(&mut self) {}

    /// Where the machine is. A machine that the guest or a failure ended is `Stopped` from that moment on.
    pub fn state(&self) -> State {
        State::Stopped
    }

    /// Becomes readable when the machine has stopped, for whatever reason.
    pub fn stopped_event(&self) -> &EventFd {
        &self.stopped
    }

    /// Why the machine stopped; `None` while it has not.
    pub fn stop_reason(&self) -> Option<StopReason> {
        None
    }

    /// VM exits by reason, summed over the vCPUs, under the names of `vmm.proto`.
    pub fn exits(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}
