//! Instructions that KVM's emulator leaves to us, executed by a guest's kernel mode.

use std::ops::Range;

use crate::bench::{Bench, DATA, ENTRY, alone, emulated, kvm};

const X87: u64 = 1;
const SSE: u64 = 2;
const AVX: u64 = 4;

const XMM: Range<usize> = 160..416;
const YMM: Range<usize> = 576..832;
const XSTATE_BV: Range<usize> = 512..520;

/// An area whose registers each have a value of their own. Bytes 10 to 15 of an x87 register do not exist.
fn marked() -> Vec<u8> {
    let mut area = vec![0; 832];
    area[..2].copy_from_slice(&0x27f_u16.to_le_bytes());
    area[4] = 0xff;
    area[24..28].copy_from_slice(&0x1fa0_u32.to_le_bytes());
    for register in 0..8 {
        let at = 32 + register * 16;
        area[at..at + 8].copy_from_slice(&(0x8000_0000_0000_0000 + register as u64).to_le_bytes());
        area[at + 8..at + 10].copy_from_slice(&0x3fff_u16.to_le_bytes());
    }
    for (at, byte) in area[XMM].iter_mut().enumerate() {
        *byte = at as u8;
    }
    for (at, byte) in area[YMM].iter_mut().enumerate() {
        *byte = !(at as u8);
    }
    area[XSTATE_BV].copy_from_slice(&(X87 | SSE | AVX).to_le_bytes());
    area
}

#[test]
fn extended_state_is_restored_and_saved_across_pages() {
    let Some(kvm) = kvm() else { return };
    let _alone = alone();
    if !emulated() {
        return;
    }
    let code = guest! {
        "mov ebx, 0xd0000000", "xor edx, edx",
        "mov eax, 7", "mov ecx, 0x1800fc0", "xrstor [rcx]",
        "fwait",
        "mov eax, 7", "mov ecx, 0x1804f80", "xsave64 [rcx]",
        // SSE alone, then everything initial, then all again.
        "mov eax, 2", "mov ecx, 0x1808000", "xsave [rcx]",
        "mov eax, 7", "mov ecx, 0x180c000", "xrstor64 [rcx]",
        "mov eax, 7", "mov ecx, 0x1810000", "xsave [rcx]",
        "mov [rbx + 0x100], eax",
        "2: hlt", "jmp 2b",
    };
    let mut bench = Bench::new(kvm, code, 1);
    let area = marked();
    bench.write(DATA + 0xfc0, &area);
    bench.write(DATA + 0x8000, &[0xee; 832]);
    bench.write(DATA + 0x8000 + 512, &(AVX | X87).to_le_bytes());
    // XSTATE_BV of 0: everything as after reset, MXCSR too.
    let mut initial = vec![0; 832];
    initial[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes());
    bench.write(DATA + 0xc000, &initial);
    bench.start();
    assert_eq!(bench.next(), (0x100, 4, 7));

    let all = bench.read(DATA + 0x4f80, 832);
    assert_eq!(all[XSTATE_BV], area[XSTATE_BV]);
    assert_eq!(all[XMM], area[XMM]);
    assert_eq!(all[YMM], area[YMM]);
    assert_eq!(all[24..28], area[24..28], "MXCSR");
    assert_eq!(all[..5], area[..5], "FCW, FSW, FTW");
    for register in 0..8 {
        let at = 32 + register * 16;
        assert_eq!(all[at..at + 10], area[at..at + 10], "st({register})");
    }
    let sse = bench.read(DATA + 0x8000, 832);
    assert_eq!(sse[XMM], area[XMM]);
    assert_eq!(sse[24..28], area[24..28], "MXCSR");
    assert_eq!(sse[XSTATE_BV], (X87 | SSE | AVX).to_le_bytes());
    for untouched in [0..24, 32..160, 416..512, YMM] {
        assert_eq!(sse[untouched.clone()], vec![0xee; untouched.len()]);
    }
    let reset = bench.read(DATA + 0x1_0000, 832);
    assert_eq!(reset[24..28], 0x1f80_u32.to_le_bytes());
    assert_eq!(reset[XMM], [0; 256]);
    assert_eq!(reset[YMM], [0; 256]);
    assert_eq!(bench.exits("emulate"), 6);
}

/// Tells the recorder what a fault with an error code left on the stack, and CR2.
fn fault_handler() -> &'static [u8] {
    guest! {
        "mov ebx, 0xd0000000",
        "pop rax", "mov [rbx + 0x200], rax",
        "pop rax", "mov [rbx + 0x208], rax",
        "mov rax, cr2", "mov [rbx + 0x210], rax",
        "2: hlt", "jmp 2b",
    }
}

/// The same, for exceptions without error code.
fn trap_handler() -> &'static [u8] {
    guest! {
        "mov ebx, 0xd0000000",
        "pop rax", "mov [rbx + 0x208], rax",
        "2: hlt", "jmp 2b",
    }
}

const BREAKPOINT: u64 = 3;
const INVALID_OPCODE: u64 = 6;
const PROTECTION: u64 = 13;
const PAGE_FAULT: u64 = 14;

/// Length of the `mov`, `lidt` and whatever precedes the instruction that faults in each guest here.
fn offset_of(code: &[u8], instruction: &[u8]) -> u64 {
    let at = code
        .windows(instruction.len())
        .position(|bytes| bytes == instruction);
    ENTRY + at.expect("the instruction") as u64
}

#[test]
fn an_area_that_cannot_be_used_faults_in_the_guest() {
    let Some(kvm) = kvm() else { return };
    let _alone = alone();
    if !emulated() {
        return;
    }
    let misaligned = guest! {
        "mov ecx, 0x601000", "lidt [rcx]", "xor edx, edx", "mov eax, 7",
        "mov ecx, 0x1800008", "xsave [rcx]", "2: hlt", "jmp 2b",
    };
    let reserved = guest! {
        "mov ecx, 0x601000", "lidt [rcx]", "xor edx, edx", "mov eax, 7",
        "mov ecx, 0x1800000", "xrstor [rcx]", "2: hlt", "jmp 2b",
    };
    let unmapped = guest! {
        "mov ecx, 0x601000", "lidt [rcx]", "xor edx, edx", "mov eax, 7",
        "mov ecx, 0x70000000", "xsave [rcx]", "2: hlt", "jmp 2b",
    };
    for (code, instruction, vector, error, cr2) in [
        (misaligned, &[0x0f, 0xae, 0x21][..], PROTECTION, 0, None),
        (reserved, &[0x0f, 0xae, 0x29], PROTECTION, 0, None),
        (
            unmapped,
            &[0x0f, 0xae, 0x21],
            PAGE_FAULT,
            2,
            Some(0x7000_0000),
        ),
    ] {
        let mut bench = Bench::new(kvm.try_clone().unwrap(), code, 1);
        bench.handle(vector, fault_handler());
        // A reserved bit of the header.
        bench.write(DATA + 575, &[1]);
        bench.start();
        assert_eq!(bench.next(), (0x200, 8, error));
        let at = offset_of(code, instruction);
        assert_eq!(bench.next(), (0x208, 8, at), "at its own address");
        let (_, _, address) = bench.next();
        assert_eq!(address, cr2.unwrap_or(address));
    }
}

#[test]
fn a_breakpoint_traps_and_an_undefined_instruction_faults() {
    let Some(kvm) = kvm() else { return };
    let _alone = alone();
    let breakpoint = guest! {
        "mov ecx, 0x601000", "lidt [rcx]", "int3", "2: hlt", "jmp 2b",
    };
    let undefined = guest! {
        "mov ecx, 0x601000", "lidt [rcx]", "ud2", "2: hlt", "jmp 2b",
    };
    for (code, vector, at) in [
        (breakpoint, BREAKPOINT, offset_of(breakpoint, &[0xcc]) + 1),
        (
            undefined,
            INVALID_OPCODE,
            offset_of(undefined, &[0x0f, 0x0b]),
        ),
    ] {
        let mut bench = Bench::new(kvm.try_clone().unwrap(), code, 1);
        bench.handle(vector, trap_handler());
        bench.start();
        assert_eq!(bench.next(), (0x208, 8, at), "vector {vector}");
    }
}
