//! Guests of a few instructions on the real KVM: what leaves the guest, what comes in, and the machine's states.
//!
//! Without `/dev/kvm` every test says so and returns.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test"
)]

#[path = "bare_metal/bench.rs"]
#[macro_use]
mod bench;
#[path = "bare_metal/instructions.rs"]
mod instructions;
#[path = "bare_metal/states.rs"]
mod states;

use std::io::{Read, Seek};
use std::time::Duration;

use bench::{Bench, alone, kvm, until, vcpu_time};
use cella_vmm::machine::StopReason;

#[test]
fn accesses_reach_their_devices_and_holes_read_as_ones() {
    let Some(kvm) = kvm() else { return };
    let _alone = alone();
    let code = guest! {
        "mov ebx, 0xd0000000",
        // The console: two letters, then its line status.
        "mov dx, 0x3f8", "mov al, 0x68", "out dx, al", "mov al, 0x69", "out dx, al",
        "mov dx, 0x3fd", "in al, dx", "mov [rbx + 0x100], al",
        // A port of nobody's: PCI configuration.
        "mov dx, 0xcf8", "mov eax, 0x80000000", "out dx, eax",
        "mov dx, 0xcfc", "in eax, dx", "mov [rbx + 0x104], eax",
        // The recorder reads as its offsets, at every width.
        "mov rax, [rbx + 0x108]", "mov [rbx + 0x110], rax",
        "mov ax, [rbx + 0x132]", "mov [rbx + 0x118], ax",
        // An address of nobody's.
        "mov [rbx + 0x2000], rax", "mov rax, [rbx + 0x2000]", "mov [rbx + 0x120], rax",
        // The keyboard controller: idle, then the reset.
        "in al, 0x64", "mov [rbx + 0x128], al", "mov al, 0xfe", "out 0x64, al",
        "2: hlt", "jmp 2b",
    };
    let mut bench = Bench::new(kvm, code, 1);
    bench.start();
    assert_eq!(bench.next(), (0x100, 1, 0x60), "ready to send");
    assert_eq!(bench.next(), (0x104, 4, 0xffff_ffff));
    assert_eq!(bench.next(), (0x110, 8, 0x0f0e_0d0c_0b0a_0908));
    assert_eq!(bench.next(), (0x118, 2, 0x3332));
    assert_eq!(bench.next(), (0x120, 8, u64::MAX));
    assert_eq!(bench.next(), (0x128, 1, 0));
    assert_eq!(bench.stopped(), StopReason::Guest("reset"));
    assert!(bench.is_quiet(), "the hole swallows writes");
    bench.console.rewind().unwrap();
    let mut text = String::new();
    bench.console.read_to_string(&mut text).unwrap();
    assert_eq!(text, "hi");
    let counts = ["mmio_read", "mmio_write", "io_in", "io_out"].map(|name| bench.exits(name));
    assert_eq!(counts, [3, 7, 3, 4]);
}

#[test]
fn a_notified_queue_does_not_leave_kvm() {
    let Some(kvm) = kvm() else { return };
    let _alone = alone();
    let code = guest! {
        "mov ebx, 0xd0000000",
        "mov dword ptr [rbx + 0x50], 1", "mov dword ptr [rbx + 0x50], 0",
        "mov dword ptr [rbx + 0x50], 1",
        // No such queue: the device is asked.
        "mov dword ptr [rbx + 0x50], 2",
        "2: hlt", "jmp 2b",
    };
    let mut bench = Bench::new(kvm, code, 1);
    bench.start();
    assert_eq!(bench.next(), (0x50, 4, 2));
    assert_eq!(bench.queues[0].read().unwrap(), 1);
    assert_eq!(bench.queues[1].read().unwrap(), 2);
    assert_eq!(bench.exits("mmio_write"), 1);
}

/// Answers vector 0x40: counts, tells the recorder, ends the interrupt and halts again.
fn interrupt_handler() -> &'static [u8] {
    guest! {
        "mov ebx, 0xd0000000", "mov ecx, 0xfee00000",
        "inc r15d", "mov [rbx + 0x200], r15d",
        "mov dword ptr [rcx + 0xb0], 0",
        // Nothing to return to: it always interrupts the same loop.
        "mov esp, 0x8ff0", "sti",
        "2: hlt", "jmp 2b",
    }
}

/// Sends line 5 to vector 0x40 of the boot processor, then halts.
fn halting_guest() -> &'static [u8] {
    guest! {
        "mov ecx, 0x601000", "lidt [rcx]",
        // The old controllers get every line too: masked.
        "mov al, 0xff", "out 0x21, al", "out 0xa1, al",
        "mov ecx, 0xfee00000", "mov dword ptr [rcx + 0xf0], 0x1ff",
        "mov ecx, 0xfec00000",
        "mov dword ptr [rcx], 0x1b", "mov dword ptr [rcx + 0x10], 0",
        "mov dword ptr [rcx], 0x1a", "mov dword ptr [rcx + 0x10], 0x40",
        "xor r15d, r15d", "mov ebx, 0xd0000000", "mov dword ptr [rbx + 0x204], 1",
        "sti",
        "2: hlt", "jmp 2b",
    }
}

#[test]
fn a_halted_guest_costs_nothing_and_wakes_by_its_device() {
    let Some(kvm) = kvm() else { return };
    let _alone = alone();
    let mut bench = Bench::new(kvm, halting_guest(), 1);
    bench.handle(0x40, interrupt_handler());
    bench.start();
    assert_eq!(bench.next(), (0x204, 4, 1));
    std::thread::sleep(Duration::from_millis(50));
    let before = vcpu_time();
    std::thread::sleep(Duration::from_millis(300));
    let spent = vcpu_time() - before;
    assert!(
        spent < Duration::from_millis(60),
        "halted, but ran {spent:?}"
    );
    assert!(bench.is_quiet(), "an interrupt that nobody raised");
    for count in 1..=3 {
        bench.irq.write(1).unwrap();
        assert_eq!(bench.next(), (0x200, 4, count));
    }
    assert_eq!(bench.exits("hlt"), 0, "KVM keeps a halted vCPU");
}

#[test]
fn an_interrupt_during_a_pause_is_not_lost() {
    let Some(kvm) = kvm() else { return };
    let _alone = alone();
    let mut bench = Bench::new(kvm, halting_guest(), 1);
    bench.handle(0x40, interrupt_handler());
    bench.start();
    assert_eq!(bench.next(), (0x204, 4, 1));
    bench.machine.pause().unwrap();
    bench.irq.write(1).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert!(bench.is_quiet(), "ran while paused");
    bench.machine.resume().unwrap();
    assert_eq!(bench.next(), (0x200, 4, 1));
}

#[test]
fn a_second_processor_starts_when_the_first_says_so() {
    let Some(kvm) = kvm() else { return };
    let _alone = alone();
    let code = guest! {
        "mov ebx, 0xd0000000", "mov ecx, 0xfee00000",
        "mov dword ptr [rcx + 0xf0], 0x1ff",
        "mov dword ptr [rcx + 0x310], 0x01000000",
        // INIT, then SIPI to page 0x30.
        "mov dword ptr [rcx + 0x300], 0x4500",
        "mov dword ptr [rcx + 0x310], 0x01000000",
        "mov dword ptr [rcx + 0x300], 0x4630",
        "mov ecx, 0x30100",
        "2: mov eax, [rcx]", "test eax, eax", "jz 2b",
        "mov [rbx + 0x100], eax",
        "3: hlt", "jmp 3b",
    };
    let second = guest! {
        ".code16",
        "mov ax, 0x3000", "mov ds, ax", "mov word ptr [0x100], 0x600d",
        "2: inc word ptr [0x108]", "jmp 2b",
        ".code64",
    };
    let mut bench = Bench::new(kvm, code, 2);
    bench.write(0x3_0000, second);
    bench.start();
    assert_eq!(bench.next(), (0x100, 4, 0x600d));
    // Both stop: the one that halts and the one that spins in real mode.
    let counter = |bench: &Bench| bench.read(0x3_0108, 2);
    until("the second processor spins", || counter(&bench) != [0, 0]);
    bench.machine.pause().unwrap();
    let paused = counter(&bench);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(counter(&bench), paused);
    bench.machine.resume().unwrap();
    until("it goes on", || counter(&bench) != paused);
    bench.machine.stop();
    assert_eq!(bench.machine.stop_reason(), Some(StopReason::Requested));
}
