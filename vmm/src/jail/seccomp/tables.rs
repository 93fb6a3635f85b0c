//! The tables: a call, what its arguments must be, and why the thread makes it.
//!
//! `argument & mask == value` is all that a check can say; where there are several, one must hold. Only the lower 32
//! bits of an argument are compared: all arguments checked here are of type `int` or have flags there only.

use kvm_bindings::{kvm_clock_data, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msrs};
use kvm_bindings::{kvm_debugregs, kvm_pit_state2, kvm_xcrs};
use kvm_bindings::{kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xsave};

use crate::jail::ThreadKind;

/// A system call that a filter allows.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) number: i64,
    pub(super) checks: &'static [Check],
    #[cfg(test)]
    pub(super) name: &'static str,
    #[cfg(test)]
    pub(super) why: &'static str,
}

/// What one argument must be.
#[derive(Debug)]
pub(super) struct Check {
    pub(super) argument: u8,
    pub(super) mask: u32,
    pub(super) value: u32,
    #[cfg(test)]
    pub(super) text: &'static str,
}

/// The calls of a kind of thread, each once.
pub(super) fn of(kind: ThreadKind) -> impl Iterator<Item = &'static Call> {
    let own = match kind {
        ThreadKind::Main => [EVERY, LOOP, MAIN, &[]],
        ThreadKind::Vcpu => [EVERY, VCPU, &[], &[]],
        ThreadKind::Block => [EVERY, LOOP, BLOCK, &[]],
        ThreadKind::Net => [EVERY, LOOP, NET, &[]],
        ThreadKind::Fs => [EVERY, LOOP, FS, &[]],
        ThreadKind::VhostUserMain => [EVERY, LOOP, MAIN, VHOST_USER_MAIN],
        ThreadKind::VhostUserFs => [EVERY, LOOP, FS, VHOST_USER_FS],
    };
    own.into_iter().flatten()
}

macro_rules! call {
    ($name:ident, $why:literal $(, $check:expr)*) => {
        Call {
            number: libc::$name,
            checks: &[$($check),*],
            #[cfg(test)]
            name: stringify!($name),
            #[cfg(test)]
            why: $why,
        }
    };
}

macro_rules! arg {
    ($argument:literal is $value:expr) => {
        arg!(
            $argument,
            u32::MAX,
            $value as u32,
            concat!("arg", $argument, " is ", stringify!($value))
        )
    };
    ($argument:literal has $bits:expr) => {
        arg!(
            $argument,
            $bits as u32,
            $bits as u32,
            concat!("arg", $argument, " has ", stringify!($bits))
        )
    };
    ($argument:literal lacks $bits:expr) => {
        arg!(
            $argument,
            $bits as u32,
            0,
            concat!("arg", $argument, " lacks ", stringify!($bits))
        )
    };
    ($argument:literal, $mask:expr, $value:expr, $text:expr) => {
        Check {
            argument: $argument,
            mask: $mask,
            value: $value,
            #[cfg(test)]
            text: $text,
        }
    };
}

const EVERY: &[Call] = &[
    call!(SYS_brk, "heap"),
    call!(
        SYS_mmap,
        "heap; never executable",
        arg!(2 lacks libc::PROT_EXEC)
    ),
    call!(
        SYS_mprotect,
        "heap; never executable",
        arg!(2 lacks libc::PROT_EXEC)
    ),
    call!(SYS_mremap, "heap: realloc of large blocks"),
    call!(SYS_munmap, "heap; the end of a thread"),
    call!(
        SYS_madvise,
        "heap: free pages given back; a thread's stack at its end"
    ),
    call!(SYS_futex, "locks, channels, joining threads"),
    call!(SYS_sched_yield, "locks that spin first"),
    call!(SYS_getrandom, "the keys of hash maps; virtio-rng"),
    call!(
        SYS_clock_gettime,
        "time where the vDSO cannot read the host's clock"
    ),
    call!(SYS_read, "event descriptors"),
    call!(
        SYS_write,
        "event descriptors, interrupts, the console, stderr"
    ),
    call!(SYS_close, "descriptors of a device that is reset"),
    call!(
        SYS_epoll_ctl,
        "a device watches its descriptors, also from activation and reset"
    ),
    call!(SYS_rt_sigreturn, "the end of the kick's signal handler"),
    call!(SYS_rt_sigprocmask, "masks: a thread's end, abort"),
    call!(SYS_sigaltstack, "the end of a thread"),
    call!(
        SYS_restart_syscall,
        "a wait that was stopped and continued (SIGSTOP, freezer)"
    ),
    call!(SYS_getpid, "kicks name their process; abort"),
    call!(SYS_gettid, "kicks name their thread; abort"),
    call!(
        SYS_tgkill,
        "kicks and abort; process 1 is this one",
        arg!(0 is 1)
    ),
    call!(SYS_exit, "the end of a thread"),
    call!(SYS_exit_group, "the end of the process"),
];

const LOOP: &[Call] = &[
    call!(SYS_epoll_wait, "the event loop"),
    call!(SYS_epoll_pwait, "the event loop"),
];

const MAIN: &[Call] = &[
    call!(
        SYS_recvmsg,
        "control: requests and their descriptors; vsock"
    ),
    call!(SYS_sendmsg, "vsock: from guest memory to a socket"),
    call!(SYS_recvfrom, "vsock: the CONNECT line"),
    call!(SYS_sendto, "control: replies; vsock: the OK line"),
    call!(
        SYS_poll,
        "control: waiting for room; vsock: what a socket is ready for"
    ),
    call!(SYS_ppoll, "as poll"),
    call!(SYS_accept4, "vsock: a host program connects"),
    call!(
        SYS_socket,
        "vsock: the guest connects to a socket in /vsock",
        arg!(0 is libc::AF_UNIX)
    ),
    call!(SYS_connect, "vsock: the guest connects"),
    call!(SYS_shutdown, "vsock: half-closed connections"),
    call!(SYS_timerfd_settime, "vsock: deadlines of handshakes"),
    call!(
        SYS_fcntl,
        "descriptors made nonblocking or duplicated; vhost-user: the seals of guest memory",
        arg!(1 is libc::F_GETFD),
        arg!(1 is libc::F_SETFD),
        arg!(1 is libc::F_GETFL),
        arg!(1 is libc::F_SETFL),
        arg!(1 is libc::F_GET_SEALS),
        arg!(1 is libc::F_DUPFD_CLOEXEC)
    ),
    call!(
        SYS_ioctl,
        "vsock: nonblocking connections; snapshots: interrupt controllers, timer and clock are read",
        arg!(1 is libc::FIONBIO),
        arg!(1 is KVM_GET_IRQCHIP),
        arg!(1 is KVM_GET_PIT2),
        arg!(1 is KVM_GET_CLOCK)
    ),
    call!(
        SYS_lseek,
        "statistics: /proc/self/smaps from its start; snapshots: pages of the guest's memory that were used"
    ),
    call!(
        SYS_fallocate,
        "virtio-mem: memory that the guest gives up; vhost-user: the companion's files are taken away",
        arg!(1 is libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE)
    ),
    call!(SYS_pwrite64, "snapshots: to the files that came for it"),
    call!(SYS_fstat, "snapshots: the length of the memory's file"),
    call!(SYS_statx, "as fstat"),
];

const VCPU: &[Call] = &[
    call!(
        SYS_ioctl,
        "running the guest; completing what KVM cannot emulate; snapshots: its registers are read",
        arg!(1 is KVM_RUN),
        arg!(1 is KVM_GET_REGS),
        arg!(1 is KVM_SET_REGS),
        arg!(1 is KVM_GET_SREGS),
        arg!(1 is KVM_SET_SREGS),
        arg!(1 is KVM_GET_XSAVE),
        arg!(1 is KVM_SET_XSAVE),
        arg!(1 is KVM_GET_VCPU_EVENTS),
        arg!(1 is KVM_SET_VCPU_EVENTS),
        arg!(1 is KVM_GET_LAPIC),
        arg!(1 is KVM_GET_MP_STATE),
        arg!(1 is KVM_GET_XCRS),
        arg!(1 is KVM_GET_DEBUGREGS),
        arg!(1 is KVM_GET_MSRS)
    ),
    call!(
        SYS_timerfd_settime,
        "the guest resets vsock: its timer is cleared"
    ),
    call!(SYS_shutdown, "the guest resets vsock: its connections end"),
    call!(
        SYS_openat,
        "the guest resets the file server, which opens its root anew",
        arg!(2 has libc::O_PATH)
    ),
    call!(SYS_newfstatat, "as openat"),
    call!(SYS_statx, "as openat"),
    call!(SYS_umask, "as openat"),
];

const BLOCK: &[Call] = &[
    call!(SYS_preadv, "reads into guest memory"),
    call!(SYS_pwritev, "writes from guest memory"),
    call!(SYS_pwrite64, "zeroes where the file system cannot"),
    call!(SYS_fdatasync, "flush"),
    call!(SYS_fsync, "flush"),
    call!(SYS_fallocate, "discard and write zeroes"),
];

const NET: &[Call] = &[
    call!(SYS_readv, "frames into guest memory"),
    call!(SYS_writev, "frames from guest memory"),
    call!(
        SYS_ioctl,
        "the tap learns which offloads the guest takes",
        arg!(1 is TUNSETOFFLOAD)
    ),
];

const FS: &[Call] = &[
    call!(
        SYS_openat,
        "lookups, opens and creations; descriptors by /proc/self/fd"
    ),
    call!(SYS_newfstatat, "attributes"),
    call!(SYS_fstat, "attributes"),
    call!(SYS_statx, "attributes"),
    call!(SYS_fstatfs, "statfs"),
    call!(SYS_getdents64, "directories"),
    call!(SYS_lseek, "directories; SEEK_DATA and SEEK_HOLE"),
    call!(SYS_readlinkat, "symbolic links"),
    call!(SYS_readv, "reads into guest memory"),
    call!(SYS_pread64, "reads"),
    call!(SYS_preadv, "reads into guest memory"),
    call!(SYS_preadv2, "reads into guest memory"),
    call!(SYS_writev, "writes from guest memory"),
    call!(SYS_pwrite64, "writes"),
    call!(SYS_pwritev, "writes from guest memory"),
    call!(SYS_pwritev2, "writes from guest memory"),
    call!(SYS_ftruncate, "size"),
    call!(SYS_fallocate, "fallocate"),
    call!(SYS_fsync, "fsync"),
    call!(SYS_fdatasync, "fsync"),
    call!(SYS_mkdirat, "mkdir"),
    call!(
        SYS_mknodat,
        "fifos and sockets; overlay whiteouts; devices need a capability that is gone"
    ),
    call!(SYS_symlinkat, "symlink"),
    call!(SYS_linkat, "link"),
    call!(SYS_unlinkat, "unlink and rmdir"),
    call!(SYS_renameat2, "rename"),
    call!(SYS_fchmod, "chmod"),
    call!(SYS_fchmodat, "chmod"),
    call!(SYS_fchownat, "chown"),
    call!(SYS_utimensat, "times"),
    call!(SYS_setxattr, "extended attributes"),
    call!(SYS_getxattr, "extended attributes"),
    call!(SYS_listxattr, "extended attributes"),
    call!(SYS_removexattr, "extended attributes"),
    call!(SYS_setresuid, "creations in the name of the guest's user"),
    call!(SYS_setresgid, "creations in the name of the guest's user"),
    call!(
        SYS_capget,
        "CAP_FSETID dropped while a write clears set-user-id"
    ),
    call!(SYS_capset, "as capget"),
    call!(SYS_umask, "modes are the guest's"),
    call!(SYS_dup, "flush"),
    call!(
        SYS_fcntl,
        "flags of an open file; duplicates; vhost-user: the seals of guest memory",
        arg!(1 is libc::F_GETFD),
        arg!(1 is libc::F_GETFL),
        arg!(1 is libc::F_SETFL),
        arg!(1 is libc::F_GET_SEALS),
        arg!(1 is libc::F_DUPFD_CLOEXEC)
    ),
];

const VHOST_USER_MAIN: &[Call] = &[
    call!(
        SYS_pidfd_send_signal,
        "the companion, the only process there is a descriptor of: paused, continued and ended"
    ),
    call!(
        SYS_waitid,
        "the companion has stopped or ended",
        arg!(0 is libc::P_PIDFD)
    ),
];

const VHOST_USER_FS: &[Call] = &[
    call!(SYS_recvmsg, "vhost-user: requests and their descriptors"),
    call!(SYS_sendmsg, "vhost-user: replies"),
];

const KVM_RUN: u32 = kvm(NONE, 0x80, 0);
const KVM_GET_REGS: u32 = kvm(READ, 0x81, size_of::<kvm_regs>());
const KVM_SET_REGS: u32 = kvm(WRITE, 0x82, size_of::<kvm_regs>());
const KVM_GET_SREGS: u32 = kvm(READ, 0x83, size_of::<kvm_sregs>());
const KVM_SET_SREGS: u32 = kvm(WRITE, 0x84, size_of::<kvm_sregs>());
const KVM_GET_VCPU_EVENTS: u32 = kvm(READ, 0x9f, size_of::<kvm_vcpu_events>());
const KVM_SET_VCPU_EVENTS: u32 = kvm(WRITE, 0xa0, size_of::<kvm_vcpu_events>());
const KVM_GET_XSAVE: u32 = kvm(READ, 0xa4, size_of::<kvm_xsave>());
const KVM_SET_XSAVE: u32 = kvm(WRITE, 0xa5, size_of::<kvm_xsave>());

const KVM_GET_MSRS: u32 = kvm(READ | WRITE, 0x88, size_of::<kvm_msrs>());
const KVM_GET_LAPIC: u32 = kvm(READ, 0x8e, size_of::<kvm_lapic_state>());
const KVM_GET_MP_STATE: u32 = kvm(READ, 0x98, size_of::<kvm_mp_state>());
const KVM_GET_DEBUGREGS: u32 = kvm(READ, 0xa1, size_of::<kvm_debugregs>());
const KVM_GET_XCRS: u32 = kvm(READ, 0xa6, size_of::<kvm_xcrs>());
const KVM_GET_IRQCHIP: u32 = kvm(READ | WRITE, 0x62, size_of::<kvm_irqchip>());
const KVM_GET_CLOCK: u32 = kvm(READ, 0x7c, size_of::<kvm_clock_data>());
const KVM_GET_PIT2: u32 = kvm(READ, 0x9f, size_of::<kvm_pit_state2>());

/// `_IOW('T', 208, unsigned int)` of `linux/if_tun.h`.
const TUNSETOFFLOAD: u32 = 0x4004_54d0;

const NONE: u32 = 0;
const WRITE: u32 = 1;
const READ: u32 = 2;

/// A KVM request as `asm-generic/ioctl.h` puts it together.
const fn kvm(direction: u32, number: u32, bytes: usize) -> u32 {
    const KVMIO: u32 = 0xae;
    direction << 30 | (bytes as u32) << 16 | KVMIO << 8 | number
}
