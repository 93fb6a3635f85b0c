//! The device filter: the spec's rules as a BPF program on the container's cgroup, which the kernel asks at each
//! mknod and open of a device.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use super::kept::Kept;
use super::sys;
use super::{Error, Result};

/// BPF_DEVCG_ACC_* of linux/bpf.h.
const MKNOD: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const ALL: u32 = MKNOD | READ | WRITE;
/// BPF_DEVCG_DEV_*.
const BLOCK: u32 = 1;
const CHAR: u32 = 2;

/// What every container may use whatever its rules say, as in other runtimes: making nodes (which says nothing about
/// using them), the default devices, pseudo-terminals and the console. Type, major, minor, access.
const ALWAYS: [(u32, Option<u32>, Option<u32>, u32); 11] = [
    (CHAR, None, None, MKNOD),
    (BLOCK, None, None, MKNOD),
    (CHAR, Some(1), Some(3), ALL),
    (CHAR, Some(1), Some(5), ALL),
    (CHAR, Some(1), Some(7), ALL),
    (CHAR, Some(1), Some(8), ALL),
    (CHAR, Some(1), Some(9), ALL),
    (CHAR, Some(5), Some(0), ALL),
    (CHAR, Some(5), Some(1), ALL),
    (CHAR, Some(5), Some(2), ALL),
    (CHAR, Some(136), None, ALL),
];

/// One rule: what it matches, and whether it allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rule {
    /// None is every type.
    kind: Option<u32>,
    major: Option<u32>,
    minor: Option<u32>,
    access: u32,
    allow: bool,
}

impl Rule {
    fn matches_everything(&self) -> bool {
        self.kind.is_none() && self.major.is_none() && self.minor.is_none() && self.access == ALL
    }
}

/// A BPF instruction, struct bpf_insn: opcode, registers (destination in the low nibble), offset, immediate.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// The program for a container's rules, or none if everything is allowed.
#[derive(Debug, Default)]
pub(super) struct DeviceFilter {
    program: Option<Vec<Instruction>>,
}

impl DeviceFilter {
    /// Compiles the rules. A later rule outweighs an earlier one; what no rule matches is denied.
    pub(super) fn new(rules: &[LinuxDeviceCgroup]) -> Result<Self> {
        let mut parsed = rules.iter().map(parse).collect::<Result<Vec<_>>>()?;
        if parsed
            .iter()
            .rposition(Rule::matches_everything)
            .is_some_and(|last| {
                parsed
                    .get(last..)
                    .is_some_and(|rest| rest.iter().all(|rule| rule.allow))
            })
        {
            return Ok(Self { program: None });
        }
        let always = ALWAYS.map(|(kind, major, minor, access)| Rule {
            kind: Some(kind),
            major,
            minor,
            access,
            allow: true,
        });
        // Said again at the end, an earlier rule decides nothing; and the kernel's verifier takes its time over each.
        parsed.retain(|rule| !always.contains(rule));
        parsed.extend(always);
        // Nothing before the last rule about everything can count.
        let first = parsed
            .iter()
            .rposition(Rule::matches_everything)
            .unwrap_or(0);
        Ok(Self {
            program: Some(compile(parsed.get(first..).unwrap_or_default())),
        })
    }

    /// Attaches the program to `cgroup` in place of `old`. What is returned is what replaces it later; the program
    /// itself lives as long as the cgroup.
    pub(super) fn attach(
        &self,
        cgroup: BorrowedFd<'_>,
        programs: &Programs,
        old: Option<&Program>,
    ) -> std::io::Result<Option<Program>> {
        let program = match (&self.program, old) {
            (Some(program), _) => program,
            (None, None) => return Ok(None),
            // Everything is allowed from now on.
            (None, Some(_)) => &vec![move_immediate(0, 1), exit()],
        };
        let new = programs.get(program.as_slice(), || load(program).map(Arc::new))?;
        if !old.is_some_and(|old| Arc::ptr_eq(old, &new)) {
            attach(cgroup, &new, old.map(Arc::as_ref))?;
        }
        Ok(Some(new))
    }
}

/// A program that the kernel has taken.
pub(super) type Program = Arc<OwnedFd>;

/// Programs that the kernel's verifier need not look at again, which takes it long.
pub(super) type Programs = Kept<Vec<Instruction>, Program>;

fn parse(rule: &LinuxDeviceCgroup) -> Result<Rule> {
    let field = "linux.resources.devices";
    let kind = match rule.typ().unwrap_or_default() {
        LinuxDeviceType::A => None,
        LinuxDeviceType::B => Some(BLOCK),
        LinuxDeviceType::C | LinuxDeviceType::U => Some(CHAR),
        LinuxDeviceType::P => return Err(Error::invalid(field, "a FIFO is not a device")),
    };
    let number = |value: Option<i64>| match value {
        None | Some(-1) => Ok(None),
        Some(value) => u32::try_from(value)
            .map(Some)
            .map_err(|_| Error::invalid(field, format!("{value} is no device number"))),
    };
    let mut access = 0;
    for letter in rule.access().as_deref().unwrap_or("rwm").chars() {
        access |= match letter {
            'r' => READ,
            'w' => WRITE,
            'm' => MKNOD,
            other => {
                return Err(Error::invalid(
                    field,
                    format!("access {other:?} is not r, w or m"),
                ));
            }
        };
    }
    // By the spec, type "a" stands for all devices whatever numbers come with it.
    let (major, minor) = match kind {
        None => (None, None),
        Some(_) => (number(rule.major())?, number(rule.minor())?),
    };
    Ok(Rule {
        kind,
        major,
        minor,
        access,
        allow: rule.allow(),
    })
}

// Registers: r0 result and scratch, r1 context, r2 type, r3 the accesses still to be decided, r4 major, r5 minor.

/// From the last rule to the first: each decides those accesses of the request that none after it has decided. A
/// denied one denies the request; the request is allowed once none is left.
fn compile(rules: &[Rule]) -> Vec<Instruction> {
    let mut program = vec![
        load_word(2, 0),
        // access_type: the type in the low half, the access in the high half.
        instruction(ALU32_MOV_REGISTER, 3, 2, 0, 0),
        instruction(ALU32_AND, 2, 0, 0, 0xffff),
        instruction(ALU32_SHIFT_RIGHT, 3, 0, 0, 16),
        load_word(4, 4),
        load_word(5, 8),
    ];
    let rules: Vec<Rule> = rules.iter().rev().copied().collect();
    let Code { code, ends } = compile_rules(&rules, &CONDITIONS);
    program.extend(code);
    // The kernel refuses a program with instructions that are never reached.
    if !ends {
        program.push(move_immediate(0, 0));
        program.push(exit());
    }
    program
}

/// A register, and what a rule wants it to be.
type Condition = (u8, fn(&Rule) -> Option<u32>);

const CONDITIONS: [Condition; 3] = [
    (2, |rule| rule.kind),
    (4, |rule| rule.major),
    (5, |rule| rule.minor),
];

/// As many rules at most are behind one jump, which reaches 32,767 instructions: a rule has at most 8.
const MOST_BEHIND_A_JUMP: usize = 1024;

/// Part of a program.
struct Code {
    code: Vec<Instruction>,
    /// Whether no request gets behind it.
    ends: bool,
}

/// Neighbours that want the same of a register ask once: the kernel's verifier follows every jump both ways, and is most of
/// what a container's first filter costs.
fn compile_rules(rules: &[Rule], conditions: &[Condition]) -> Code {
    let mut result = Code {
        code: Vec::new(),
        ends: false,
    };
    let Some(((register, wanted), further)) = conditions.split_first() else {
        for rule in rules {
            let Code { code, ends } = compile_rule(rule);
            result.code.extend(code);
            result.ends = ends;
            if ends {
                break;
            }
        }
        return result;
    };
    let alike = rules.chunk_by(|left, right| wanted(left) == wanted(right));
    for run in alike.flat_map(|run| run.chunks(MOST_BEHIND_A_JUMP)) {
        let Code { code, ends } = compile_rules(run, further);
        let value = run.first().and_then(wanted);
        if let Some(value) = value {
            let skip = i16::try_from(code.len()).unwrap_or(i16::MAX);
            let jump = instruction(JUMP32_NOT_EQUAL, *register, 0, skip, value as i32);
            result.code.push(jump);
        }
        result.code.extend(code);
        if ends && value.is_none() {
            result.ends = true;
            break;
        }
    }
    result
}

/// What a rule does with a request that it matches.
fn compile_rule(rule: &Rule) -> Code {
    let ends = rule.access == ALL;
    let code = match (rule.allow, ends) {
        // There is always something left to decide, and it decides all.
        (allow, true) => vec![move_immediate(0, i32::from(allow)), exit()],
        (true, false) => vec![
            instruction(ALU32_AND, 3, 0, 0, !rule.access as i32),
            instruction(JUMP32_NOT_EQUAL, 3, 0, 2, 0),
            move_immediate(0, 1),
            exit(),
        ],
        (false, false) => vec![
            instruction(ALU32_MOV_REGISTER, 0, 3, 0, 0),
            instruction(ALU32_AND, 0, 0, 0, rule.access as i32),
            instruction(JUMP32_EQUAL, 0, 0, 2, 0),
            move_immediate(0, 0),
            exit(),
        ],
    };
    Code { code, ends }
}

const LOAD_WORD: u8 = 0x61; // BPF_LDX | BPF_MEM | BPF_W
const ALU32_MOV_REGISTER: u8 = 0xbc; // BPF_ALU | BPF_MOV | BPF_X
const ALU32_AND: u8 = 0x54; // BPF_ALU | BPF_AND | BPF_K
const ALU32_SHIFT_RIGHT: u8 = 0x74; // BPF_ALU | BPF_RSH | BPF_K
const ALU64_MOV: u8 = 0xb7; // BPF_ALU64 | BPF_MOV | BPF_K
const JUMP32_EQUAL: u8 = 0x16; // BPF_JMP32 | BPF_JEQ | BPF_K
const JUMP32_NOT_EQUAL: u8 = 0x56; // BPF_JMP32 | BPF_JNE | BPF_K
const EXIT: u8 = 0x95; // BPF_JMP | BPF_EXIT

fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction {
        code,
        registers: from << 4 | to,
        offset,
        immediate,
    }
}

/// Loads the context's word at byte `offset`.
fn load_word(register: u8, offset: i16) -> Instruction {
    instruction(LOAD_WORD, register, 1, offset, 0)
}

fn move_immediate(register: u8, value: i32) -> Instruction {
    instruction(ALU64_MOV, register, 0, 0, value)
}

fn exit() -> Instruction {
    instruction(EXIT, 0, 0, 0, 0)
}

/// The head of union bpf_attr for BPF_PROG_LOAD.
#[repr(C)]
struct LoadAttr {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
}

fn load(program: &[Instruction]) -> std::io::Result<OwnedFd> {
    const BPF_PROG_LOAD: i32 = 5;
    const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
    let attr = LoadAttr {
        program_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        instruction_count: u32::try_from(program.len())
            .map_err(|_| std::io::Error::from_raw_os_error(libc::E2BIG))?,
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buffer: 0,
        kernel_version: 0,
        flags: 0,
    };
    // SAFETY: the attribute and what it points to live through the call, and its size is given.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_LOAD,
            &raw const attr,
            size_of::<LoadAttr>(),
        )
    };
    match i32::try_from(fd) {
        Ok(fd) if fd >= 0 => Ok(sys::owned(fd)),
        _ => Err(std::io::Error::last_os_error()),
    }
}

fn attach(cgroup: BorrowedFd<'_>, program: &OwnedFd, old: Option<&OwnedFd>) -> std::io::Result<()> {
    const BPF_PROG_ATTACH: i32 = 8;
    const BPF_CGROUP_DEVICE: u32 = 6;
    // Allowed beside those of cgroups below, so that a container may run containers.
    const BPF_F_ALLOW_MULTI: u32 = 2;
    const BPF_F_REPLACE: u32 = 4;
    let number = |fd: BorrowedFd<'_>| fd.as_raw_fd().unsigned_abs();
    // target_fd, attach_bpf_fd, attach_type, attach_flags, replace_bpf_fd of union bpf_attr.
    let attr = [
        number(cgroup),
        number(program.as_fd()),
        BPF_CGROUP_DEVICE,
        BPF_F_ALLOW_MULTI | if old.is_some() { BPF_F_REPLACE } else { 0 },
        old.map_or(0, |old| number(old.as_fd())),
    ];
    // SAFETY: the attribute lives through the call, and its size is given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_ATTACH,
            attr.as_ptr(),
            size_of_val(&attr),
        )
    };
    if result < 0 {
        Err(std::io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
