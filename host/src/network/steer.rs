//! Has every TCP connection that is made inside of a network namespace, to whatever port, end in one listening socket:
//! an sk_lookup program of BPF (Linux 5.9), attached to the namespace for as long as its link is open.
//!
//! Nothing of the pod listens in its namespace, as the pod is in the guest. What is dialled there, as containerd does
//! for `kubectl port-forward`, is meant for the guest.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Commands of bpf(2), and the types of `linux/bpf.h`.
const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE: libc::c_int = 2;
const PROG_LOAD: libc::c_int = 5;
const LINK_CREATE: libc::c_int = 28;
const MAP_TYPE_SOCKMAP: u32 = 15;
const PROG_TYPE_SK_LOOKUP: u32 = 30;
const ATTACH_SK_LOOKUP: u32 = 36;

/// `struct bpf_insn`: opcode, registers (source in the high nibble), offset, immediate.
#[repr(C)]
struct Instruction(u8, u8, i16, i32);

/// Attributes of `PROG_LOAD` up to the last that is used.
#[repr(C)]
struct ProgLoad {
    program_type: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
}

/// Attributes of `MAP_UPDATE`.
#[repr(C)]
struct MapUpdate {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Steers the connections of `netns` to `listener`, until the returned link is closed.
///
/// # Errors
/// The kernel has no such programs, or the caller no right to them.
pub(super) fn steer(netns: BorrowedFd<'_>, listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // Type, bytes of a key, bytes of a value, entries.
    let map = bpf(MAP_CREATE, &[MAP_TYPE_SOCKMAP, 4, 4, 1])?;
    let (key, value) = (0u32, number(listener.as_raw_fd()));
    let update = MapUpdate {
        map: number(map.as_raw_fd()),
        padding: 0,
        key: &raw const key as u64,
        value: &raw const value as u64,
        flags: 0,
    };
    call(MAP_UPDATE, &update)?;
    let program = program(map.as_raw_fd());
    let load = ProgLoad {
        program_type: PROG_TYPE_SK_LOOKUP,
        count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
        name: *b"cella_steer\0\0\0\0\0",
        interface: 0,
        attach_type: ATTACH_SK_LOOKUP,
    };
    let program = bpf(PROG_LOAD, &load)?;
    let program = number(program.as_raw_fd());
    // Program, target, type, flags.
    bpf(
        LINK_CREATE,
        &[program, number(netns.as_raw_fd()), ATTACH_SK_LOOKUP, 0],
    )
}

/// Looks the socket up in the map and, if it is of the packet's protocol, takes it. Anything else goes on as usual.
fn program(map: i32) -> [Instruction; 17] {
    const PASS: i32 = 1;
    const MAP_LOOKUP: i32 = 1;
    const SK_RELEASE: i32 = 86;
    const SK_ASSIGN: i32 = 124;
    let call = |function| Instruction(0x85, 0, 0, function);
    let copy = |to: u8, from: u8| Instruction(0xbf, from << 4 | to, 0, 0);
    let set = |to: u8, value| Instruction(0xb7, to, 0, value);
    [
        copy(6, 1),
        // The key, 0, on the stack.
        Instruction(0x62, 10, -4, 0),
        copy(2, 10),
        Instruction(0x07, 2, 0, -4),
        // The map, in two parts.
        Instruction(0x18, 1 << 4 | 1, 0, map),
        Instruction(0, 0, 0, 0),
        call(MAP_LOOKUP),
        // None: to the end.
        Instruction(0x15, 0, 7, 0),
        copy(7, 0),
        copy(1, 6),
        copy(2, 7),
        set(3, 0),
        call(SK_ASSIGN),
        copy(1, 7),
        call(SK_RELEASE),
        set(0, PASS),
        Instruction(0x95, 0, 0, 0),
    ]
}

fn number(fd: i32) -> u32 {
    fd.unsigned_abs()
}

/// A command that makes a descriptor.
fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<OwnedFd> {
    let fd = call(command, attributes)?;
    // SAFETY: these commands return a new descriptor, which is nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn call<T>(command: libc::c_int, attributes: &T) -> io::Result<i32> {
    // SAFETY: the attributes, and what they point to, live through the call; their size is given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    match i32::try_from(result) {
        Ok(result) if result >= 0 => Ok(result),
        _ => Err(io::Error::last_os_error()),
    }
}
