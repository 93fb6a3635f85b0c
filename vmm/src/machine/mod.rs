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
//! first command. [`Machine::start`] lets them run. [`Machine::restore`] makes a machine that goes on where
//! another was [saved](Machine::save); `spawn` then gives it that one's state instead of a kernel.

pub mod bus;
pub mod companion;
pub mod devices;
pub mod memory;
pub mod worker;

mod console;
mod error;
mod saved;
mod slots;
mod vm;

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use cella_proto::snapshot::MachineState;
use kvm_ioctls::{Cap, IoEventAddress, VcpuFd, VmFd};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;

use crate::boot::{self, BootImage, cmdline, layout};
use crate::device::GuestMemory;
use crate::jail::ThreadKind;
use crate::vcpu::cpuid::HostCpuid;
use crate::vcpu::emulate::Emulator;
use crate::vcpu::exit::Buses;
use crate::vcpu::thread::{End, OnEnd, Parts, VcpuThread};
use crate::vcpu::{VcpuError, kick, setup};
use bus::BusDevice;
use console::Console;
use slots::{Placeholder, Slots};

pub use error::MachineError;
pub use saved::RestoreConfig;
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
    /// The CPUs that the guest is told of: at least `vcpus`, at most 32. A machine restored from this one may have so many.
    pub possible_vcpus: u32,
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
    // Before the VM's memory goes, its vCPUs' threads have ended: see Drop.
    vcpus: Vec<VcpuThread>,
    vm: VmFd,
    host: HostCpuid,
    memory: GuestMemory,
    buses: Buses,
    slots: Slots,
    spares: u32,
    facts: cmdline::Facts,
    // Of its memory, those beyond what it began with.
    added_bytes: u64,
    // vCPUs of this machine, and those that its guest knows of.
    count: u32,
    possible: u32,
    origin: Option<Origin>,
    // Of KVM's floating point state on this host; asked for while the process may.
    xsave_bytes: usize,
    state: State,
    end: Arc<Ending>,
}

/// Where the guest's first instruction comes from, until the vCPUs are made.
enum Origin {
    Boot(Image),
    Saved(Box<MachineState>),
}

/// What the guest boots from.
struct Image {
    kernel: File,
    initrd: Option<File>,
    cmdline: String,
}

/// How the machine ended, and who is told.
#[derive(Debug)]
struct Ending {
    reason: Mutex<Option<StopReason>>,
    stopped: EventFd,
}

impl Ending {
    /// The first reason counts.
    fn set(&self, reason: StopReason) {
        let mut known = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        if known.is_none() {
            *known = Some(reason);
            // The counter cannot overflow by one.
            let _ = self.stopped.write(1);
        }
    }

    fn get(&self) -> Option<StopReason> {
        let known = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        known.clone()
    }
}

impl Machine {
    /// Makes the VM: memory and interrupt controllers. No vCPU yet, and no guest code loaded.
    ///
    /// # Errors
    /// A configuration that cannot be, or KVM refuses: see [`MachineError`].
    pub fn new(config: MachineConfig) -> Result<Self, MachineError> {
        check_vcpus(config.vcpus, config.possible_vcpus)?;
        let vcpus = (config.vcpus, config.possible_vcpus);
        let memory = memory::map(config.memory, config.memory_bytes)?;
        let origin = Origin::Boot(Image {
            kernel: config.kernel,
            initrd: config.initrd,
            cmdline: config.cmdline,
        });
        Self::make(config.kvm, memory, vcpus, config.console, origin)
    }

    fn make(
        kvm_device: File,
        memory: GuestMemory,
        (count, possible): (u32, u32),
        console: Option<File>,
        origin: Origin,
    ) -> Result<Self, MachineError> {
        let event = || {
            EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
                .map_err(host("making an event descriptor"))
        };
        let (vm, host_cpuid) = vm::create(kvm_device, &memory)?;
        let xsave_bytes = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or_default();
        let mut buses = Buses::default();
        let facts = cmdline::Facts {
            emulated: host_cpuid.emulated(),
            console: console.is_some(),
            max_cpus: (count < possible).then_some(count),
            ..cmdline::Facts::default()
        };
        if let Some(output) = console {
            let line = event()?;
            vm.register_irqfd(&line, layout::SERIAL_GSI)
                .map_err(kvm("KVM_IRQFD of the console"))?;
            let console = Arc::new(Console::new(line, output));
            Arc::make_mut(&mut buses.io).insert(layout::SERIAL_PORT, Console::PORTS, console)?;
        }
        Ok(Self {
            vcpus: Vec::new(),
            vm,
            host: host_cpuid,
            memory,
            buses,
            slots: Slots::default(),
            spares: 0,
            facts,
            added_bytes: 0,
            count,
            possible,
            origin: Some(origin),
            xsave_bytes,
            state: State::Configured,
            end: Arc::new(Ending {
                reason: Mutex::default(),
                stopped: event()?,
            }),
        })
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
        self.unspawned("take a device")?;
        self.slots.take().ok_or(MachineError::Slots(Slots::COUNT))
    }

    /// Announces `count` slots more to the guest, which finds nothing there: in a machine restored from a snapshot of this
    /// one, devices can be in them. After the last device.
    ///
    /// # Errors
    /// No slot is left, or the machine is past `Configured`.
    pub fn add_spares(&mut self, count: u32) -> Result<(), MachineError> {
        for _ in 0..count {
            let slot = self.allocate_slot()?;
            let placeholder = Arc::new(Placeholder);
            let mmio = Arc::make_mut(&mut self.buses.mmio);
            mmio.insert(slot.base, layout::MMIO_SLOT_BYTES, placeholder)?;
            self.facts.devices.push((slot.base, slot.gsi));
            self.spares += 1;
        }
        Ok(())
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
        /// Offset of the QueueNotify register (virtio 1.2, section 4.2.2).
        const QUEUE_NOTIFY: u64 = 0x50;
        self.unspawned("take a device")?;
        self.vm
            .register_irqfd(irq, slot.gsi)
            .map_err(kvm("KVM_IRQFD of a device"))?;
        let address = IoEventAddress::Mmio(slot.base + QUEUE_NOTIFY);
        for (queue, event) in (0_u32..).zip(queue_notify) {
            self.vm
                .register_ioevent(event, &address, queue)
                .map_err(kvm("KVM_IOEVENTFD of a queue"))?;
        }
        Arc::make_mut(&mut self.buses.mmio).insert(slot.base, layout::MMIO_SLOT_BYTES, device)?;
        self.facts.devices.push((slot.base, slot.gsi));
        Ok(())
    }

    /// Loads the kernel or the saved state, makes the vCPUs and their threads; each runs `confine` and then waits. From
    /// here on no device can be connected. Returns when every thread is confined.
    ///
    /// # Errors
    /// A kernel, initrd or command line that cannot be loaded, a saved state that is not of such a machine; KVM; a thread
    /// that could not be made or confined.
    pub fn spawn(&mut self, confine: Confine) -> Result<(), MachineError> {
        self.unspawned("be loaded")?;
        let Some(origin) = self.origin.take() else {
            return Err(self.wrong_state("be loaded a second time"));
        };
        kick::install_handler().map_err(|error| MachineError::Host {
            action: "installing the handler of vCPU kicks",
            source: error.into(),
        })?;
        let mut vcpus = Vec::new();
        for index in 0..self.count {
            vcpus.push(setup::create(&self.vm, &self.host, index, self.possible)?);
        }
        self.facts.tsc_khz = vcpus.first().and_then(|vcpu| vcpu.get_tsc_khz().ok());
        match origin {
            Origin::Boot(image) => self.load(image, &vcpus)?,
            Origin::Saved(state) => self.take_back(&state, &vcpus)?,
        }
        for (index, vcpu) in (0..).zip(vcpus) {
            let emulator = self
                .host
                .emulated()
                .then(|| Emulator::new(&self.vm, self.memory.clone()))
                .transpose()
                .map_err(|source| VcpuError::Emulator { index, source })?;
            let parts = Parts {
                index,
                vcpu,
                buses: self.buses.clone(),
                emulator,
                on_end: self.on_end(),
            };
            self.vcpus.push(VcpuThread::spawn(parts, confine.clone())?);
        }
        Ok(())
    }

    fn load(&self, image: Image, vcpus: &[VcpuFd]) -> Result<(), MachineError> {
        let line = cmdline::build(&self.facts, &image.cmdline)?;
        let image = BootImage {
            kernel: image.kernel,
            initrd: image.initrd,
            cmdline: &line,
            vcpus: self.possible,
            seed: seed()?,
        };
        let entry = boot::load(&self.memory.memory(), image)?;
        match vcpus.first() {
            Some(first) => Ok(setup::set_entry(first, entry)?),
            None => Ok(()),
        }
    }

    /// Lets the guest run. Legal once, after [`Machine::spawn`].
    ///
    /// # Errors
    /// [`MachineError::State`].
    pub fn start(&mut self) -> Result<(), MachineError> {
        if self.state() != State::Configured || self.vcpus.is_empty() {
            return Err(self.wrong_state("start"));
        }
        self.run();
        Ok(())
    }

    /// Stops every vCPU where it can be continued. Returns when all have stopped executing guest code.
    ///
    /// # Errors
    /// [`MachineError::State`] unless running, or if the guest ends the machine meanwhile; a vCPU that does not answer,
    /// which ends the machine too.
    pub fn pause(&mut self) -> Result<(), MachineError> {
        if self.state() != State::Running {
            return Err(self.wrong_state("pause"));
        }
        self.vcpus.iter().for_each(VcpuThread::pause);
        for vcpu in &self.vcpus {
            if let Err(deaf) = vcpu.wait_paused() {
                // Some have paused and one has not: from there no way leads back.
                self.end.set(StopReason::Failure(deaf.to_string()));
                return Err(deaf.into());
            }
        }
        if self.state() == State::Stopped {
            return Err(self.wrong_state("pause"));
        }
        self.state = State::Paused;
        Ok(())
    }

    /// Continues a paused guest.
    ///
    /// # Errors
    /// [`MachineError::State`] unless paused.
    pub fn resume(&mut self) -> Result<(), MachineError> {
        if self.state() != State::Paused {
            return Err(self.wrong_state("resume"));
        }
        self.run();
        Ok(())
    }

    /// Ends the machine whatever its state, and waits for its threads. Idempotent. The stop reason is
    /// [`StopReason::Requested`] unless the machine had stopped before.
    pub fn stop(&mut self) {
        self.end.set(StopReason::Requested);
        self.vcpus.iter().for_each(VcpuThread::stop);
        self.vcpus.iter_mut().for_each(VcpuThread::join);
    }

    /// Where the machine is. A machine that the guest or a failure ended is `Stopped` from that moment on.
    pub fn state(&self) -> State {
        match self.end.get() {
            Some(_) => State::Stopped,
            None => self.state,
        }
    }

    /// Becomes readable when the machine has stopped, for whatever reason.
    pub fn stopped_event(&self) -> &EventFd {
        &self.end.stopped
    }

    /// Why the machine stopped; `None` while it has not.
    pub fn stop_reason(&self) -> Option<StopReason> {
        self.end.get()
    }

    /// VM exits by reason, summed over the vCPUs, under the names of `vmm.proto`.
    pub fn exits(&self) -> Vec<(&'static str, u64)> {
        let mut sums: Vec<(&'static str, u64)> = Vec::new();
        for (name, count) in self.vcpus.iter().flat_map(|vcpu| vcpu.stats().snapshot()) {
            match sums.iter_mut().find(|(known, _)| *known == name) {
                Some((_, sum)) => *sum = sum.saturating_add(count),
                None => sums.push((name, count)),
            }
        }
        sums
    }

    fn run(&mut self) {
        self.state = State::Running;
        self.vcpus.iter().for_each(VcpuThread::run);
    }

    fn on_end(&self) -> OnEnd {
        let ending = Arc::clone(&self.end);
        Arc::new(move |end| {
            ending.set(match end {
                End::Guest(how) => StopReason::Guest(how),
                End::Failure(why) => StopReason::Failure(why),
                End::Commanded => StopReason::Requested,
            });
        })
    }

    fn unspawned(&self, action: &'static str) -> Result<(), MachineError> {
        match self.state() == State::Configured && self.vcpus.is_empty() {
            true => Ok(()),
            false => Err(self.wrong_state(action)),
        }
    }

    fn wrong_state(&self, action: &'static str) -> MachineError {
        MachineError::State {
            action,
            state: self.state(),
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop();
    }
}

fn check_vcpus(count: u32, possible: u32) -> Result<(), MachineError> {
    if !(1..=layout::MAX_VCPUS).contains(&count) {
        return Err(MachineError::Vcpus(count));
    }
    match (count..=layout::MAX_VCPUS).contains(&possible) {
        true => Ok(()),
        false => Err(MachineError::PossibleVcpus { count, possible }),
    }
}

fn kvm(action: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> MachineError {
    move |source| MachineError::Kvm { action, source }
}

fn host(action: &'static str) -> impl FnOnce(io::Error) -> MachineError {
    move |source| MachineError::Host { action, source }
}

/// Fresh randomness for the guest.
fn seed() -> Result<[u8; layout::SEED_BYTES], MachineError> {
    let mut seed = [0; layout::SEED_BYTES];
    rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty())
        .map_err(|errno| host("drawing the guest's random seed")(errno.into()))?;
    Ok(seed)
}
