//! The decoder against bytes that an assembler made of the text beside them.

use proptest::prelude::*;

use super::Operation::{Xrstor, Xsave};
use super::*;

/// Every register has a value of its own, so that a wrong one shows.
fn registers() -> (kvm_regs, kvm_sregs) {
    let regs = kvm_regs {
        rax: 0x1000,
        rcx: 0x2000,
        rdx: 0x3000,
        rbx: 0x4000,
        rsp: 0x5000,
        rbp: 0x6000,
        rsi: 0x7000,
        rdi: 0x8000,
        r8: 0x9000,
        r9: 0xa000,
        r10: 0xb000,
        r11: 0xc000,
        r12: 0xd000,
        r13: 0xe000,
        r14: 0xf000,
        r15: 0x1_0000,
        ..Default::default()
    };
    let mut sregs = kvm_sregs::default();
    sregs.fs.base = 0x7f00_0000_0000;
    sregs.gs.base = 0xffff_8880_0000_0000;
    (regs, sregs)
}

const RIP: u64 = 0xffff_ffff_8100_0000;

type Case = (&'static str, &'static [u8], Operation, bool, u64);

// The text, its bytes, what it is, whether it is wide, and the address of its operand.
const OPERANDS: &[Case] = &[
    (
        "xsave64 [rdi]",
        &[0x48, 0x0f, 0xae, 0x27],
        Xsave,
        true,
        0x8000,
    ),
    ("xsave [rdi]", &[0x0f, 0xae, 0x27], Xsave, false, 0x8000),
    (
        "xrstor64 [rdi]",
        &[0x48, 0x0f, 0xae, 0x2f],
        Xrstor,
        true,
        0x8000,
    ),
    ("xrstor [rdi]", &[0x0f, 0xae, 0x2f], Xrstor, false, 0x8000),
    (
        "xsaveopt64 [rdi]",
        &[0x48, 0x0f, 0xae, 0x37],
        Xsave,
        true,
        0x8000,
    ),
    (
        "xsave64 [rbp+0x40]",
        &[0x48, 0x0f, 0xae, 0x65, 0x40],
        Xsave,
        true,
        0x6040,
    ),
    (
        "xsave64 [rax-0x80]",
        &[0x48, 0x0f, 0xae, 0x60, 0x80],
        Xsave,
        true,
        0xf80,
    ),
    (
        "xrstor64 [rdx+0x1340]",
        &[0x48, 0x0f, 0xae, 0xaa, 0x40, 0x13, 0, 0],
        Xrstor,
        true,
        0x4340,
    ),
    (
        "xsave64 [r12]",
        &[0x49, 0x0f, 0xae, 0x24, 0x24],
        Xsave,
        true,
        0xd000,
    ),
    (
        "xsave64 [r13]",
        &[0x49, 0x0f, 0xae, 0x65, 0x00],
        Xsave,
        true,
        0xe000,
    ),
    (
        "xsave64 [rsp+0x10]",
        &[0x48, 0x0f, 0xae, 0x64, 0x24, 0x10],
        Xsave,
        true,
        0x5010,
    ),
    (
        "xrstor64 [rbx+rcx*8-0x100]",
        &[0x48, 0x0f, 0xae, 0xac, 0xcb, 0x00, 0xff, 0xff, 0xff],
        Xrstor,
        true,
        0x4000 + 0x10000 - 0x100,
    ),
    (
        "xrstor64 [r9+r12*2]",
        &[0x4b, 0x0f, 0xae, 0x2c, 0x61],
        Xrstor,
        true,
        0xa000 + 0x1a000,
    ),
    (
        "xsave64 [r15*4+0x123]",
        &[0x4a, 0x0f, 0xae, 0x24, 0xbd, 0x23, 0x01, 0, 0],
        Xsave,
        true,
        0x40123,
    ),
    (
        "xsave64 [0x12345678]",
        &[0x48, 0x0f, 0xae, 0x24, 0x25, 0x78, 0x56, 0x34, 0x12],
        Xsave,
        true,
        0x1234_5678,
    ),
    (
        "xrstor64 [rip+0x100]",
        &[0x48, 0x0f, 0xae, 0x2d, 0x00, 0x01, 0, 0],
        Xrstor,
        true,
        RIP + 8 + 0x100,
    ),
    (
        "xsave64 fs:[rdi]",
        &[0x64, 0x48, 0x0f, 0xae, 0x27],
        Xsave,
        true,
        0x7f00_0000_8000,
    ),
    (
        "xrstor64 gs:[rcx]",
        &[0x65, 0x48, 0x0f, 0xae, 0x29],
        Xrstor,
        true,
        0xffff_8880_0000_2000,
    ),
    (
        "xsave [edi-0x9000], which wraps at 32 bits",
        &[0x67, 0x0f, 0xae, 0xa7, 0x00, 0x70, 0xff, 0xff],
        Xsave,
        false,
        0xffff_f000,
    ),
    (
        "A DS prefix and a REX that it makes void: xsave [rdi]",
        &[0x49, 0x3e, 0x0f, 0xae, 0x27],
        Xsave,
        false,
        0x8000,
    ),
];

#[test]
fn operands_of_every_kind() {
    for &(text, bytes, operation, wide, address) in OPERANDS {
        let instruction = decode(bytes).unwrap();
        assert_eq!(instruction.operation, operation, "{text}");
        assert_eq!(usize::from(instruction.length), bytes.len(), "{text}");
        assert_eq!(instruction.wide, wide, "{text}");
        let (regs, sregs) = registers();
        let next = RIP + bytes.len() as u64;
        let at = instruction.operand.unwrap().address(&regs, &sregs, next);
        assert_eq!(at, address, "{text}: {at:#x}");
    }
}

#[test]
fn instructions_without_operand() {
    for (bytes, operation, length) in [
        (&[0x9b, 0xdd][..], Operation::Fwait, 1),
        (&[0xcc][..], Operation::Int3, 1),
        (&[0x48, 0x9b][..], Operation::Fwait, 2),
    ] {
        let expected = Instruction {
            operation,
            length,
            wide: false,
            operand: None,
        };
        assert_eq!(decode(bytes), Some(expected));
    }
}

#[test]
fn what_is_none_of_ours_is_left_alone() {
    for bytes in [
        &[][..],
        &[0x0f],
        // Cut off: within ModRM, SIB, displacement.
        &[0x48, 0x0f, 0xae],
        &[0x48, 0x0f, 0xae, 0x24],
        &[0x48, 0x0f, 0xae, 0xaa, 0x40, 0x13, 0],
        // lfence, mfence, sfence: register operands.
        &[0x0f, 0xae, 0xe8],
        &[0x0f, 0xae, 0xf0],
        &[0x0f, 0xae, 0xf8],
        // clwb [rax], clflushopt [rax], incsspd eax, rdfsbase rax.
        &[0x66, 0x0f, 0xae, 0x30],
        &[0x66, 0x0f, 0xae, 0x38],
        &[0xf3, 0x0f, 0xae, 0xe8],
        &[0xf3, 0x48, 0x0f, 0xae, 0xc0],
        // fxsave [rax], clflush [rax]: KVM's own.
        &[0x0f, 0xae, 0x00],
        &[0x0f, 0xae, 0x38],
        // lock xsave [rdi], xsavec [rdi], ud2, nop.
        &[0xf0, 0x0f, 0xae, 0x27],
        &[0x0f, 0xc7, 0x27],
        &[0x0f, 0x0b],
        &[0x90],
        // Nothing but prefixes.
        &[0x65; 15],
        &[0x48; 15],
    ] {
        assert_eq!(decode(bytes), None, "{bytes:02x?}");
    }
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..20)) {
        if let Some(instruction) = decode(&bytes) {
            prop_assert!((1..=15).contains(&instruction.length));
            prop_assert!(usize::from(instruction.length) <= bytes.len());
        }
    }

    #[test]
    fn no_operand_makes_it_panic(
        prefix in prop::sample::select(vec![0x48u8, 0x4f, 0x67, 0x65, 0x26]),
        tail in prop::collection::vec(any::<u8>(), 13),
        values in any::<[u64; 3]>(),
    ) {
        let mut bytes = vec![prefix, 0x0f, 0xae];
        bytes.extend(tail);
        let Some(Instruction { operand: Some(operand), .. }) = decode(&bytes) else {
            return Ok(());
        };
        let regs = kvm_regs { rax: values[0], rdi: values[1], r15: values[2], ..Default::default() };
        let address = operand.address(&regs, &kvm_sregs::default(), u64::MAX);
        prop_assert!(prefix != 0x67 || address <= 0xffff_ffff);
    }
}
