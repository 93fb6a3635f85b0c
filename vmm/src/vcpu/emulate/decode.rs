//! From instruction bytes to an operation and its memory operand, for the few instructions of
//! [`super`] and in 64-bit mode only (Intel SDM volume 2, chapter 2 and appendix A).

use kvm_bindings::{kvm_regs, kvm_sregs};

/// What the instruction does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// `XSAVE`, `XSAVEOPT` and their 64-bit forms. (`XSAVEOPT` may save as much as `XSAVE`.)
    Xsave,
    /// `XRSTOR` and its 64-bit form.
    Xrstor,
    /// `FWAIT`.
    Fwait,
    /// `INT3`.
    Int3,
}

/// A decoded instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// What it does.
    pub operation: Operation,
    /// Its bytes, 1 to 15.
    pub length: u8,
    /// The form with `REX.W`: x87 pointers are 64 bits wide.
    pub wide: bool,
    /// Where its operand is, if it has one.
    pub operand: Option<Operand>,
}

/// A memory operand: segment base + base + index * scale + displacement.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Operand {
    segment: Segment,
    base: Base,
    /// Number of the index register, and the logarithm of what it is multiplied by.
    index: Option<(u8, u8)>,
    displacement: i32,
    /// The address is cut to 32 bits (prefix 0x67).
    short: bool,
}

/// The segments that have a base in 64-bit mode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Segment {
    #[default]
    None,
    Fs,
    Gs,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Base {
    #[default]
    None,
    Register(u8),
    /// The next instruction's address.
    NextRip,
}

/// The longest instruction.
pub const MAX_BYTES: usize = 15;

/// Decodes the instruction at the start of `bytes`; `None` if it is none of ours.
pub fn decode(bytes: &[u8]) -> Option<Instruction> {
    let mut reader = Reader {
        bytes: bytes.get(..MAX_BYTES.min(bytes.len()))?,
        at: 0,
    };
    let prefixes = Prefixes::read(&mut reader)?;
    let simple = |operation, reader: &Reader<'_>| {
        Some(Instruction {
            operation,
            length: reader.at,
            wide: false,
            operand: None,
        })
    };
    match reader.next()? {
        0x9b => simple(Operation::Fwait, &reader),
        0xcc => simple(Operation::Int3, &reader),
        // Group 15. With 0x66, 0xf2 or 0xf3 it holds other instructions.
        0x0f if reader.next()? == 0xae && !prefixes.mandatory => {
            let modrm = reader.next()?;
            let operation = match (modrm >> 3) & 7 {
                4 | 6 => Operation::Xsave,
                5 => Operation::Xrstor,
                _ => return None,
            };
            let operand = Operand::read(&mut reader, modrm, &prefixes)?;
            Some(Instruction {
                operation,
                length: reader.at,
                wide: prefixes.rex & REX_W != 0,
                operand: Some(operand),
            })
        }
        _ => None,
    }
}

const REX_W: u8 = 8;
const REX_X: u8 = 2;
const REX_B: u8 = 1;

struct Reader<'a> {
    bytes: &'a [u8],
    at: u8,
}

impl Reader<'_> {
    fn peek(&self) -> Option<u8> {
        self.bytes.get(usize::from(self.at)).copied()
    }

    fn next(&mut self) -> Option<u8> {
        let byte = self.peek()?;
        // At most 15 bytes.
        self.at += 1;
        Some(byte)
    }

    fn dword(&mut self) -> Option<i32> {
        let bytes = [self.next()?, self.next()?, self.next()?, self.next()?];
        Some(i32::from_le_bytes(bytes))
    }
}

#[derive(Default)]
struct Prefixes {
    segment: Segment,
    short: bool,
    /// 0x66, 0xf2 or 0xf3.
    mandatory: bool,
    rex: u8,
}

impl Prefixes {
    /// Reads the prefixes; `None` for LOCK, which none of ours may have.
    fn read(reader: &mut Reader<'_>) -> Option<Self> {
        let mut prefixes = Self::default();
        loop {
            let byte = reader.peek()?;
            match byte {
                0x26 | 0x2e | 0x36 | 0x3e => {}
                0x64 => prefixes.segment = Segment::Fs,
                0x65 => prefixes.segment = Segment::Gs,
                0x66 | 0xf2 | 0xf3 => prefixes.mandatory = true,
                0x67 => prefixes.short = true,
                0xf0 => return None,
                0x40..=0x4f => {
                    // Counts only right before the opcode: a legacy prefix after it makes it void.
                    prefixes.rex = byte;
                    reader.next()?;
                    let opcode = reader.peek()?;
                    if is_prefix(opcode) {
                        prefixes.rex = 0;
                        continue;
                    }
                    return Some(prefixes);
                }
                _ => return Some(prefixes),
            }
            reader.next()?;
        }
    }
}

fn is_prefix(byte: u8) -> bool {
    matches!(
        byte,
        0x26 | 0x2e | 0x36 | 0x3e | 0x40..=0x4f | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3
    )
}

impl Operand {
    /// Reads what follows `modrm`; `None` for a register operand.
    fn read(reader: &mut Reader<'_>, modrm: u8, prefixes: &Prefixes) -> Option<Self> {
        let (mode, rm) = (modrm >> 6, modrm & 7);
        let extend = |register: u8, bit: u8| register | u8::from(prefixes.rex & bit != 0) << 3;
        let mut operand = Operand {
            segment: prefixes.segment,
            short: prefixes.short,
            ..Self::default()
        };
        // A base of 5 (rbp, r13) without displacement means: no base, but 32 bits of displacement.
        let mut bare = rm == 5 && mode == 0;
        operand.base = if rm == 4 {
            let sib = reader.next()?;
            let index = extend((sib >> 3) & 7, REX_X);
            // 4 (rsp) means: no index.
            operand.index = (index != 4).then_some((index, sib >> 6));
            bare = sib & 7 == 5 && mode == 0;
            if bare {
                Base::None
            } else {
                Base::Register(extend(sib & 7, REX_B))
            }
        } else if bare {
            Base::NextRip
        } else {
            Base::Register(extend(rm, REX_B))
        };
        operand.displacement = match mode {
            0 if bare => reader.dword()?,
            0 => 0,
            1 => i32::from(reader.next()?.cast_signed()),
            2 => reader.dword()?,
            _ => return None,
        };
        Some(operand)
    }

    /// The linear address; `next_rip` is where the next instruction starts.
    pub fn address(&self, regs: &kvm_regs, sregs: &kvm_sregs, next_rip: u64) -> u64 {
        let base = match self.base {
            Base::None => 0,
            Base::Register(number) => register(regs, number),
            Base::NextRip => next_rip,
        };
        let index = self
            .index
            .map_or(0, |(number, shift)| register(regs, number) << shift);
        let mut offset = base
            .wrapping_add(index)
            .wrapping_add_signed(i64::from(self.displacement));
        if self.short {
            offset &= 0xffff_ffff;
        }
        offset.wrapping_add(match self.segment {
            Segment::None => 0,
            Segment::Fs => sregs.fs.base,
            Segment::Gs => sregs.gs.base,
        })
    }
}

/// A general register by its number in instructions.
fn register(regs: &kvm_regs, number: u8) -> u64 {
    match number {
        0 => regs.rax,
        1 => regs.rcx,
        2 => regs.rdx,
        3 => regs.rbx,
        4 => regs.rsp,
        5 => regs.rbp,
        6 => regs.rsi,
        7 => regs.rdi,
        8 => regs.r8,
        9 => regs.r9,
        10 => regs.r10,
        11 => regs.r11,
        12 => regs.r12,
        13 => regs.r13,
        14 => regs.r14,
        _ => regs.r15,
    }
}

#[cfg(test)]
mod tests;
