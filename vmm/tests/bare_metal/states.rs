//! The machine's states, and what it refuses.

use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cella_vmm::boot::BootError;
use cella_vmm::jail::ThreadKind;
use cella_vmm::machine::memory::MemoryError;
use cella_vmm::machine::{Machine, MachineError, State, StopReason};

use crate::bench::{Bench, DATA, MEMORY, alone, config, confine, kvm, until};
use crate::kernel::elf;

/// Counts at `DATA`.
fn spinning_guest() -> &'static [u8] {
    guest! {
        "mov ecx, 0x1800000",
        "2: inc qword ptr [rcx]", "jmp 2b",
    }
}

#[test]
fn a_paused_guest_stands_still_and_goes_on_where_it_was() {
    let Some(kvm) = kvm() else { return };
    let _alone = alone();
    let mut bench = Bench::new(kvm, spinning_guest(), 1);
    bench.start();
    let mut last = 0;
    for round in 0..20 {
        until("the guest counts", || bench.read_u64(DATA) > last);
        bench.machine.pause().unwrap();
        assert_eq!(bench.machine.state(), State::Paused);
        let paused = bench.read_u64(DATA);
        std::thread::sleep(Duration::from_millis(if round == 0 { 100 } else { 5 }));
        assert_eq!(bench.read_u64(DATA), paused, "round {round}");
        last = paused;
        bench.machine.resume().unwrap();
    }
    assert!(bench.exits("intr") >= 20);
}

#[test]
fn a_spinning_guest_is_stopped_at_once() {
    let Some(kvm) = kvm() else { return };
    let _alone = alone();
    for pause in [false, true] {
        let mut bench = Bench::new(kvm.try_clone().unwrap(), spinning_guest(), 1);
        bench.start();
        until("the guest counts", || bench.read_u64(DATA) > 0);
        if pause {
            bench.machine.pause().unwrap();
        }
        let before = Instant::now();
        bench.machine.stop();
        assert!(before.elapsed() < Duration::from_secs(2));
        assert_eq!(bench.stopped(), StopReason::Requested);
        assert_eq!(bench.machine.state(), State::Stopped);
        bench.machine.stop();
        let stopped = bench.read_u64(DATA);
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(bench.read_u64(DATA), stopped);
    }
}

#[test]
fn a_triple_fault_is_the_guests_own_end() {
    let Some(kvm) = kvm() else { return };
    let _alone = alone();
    // No table of handlers, and an address that is not mapped.
    let code = guest! { "mov ecx, 0x70000000", "mov eax, [rcx]", "2: hlt", "jmp 2b" };
    let mut bench = Bench::new(kvm, code, 1);
    bench.start();
    assert_eq!(bench.stopped(), StopReason::Guest("triple fault"));
    assert_eq!(bench.machine.state(), State::Stopped);
    let error = bench.machine.pause().unwrap_err();
    assert!(matches!(error, MachineError::State { .. }), "{error}");
    bench.machine.stop();
    let reason = bench.machine.stop_reason();
    assert_eq!(reason, Some(StopReason::Guest("triple fault")));
}

#[track_caller]
fn refused(result: Result<(), MachineError>, action: &str, state: State) {
    match result {
        Err(MachineError::State {
            action: what,
            state: at,
        }) => assert_eq!((what, at), (action, state)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_a_state_does_not_allow_is_refused() {
    let Some(kvm) = kvm() else { return };
    let _alone = alone();
    let kernel = elf(spinning_guest(), 0x1000);
    let mut machine = Machine::new(config(kvm, kernel, 1)).unwrap();
    refused(machine.start(), "start", State::Configured);
    refused(machine.pause(), "pause", State::Configured);
    refused(machine.resume(), "resume", State::Configured);
    machine.spawn(confine()).unwrap();
    refused(machine.spawn(confine()), "be loaded", State::Configured);
    let slot = machine.allocate_slot().map(drop);
    refused(slot, "take a device", State::Configured);
    refused(machine.pause(), "pause", State::Configured);
    machine.start().unwrap();
    refused(machine.start(), "start", State::Running);
    refused(machine.resume(), "resume", State::Running);
    machine.pause().unwrap();
    refused(machine.start(), "start", State::Paused);
    refused(machine.pause(), "pause", State::Paused);
    machine.stop();
    refused(machine.start(), "start", State::Stopped);
    refused(machine.resume(), "resume", State::Stopped);
    refused(machine.spawn(confine()), "be loaded", State::Stopped);
}

#[test]
fn what_cannot_be_a_machine_is_refused() {
    let Some(kvm) = kvm() else { return };
    let _alone = alone();
    let new = |change: &dyn Fn(&mut cella_vmm::machine::MachineConfig)| {
        let kernel = elf(spinning_guest(), 0x1000);
        let mut config = config(kvm.try_clone().unwrap(), kernel, 1);
        change(&mut config);
        Machine::new(config).and_then(|mut machine| machine.spawn(confine()))
    };
    new(&|_| {}).unwrap();
    for vcpus in [0, 33, u32::MAX] {
        let error = new(&|config| config.vcpus = vcpus).unwrap_err();
        assert!(matches!(error, MachineError::Vcpus(n) if n == vcpus));
    }
    for possible in [0, 1, 33] {
        let error = new(&|config| (config.vcpus, config.possible_vcpus) = (2, possible));
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains(&format!("2 to 32, not {possible}")),
            "{error}"
        );
    }
    let error = new(&|config| config.memory_bytes = MEMORY * 2).unwrap_err();
    let kind = matches!(error, MachineError::Memory(MemoryError::FileSize { .. }));
    assert!(kind, "{error}");
    let error = new(&|config| config.kvm = File::open("/dev/null").unwrap()).unwrap_err();
    assert!(matches!(error, MachineError::Kvm { .. }), "{error}");
    // A kernel that is larger than memory, in the file or in its bss.
    let error = new(&|config| config.kernel = elf(&[0xf4; 64], MEMORY)).unwrap_err();
    let kind = matches!(error, MachineError::Boot(BootError::NotAKernel(_)));
    assert!(kind, "{error}");
    let large = vec![0xf4; (MEMORY / 2) as usize + 1];
    let error = new(&|config| config.kernel = elf(&large, large.len() as u64)).unwrap_err();
    let kind = matches!(error, MachineError::Boot(BootError::LoadKernel(_)));
    assert!(kind, "{error}");
    let error = new(&|config| config.cmdline = "x".repeat(3000)).unwrap_err();
    let kind = matches!(error, MachineError::Boot(BootError::CmdlineLength { .. }));
    assert!(kind, "{error}");
}

#[test]
fn a_thread_that_cannot_be_confined_runs_nothing() {
    let Some(kvm) = kvm() else { return };
    let _alone = alone();
    let mut machine = Machine::new(config(kvm, elf(spinning_guest(), 0x1000), 2)).unwrap();
    let confine = Arc::new(|kind| {
        assert_eq!(kind, ThreadKind::Vcpu);
        Err(std::io::Error::other("a locked door"))
    });
    let error = machine.spawn(confine).unwrap_err().to_string();
    assert!(error.contains("a locked door"), "{error}");
    refused(machine.start(), "start", State::Configured);
}

#[test]
fn nineteen_devices_fit() {
    let Some(kvm) = kvm() else { return };
    let _alone = alone();
    let mut machine = Machine::new(config(kvm, elf(&[0xf4], 1), 1)).unwrap();
    for _ in 0..19 {
        machine.allocate_slot().unwrap();
    }
    let error = machine.allocate_slot().unwrap_err();
    assert!(matches!(error, MachineError::Slots(19)), "{error}");
}
