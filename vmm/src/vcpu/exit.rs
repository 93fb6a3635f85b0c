//! What a KVM exit means: from the exit to an [`Outcome`], apart from the loop that acts on it.

use std::sync::Arc;

use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::VcpuExit;

use super::stats::ExitReason;
use crate::machine::bus::Bus;

/// The address spaces outside of RAM.
#[derive(Clone, Default)]
pub struct Buses {
    /// Guest-physical addresses.
    pub mmio: Arc<Bus>,
    /// I/O ports.
    pub io: Arc<Bus>,
}

/// What the vCPU does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Back into the guest.
    Continue,
    /// KVM has given up on something: `kvm_run` says on what.
    InternalError,
    /// The guest ended the machine, in this way.
    GuestStop(&'static str),
    /// Nothing more can be done, for this reason.
    Failure(String),
}

/// Port of the keyboard controller's commands and status, and the command that pulses its reset line.
const KEYBOARD_COMMAND: u16 = 0x64;
const KEYBOARD_RESET: u8 = 0xfe;

/// Serves one exit.
///
/// A repeated string instruction on a port arrives as one access as wide as all its repetitions: the devices here
/// have no use for such and answer it as a hole.
pub fn handle(exit: VcpuExit<'_>, buses: &Buses) -> (ExitReason, Outcome) {
    match exit {
        VcpuExit::MmioRead(address, data) => {
            buses.mmio.read(address, data);
            (ExitReason::MmioRead, Outcome::Continue)
        }
        VcpuExit::MmioWrite(address, data) => {
            buses.mmio.write(address, data);
            (ExitReason::MmioWrite, Outcome::Continue)
        }
        VcpuExit::IoIn(port, data) => {
            read_port(port, data, &buses.io);
            (ExitReason::IoIn, Outcome::Continue)
        }
        VcpuExit::IoOut(port, data) => (ExitReason::IoOut, write_port(port, data, &buses.io)),
        VcpuExit::InternalError => (ExitReason::Emulate, Outcome::InternalError),
        VcpuExit::Shutdown => (ExitReason::Shutdown, Outcome::GuestStop("triple fault")),
        VcpuExit::SystemEvent(event, _) => (ExitReason::SystemEvent, system_event(event)),
        VcpuExit::Intr => (ExitReason::Interrupted, Outcome::Continue),
        VcpuExit::Hlt => (
            ExitReason::Hlt,
            Outcome::Failure("KVM left at HLT, which the in-kernel APIC should keep".into()),
        ),
        VcpuExit::FailEntry(reason, cpu) => (
            ExitReason::Other,
            Outcome::Failure(format!(
                "entering the guest failed on CPU {cpu}: {reason:#x}"
            )),
        ),
        VcpuExit::MemoryFault { gpa, size, .. } => (
            ExitReason::Other,
            Outcome::Failure(format!("guest memory {gpa:#x}+{size:#x} is not accessible")),
        ),
        other => (
            ExitReason::Other,
            Outcome::Failure(format!("unexpected KVM exit {other:?}")),
        ),
    }
}

fn read_port(port: u16, data: &mut [u8], io: &Bus) {
    if port == KEYBOARD_COMMAND {
        // There is no controller; but a kernel that resets the machine waits for it to be idle.
        data.fill(0);
    } else {
        io.read(u64::from(port), data);
    }
}

fn write_port(port: u16, data: &[u8], io: &Bus) -> Outcome {
    if port == KEYBOARD_COMMAND && data == [KEYBOARD_RESET] {
        return Outcome::GuestStop("reset");
    }
    io.write(u64::from(port), data);
    Outcome::Continue
}

fn system_event(event: u32) -> Outcome {
    match event {
        KVM_SYSTEM_EVENT_SHUTDOWN => Outcome::GuestStop("power off"),
        KVM_SYSTEM_EVENT_RESET => Outcome::GuestStop("reset"),
        KVM_SYSTEM_EVENT_CRASH => Outcome::GuestStop("crash"),
        other => Outcome::Failure(format!("unknown KVM system event {other}")),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::machine::bus::BusDevice;

    /// Reads as 0x5a, remembers what is written.
    #[derive(Default)]
    struct Memo(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Memo {
        fn read(&self, _offset: u64, data: &mut [u8]) {
            data.fill(0x5a);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    fn buses() -> (Buses, Arc<Memo>, Arc<Memo>) {
        let (mmio, io) = (Arc::new(Memo::default()), Arc::new(Memo::default()));
        let mut buses = Buses::default();
        Arc::make_mut(&mut buses.mmio)
            .insert(0xd000_0000, 0x1000, mmio.clone())
            .unwrap();
        Arc::make_mut(&mut buses.io)
            .insert(0x3f8, 8, io.clone())
            .unwrap();
        (buses, mmio, io)
    }

    #[test]
    fn accesses_go_to_their_bus() {
        let (buses, mmio, io) = buses();
        let mut data = [0; 4];
        let done = handle(VcpuExit::MmioRead(0xd000_0010, &mut data), &buses);
        assert_eq!(
            (done, data),
            ((ExitReason::MmioRead, Outcome::Continue), [0x5a; 4])
        );
        handle(VcpuExit::MmioWrite(0xd000_0070, &[1, 2]), &buses);
        assert_eq!(*mmio.0.lock().unwrap(), [(0x70, vec![1, 2])]);
        let mut data = [0];
        handle(VcpuExit::IoIn(0x3fd, &mut data), &buses);
        assert_eq!(data, [0x5a]);
        handle(VcpuExit::IoOut(0x3f8, b"x"), &buses);
        assert_eq!(*io.0.lock().unwrap(), [(0, b"x".to_vec())]);
    }

    #[test]
    fn holes_read_as_ones_and_swallow_writes() {
        let (buses, mmio, io) = buses();
        // PCI configuration, an RTC, an access across a device's end, the last address of all.
        let mut data = [0; 4];
        handle(VcpuExit::IoIn(0xcfc, &mut data), &buses);
        assert_eq!(data, [0xff; 4]);
        for address in [0xd000_0fff, 0xcfff_ffff, u64::MAX] {
            let mut data = [0; 8];
            handle(VcpuExit::MmioRead(address, &mut data), &buses);
            assert_eq!(data, [0xff; 8], "{address:#x}");
            handle(VcpuExit::MmioWrite(address, &data), &buses);
        }
        handle(VcpuExit::IoOut(0xcf8, &[0, 0, 0, 0x80]), &buses);
        handle(VcpuExit::IoOut(0x3f8, &[0; 9]), &buses);
        assert!(mmio.0.lock().unwrap().is_empty() && io.0.lock().unwrap().is_empty());
    }

    #[test]
    fn the_guest_can_end_the_machine() {
        let (buses, ..) = buses();
        let reset = Outcome::GuestStop("reset");
        assert_eq!(handle(VcpuExit::IoOut(0x64, &[0xfe]), &buses).1, reset);
        assert_eq!(
            handle(VcpuExit::IoOut(0x64, &[0xd1]), &buses).1,
            Outcome::Continue
        );
        let mut status = [0xff];
        handle(VcpuExit::IoIn(0x64, &mut status), &buses);
        assert_eq!(status, [0], "ready for a command");
        let stop = |exit| handle(exit, &buses).1;
        assert_eq!(stop(VcpuExit::Shutdown), Outcome::GuestStop("triple fault"));
        assert_eq!(
            stop(VcpuExit::SystemEvent(1, &[])),
            Outcome::GuestStop("power off")
        );
        assert_eq!(stop(VcpuExit::SystemEvent(2, &[])), reset);
    }

    #[test]
    fn exits_that_should_not_be_are_failures() {
        let (buses, ..) = buses();
        for exit in [
            VcpuExit::Hlt,
            VcpuExit::FailEntry(7, 0),
            VcpuExit::SystemEvent(99, &[]),
            VcpuExit::Unsupported(1234),
            VcpuExit::MemoryFault {
                flags: 0,
                gpa: 0x1000,
                size: 0x1000,
            },
        ] {
            assert!(matches!(handle(exit, &buses).1, Outcome::Failure(_)));
        }
    }
}
