//! A machine with a guest of a few instructions, a device that records, and the tables that such a guest needs.

use std::fs::File;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cella_vmm::machine::bus::BusDevice;
use cella_vmm::machine::{Confine, Machine, MachineConfig, StopReason};
use cella_vmm::vcpu::cpuid::HostCpuid;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::kernel::elf;

pub const MEMORY: u64 = 32 << 20;
/// Memory that no guest here uses otherwise.
pub const DATA: u64 = 0x180_0000;
/// What a test waits for anything.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Code of exception and interrupt handlers: a page for each vector.
const HANDLERS: u64 = 0x70_0000;
const IDT: u64 = 0x60_0000;
/// What `lidt` reads: the guests here name it by number.
const IDT_POINTER: u64 = 0x60_1000;
/// Second entry of the boot page tables' PDPT and on: see `map_devices`.
const PDPT: u64 = 0xa000;
const DEVICE_DIRECTORY: u64 = 0x50_0000;

/// `/dev/kvm`, or nothing where the machine lacks it.
pub fn kvm() -> Option<File> {
    let device = File::options().read(true).write(true).open("/dev/kvm");
    if device.is_err() {
        println!("SKIPPED: no /dev/kvm");
    }
    device.ok()
}

/// KVM here completes some instructions with our help only.
pub fn emulated() -> bool {
    let emulated = HostCpuid::read(&kvm_ioctls::Kvm::new().unwrap())
        .unwrap()
        .emulated();
    if !emulated {
        println!("SKIPPED: this host's KVM has hardware and needs no help with instructions");
    }
    emulated
}

/// One machine at a time: the tests look at times and at threads.
pub fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

pub fn confine() -> Confine {
    Arc::new(|_| Ok(()))
}

pub fn config(kvm: File, kernel: File, vcpus: u32) -> MachineConfig {
    let memory = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let memory = File::from(memory);
    memory.set_len(MEMORY).unwrap();
    MachineConfig {
        kvm,
        memory,
        memory_bytes: MEMORY,
        vcpus,
        possible_vcpus: vcpus,
        kernel,
        initrd: None,
        cmdline: String::new(),
        console: None,
    }
}

/// Reads as its offsets, hands on what is written.
pub struct Recorder(Mutex<Sender<(u64, Vec<u8>)>>);

impl BusDevice for Recorder {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = at as u8;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let _ = self.0.lock().unwrap().send((offset, data.to_vec()));
    }
}

/// A machine, its guest loaded, the recorder in its first slot at 0xd000_0000 on line 5.
pub struct Bench {
    pub machine: Machine,
    pub irq: EventFd,
    pub queues: [EventFd; 2],
    pub console: File,
    writes: Receiver<(u64, Vec<u8>)>,
}

impl Bench {
    pub fn new(kvm: File, code: &[u8], vcpus: u32) -> Self {
        let console = tempfile::tempfile().unwrap();
        let mut config = config(kvm, elf(code, 0x10_0000), vcpus);
        config.console = Some(console.try_clone().unwrap());
        let mut machine = Machine::new(config).unwrap();
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let (irq, queues) = (event(), [event(), event()]);
        let (sender, writes) = channel();
        let slot = machine.allocate_slot().unwrap();
        assert_eq!((slot.base(), slot.gsi()), (0xd000_0000, 5));
        let recorder = Arc::new(Recorder(Mutex::new(sender)));
        machine.connect(slot, recorder, &irq, &queues).unwrap();
        machine.spawn(confine()).unwrap();
        let bench = Self {
            machine,
            irq,
            queues,
            console,
            writes,
        };
        bench.map_devices();
        bench
    }

    pub fn write(&self, address: u64, bytes: &[u8]) {
        let memory = self.machine.memory();
        memory
            .memory()
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
    }

    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let memory = self.machine.memory();
        memory
            .memory()
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    pub fn read_u64(&self, address: u64) -> u64 {
        u64::from_le_bytes(self.read(address, 8).try_into().unwrap())
    }

    /// The boot page tables reach one GiB: adds the device window and the APICs.
    fn map_devices(&self) {
        const PRESENT_WRITABLE: u64 = 3;
        const LARGE: u64 = 0x80;
        let directory = DEVICE_DIRECTORY | PRESENT_WRITABLE;
        self.write(PDPT + 3 * 8, &directory.to_le_bytes());
        for page in [0xd000_0000_u64, 0xfec0_0000, 0xfee0_0000] {
            let slot = DEVICE_DIRECTORY + ((page >> 21) & 0x1ff) * 8;
            let entry = (page & !0x1f_ffff) | LARGE | PRESENT_WRITABLE;
            self.write(slot, &entry.to_le_bytes());
        }
    }

    /// Puts `code` behind `vector`. The guest loads the table with `lidt [0x601000]`.
    pub fn handle(&self, vector: u64, code: &[u8]) {
        let at = HANDLERS + vector * 0x1000;
        self.write(at, code);
        // A present interrupt gate in the boot code segment.
        let gate = (at & 0xffff) | 0x10 << 16 | 0x8e00 << 32 | (at >> 16 & 0xffff) << 48;
        self.write(IDT + vector * 16, &gate.to_le_bytes());
        let pointer = [&0xfff_u16.to_le_bytes()[..], &IDT.to_le_bytes()].concat();
        self.write(IDT_POINTER, &pointer);
    }

    pub fn start(&mut self) {
        self.machine.start().unwrap();
    }

    /// The next write to the recorder: offset, width and value.
    #[track_caller]
    pub fn next(&self) -> (u64, usize, u64) {
        match self.writes.recv_timeout(PATIENCE) {
            Ok((offset, data)) => {
                let mut value = [0; 8];
                value[..data.len()].copy_from_slice(&data);
                (offset, data.len(), u64::from_le_bytes(value))
            }
            Err(error) => panic!("{error}: {:?}", self.machine.stop_reason()),
        }
    }

    /// Whether nothing was written that [`Self::next`] has not returned.
    pub fn is_quiet(&self) -> bool {
        self.writes.try_recv().is_err()
    }

    /// Waits for the end that the guest makes.
    #[track_caller]
    pub fn stopped(&self) -> StopReason {
        until("the guest ends the machine", || {
            self.machine.stop_reason().is_some()
        });
        assert_eq!(self.machine.stopped_event().read().unwrap(), 1);
        self.machine.stop_reason().unwrap()
    }

    pub fn exits(&self, reason: &str) -> u64 {
        let exits = self.machine.exits();
        exits.iter().find(|(name, _)| *name == reason).unwrap().1
    }
}

/// Waits until `condition` holds.
#[track_caller]
pub fn until(what: &str, condition: impl Fn() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Time that this process's vCPU threads have spent on a processor.
pub fn vcpu_time() -> Duration {
    let mut sum = 0;
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        let task = task.unwrap().path();
        let read = |file| std::fs::read_to_string(task.join(file)).unwrap_or_default();
        if read("comm").starts_with("vcpu") {
            let time = read("schedstat");
            sum += time.split(' ').next().unwrap().parse::<u64>().unwrap();
        }
    }
    Duration::from_nanos(sum)
}
