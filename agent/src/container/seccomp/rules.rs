//! The spec's rules, in two parts: those that a tree of ranges answers, and those that libseccomp compiles.

use std::collections::{BTreeMap, HashMap};
use std::io::{Read, Seek};

use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
};
use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompArg, LinuxSeccompOperator};

use super::ranges::{Table, in_front_of};
use super::{AUDIT_ARCH, AUDIT_ARCH_I386, AUDIT_ARCH_X86_64, NATIVE, action, failure};
use crate::container::Result;

/// Length of struct sock_filter.
const INSTRUCTION: usize = 8;
/// System calls that 32-bit x86 has two ways to call: by themselves, and as an argument of `socketcall` or `ipc`. A rule for
/// one is conditional there.
const TWO_WAYS: [&str; 34] = [
    "accept",
    "accept4",
    "bind",
    "connect",
    "getpeername",
    "getsockname",
    "getsockopt",
    "ipc",
    "listen",
    "msgctl",
    "msgget",
    "msgrcv",
    "msgsnd",
    "recv",
    "recvfrom",
    "recvmmsg",
    "recvmsg",
    "semctl",
    "semget",
    "semop",
    "semtimedop",
    "send",
    "sendmmsg",
    "sendmsg",
    "sendto",
    "setsockopt",
    "shmat",
    "shmctl",
    "shmdt",
    "shmget",
    "shutdown",
    "socket",
    "socketcall",
    "socketpair",
];

/// The rules that say something else than the default, sorted by how they can be compiled.
pub(super) struct Rules<'a> {
    /// The only word on their system calls, whatever the arguments.
    pub(super) plain: Vec<(&'a str, ScmpAction)>,
    /// The others, in the spec's order.
    pub(super) others: Vec<(&'a str, ScmpAction, &'a [LinuxSeccompArg])>,
}

impl<'a> Rules<'a> {
    /// For architectures with [`TWO_WAYS`], or for others.
    pub(super) fn new(spec: &'a LinuxSeccomp, default: ScmpAction, two_ways: bool) -> Result<Self> {
        let mut all = Vec::new();
        for rule in spec.syscalls().iter().flatten() {
            let action = action(rule.action(), rule.errno_ret())?;
            if action == default {
                // libseccomp refuses a rule that says what the default says already.
                continue;
            }
            let args = rule.args().as_deref().unwrap_or_default();
            all.extend(
                rule.names()
                    .iter()
                    .map(|name| (name.as_str(), action, args)),
            );
        }
        let mut times = HashMap::<&str, usize>::new();
        for (name, _, _) in &all {
            let times = times.entry(*name).or_default();
            *times = times.saturating_add(1);
        }
        let is_plain = |name: &str, args: &[LinuxSeccompArg]| {
            let conditional = two_ways && TWO_WAYS.contains(&name);
            args.is_empty() && times.get(name) == Some(&1) && !conditional
        };
        let (plain, others): (Vec<_>, Vec<_>) = all
            .into_iter()
            .partition(|(name, _, args)| is_plain(name, args));
        Ok(Self {
            plain: plain
                .into_iter()
                .map(|(name, action, _)| (name, action))
                .collect(),
            others,
        })
    }

    /// The program for these architectures: a tree for the plain ones, libseccomp's for the others.
    pub(super) fn compile(
        &self,
        default: ScmpAction,
        architectures: &[ScmpArch],
    ) -> Result<Vec<libc::sock_filter>> {
        let others = self.conditional(default, architectures)?;
        Ok(in_front_of(&others, &self.tables(architectures)))
    }

    /// The plain ones' verdicts, by architecture. 32-bit pointers on x86_64 (x32) are no architecture of their own to the
    /// kernel: their numbers have a bit of their own.
    fn tables(&self, architectures: &[ScmpArch]) -> BTreeMap<u32, Table> {
        let mut tables = BTreeMap::<u32, Table>::new();
        for arch in architectures {
            let audit = match arch {
                arch if *arch == NATIVE => AUDIT_ARCH,
                ScmpArch::X8664 | ScmpArch::X32 => AUDIT_ARCH_X86_64,
                ScmpArch::X86 => AUDIT_ARCH_I386,
                // Left to libseccomp, as the others on another machine are.
                _ => continue,
            };
            let table = tables.entry(audit).or_default();
            for (name, action) in &self.plain {
                // A profile may name system calls that this libseccomp does not know, or that this architecture does not
                // have, whose numbers are negative: they fall under the default.
                let number = ScmpSyscall::from_name_by_arch(name, *arch)
                    .ok()
                    .and_then(|syscall| u32::try_from(syscall.as_raw_syscall()).ok());
                if let Some(number) = number {
                    table.set(number, verdict(*action));
                }
            }
        }
        tables
    }

    /// The other ones' program, which also knows the default and what to do with foreign architectures.
    pub(super) fn conditional(
        &self,
        default: ScmpAction,
        architectures: &[ScmpArch],
    ) -> Result<Vec<libc::sock_filter>> {
        let mut context = ScmpFilterContext::new(default).map_err(failure("making a filter"))?;
        context
            .set_ctl_nnp(false)
            .map_err(failure("leaving no_new_privs to the process"))?;
        // A tree instead of a list: for each system call that there is the kernel tries the filter once when it is
        // installed, which for a list of hundreds costs millions of instructions.
        context
            .set_ctl_optimize(2)
            .map_err(failure("making the filter a tree"))?;
        for arch in architectures {
            context
                .add_arch(*arch)
                .map_err(failure(format!("adding architecture {arch:?}")))?;
        }
        // It is there from the beginning.
        if !architectures.contains(&NATIVE) {
            context
                .remove_arch(NATIVE)
                .map_err(failure("removing this machine's architecture"))?;
        }
        for (name, action, args) in &self.others {
            // As above.
            let Ok(syscall) = ScmpSyscall::from_name(name) else {
                continue;
            };
            add_syscall(&mut context, *action, syscall, args)
                .map_err(failure(format!("adding a rule for {name}")))?;
        }
        export(&context)
    }
}

/// What a filter returns for `action`, by seccomp(2).
fn verdict(action: ScmpAction) -> u32 {
    match action {
        ScmpAction::KillProcess => libc::SECCOMP_RET_KILL_PROCESS,
        ScmpAction::Trap => libc::SECCOMP_RET_TRAP,
        ScmpAction::Errno(errno) => {
            libc::SECCOMP_RET_ERRNO | errno.unsigned_abs() & libc::SECCOMP_RET_DATA
        }
        ScmpAction::Trace(data) => libc::SECCOMP_RET_TRACE | u32::from(data),
        ScmpAction::Log => libc::SECCOMP_RET_LOG,
        ScmpAction::Allow => libc::SECCOMP_RET_ALLOW,
        // Also for an action that a later libseccomp may have: nothing is let through that nobody knows.
        _ => libc::SECCOMP_RET_KILL_THREAD,
    }
}

/// libseccomp takes each argument once a rule: conditions on the same argument become rules of their own, any of
/// which suffices, as runc has it.
fn add_syscall(
    context: &mut ScmpFilterContext,
    action: ScmpAction,
    syscall: ScmpSyscall,
    args: &[LinuxSeccompArg],
) -> std::result::Result<(), libseccomp::error::SeccompError> {
    let conditions: Vec<ScmpArgCompare> = args.iter().map(condition).collect();
    let mut seen = [false; 6];
    let repeated = args.iter().any(|arg| {
        seen.get_mut(arg.index())
            .is_some_and(|seen| std::mem::replace(seen, true))
    });
    if repeated {
        for condition in conditions {
            context.add_rule_conditional(action, syscall, &[condition])?;
        }
    } else if conditions.is_empty() {
        context.add_rule(action, syscall)?;
    } else {
        context.add_rule_conditional(action, syscall, &conditions)?;
    }
    Ok(())
}

fn condition(arg: &LinuxSeccompArg) -> ScmpArgCompare {
    let value_two = arg.value_two().unwrap_or(0);
    let (op, datum) = match arg.op() {
        LinuxSeccompOperator::ScmpCmpNe => (ScmpCompareOp::NotEqual, arg.value()),
        LinuxSeccompOperator::ScmpCmpLt => (ScmpCompareOp::Less, arg.value()),
        LinuxSeccompOperator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, arg.value()),
        LinuxSeccompOperator::ScmpCmpEq => (ScmpCompareOp::Equal, arg.value()),
        LinuxSeccompOperator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, arg.value()),
        LinuxSeccompOperator::ScmpCmpGt => (ScmpCompareOp::Greater, arg.value()),
        // The spec's `value` is the mask and `valueTwo` what must remain.
        LinuxSeccompOperator::ScmpCmpMaskedEq => {
            (ScmpCompareOp::MaskedEqual(arg.value()), value_two)
        }
    };
    ScmpArgCompare::new(u32::try_from(arg.index()).unwrap_or(u32::MAX), op, datum)
}

/// The program as the kernel takes it.
fn export(context: &ScmpFilterContext) -> Result<Vec<libc::sock_filter>> {
    let memfd = rustix::fs::memfd_create(c"seccomp", rustix::fs::MemfdFlags::CLOEXEC)
        .map_err(failure("making a buffer for the program"))?;
    context
        .export_bpf(&memfd)
        .map_err(failure("compiling the program"))?;
    let mut file = std::fs::File::from(memfd);
    let mut bytes = Vec::new();
    file.rewind()
        .and_then(|()| file.read_to_end(&mut bytes))
        .map_err(failure("reading the program"))?;
    Ok(bytes
        .chunks_exact(INSTRUCTION)
        .filter_map(|chunk| <[u8; INSTRUCTION]>::try_from(chunk).ok())
        .map(|[c0, c1, jt, jf, k0, k1, k2, k3]| libc::sock_filter {
            code: u16::from_ne_bytes([c0, c1]),
            jt,
            jf,
            k: u32::from_ne_bytes([k0, k1, k2, k3]),
        })
        .collect())
}
