//! The system call filter: the spec's rules, compiled by libseccomp to a BPF program before the process exists.

use std::io::{Read, Seek};
use std::sync::Arc;

use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator, LinuxSyscall,
};

use super::kept::Kept;
use super::{Error, Result};

/// Length of struct sock_filter.
const INSTRUCTION: usize = 8;
/// No Linux has system call numbers near this yet; the search for the newest known name starts here.
const NUMBER_LIMIT: i32 = 600;
#[cfg(target_arch = "x86_64")]
const AUDIT_ARCH: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const AUDIT_ARCH: u32 = 0xc000_00b7;

/// A compiled filter.
#[derive(Clone, Debug)]
pub(super) struct SeccompPlan {
    pub program: Vec<libc::sock_filter>,
    /// Flags of seccomp(2).
    pub flags: u64,
}

fn failure<E>(step: impl Into<String>) -> impl FnOnce(E) -> Error
where
    E: std::error::Error + Send + Sync + 'static,
{
    let step = step.into();
    move |e| Error::Seccomp {
        step,
        source: Box::new(e),
    }
}

/// Filters that need not be compiled again.
pub(super) type Filters = Kept<LinuxSeccomp, Arc<SeccompPlan>>;

impl SeccompPlan {
    /// Compiles the spec's rules.
    pub(super) fn new(spec: &LinuxSeccomp) -> Result<Self> {
        let compiled = Self::compile(spec);
        // The compiler needs a megabyte for hundreds of rules, which the guest is to have back.
        // SAFETY: gives free memory of the C library back.
        #[cfg(target_env = "gnu")]
        unsafe {
            libc::malloc_trim(0);
        }
        compiled
    }

    fn compile(spec: &LinuxSeccomp) -> Result<Self> {
        if spec.listener_path().is_some() {
            return Err(Error::unsupported(
                "linux.seccomp.listenerPath",
                "a notification socket would have to cross the sandbox's wall",
            ));
        }
        let default = action(spec.default_action(), spec.default_errno_ret())?;
        let mut context = ScmpFilterContext::new(default).map_err(failure("making a filter"))?;
        context
            .set_ctl_nnp(false)
            .map_err(failure("leaving no_new_privs to the process"))?;
        // A tree instead of a list: for each system call that there is the kernel tries the filter once when it is
        // installed, which for a list of hundreds costs millions of instructions.
        context
            .set_ctl_optimize(2)
            .map_err(failure("making the filter a tree"))?;
        for arch in spec.architectures().iter().flatten() {
            let arch = architecture(*arch)?;
            context
                .add_arch(arch)
                .map_err(failure(format!("adding architecture {arch:?}")))?;
        }
        for syscall in spec.syscalls().iter().flatten() {
            add_rule(&mut context, default, syscall)?;
        }
        let mut program = export(&context)?;
        if let ScmpAction::Errno(errno) = default
            && errno != libc::ENOSYS
        {
            program = with_enosys_stub(program);
        }
        Ok(Self {
            program,
            flags: flags(spec.flags().as_deref().unwrap_or_default())?,
        })
    }
}

fn flags(flags: &[LinuxSeccompFilterFlag]) -> Result<u64> {
    let mut result = 0u64;
    for flag in flags {
        result |= match flag {
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync => libc::SECCOMP_FILTER_FLAG_TSYNC,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => {
                libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW
            }
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => {
                return Err(Error::unsupported(
                    "linux.seccomp.flags",
                    "WAIT_KILLABLE_RECV goes with notifications, which are not supported",
                ));
            }
        };
    }
    Ok(result)
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<ScmpAction> {
    let value = errno.unwrap_or(libc::EPERM.unsigned_abs());
    let value = u16::try_from(value)
        .map_err(|_| Error::invalid("linux.seccomp errnoRet", format!("{value} is above 65535")))?;
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => {
            ScmpAction::KillThread
        }
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno(i32::from(value)),
        LinuxSeccompAction::ScmpActTrace => ScmpAction::Trace(value),
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        LinuxSeccompAction::ScmpActNotify => {
            return Err(Error::unsupported(
                "linux.seccomp",
                "SCMP_ACT_NOTIFY needs a listener, which would be outside of the sandbox",
            ));
        }
    })
}

fn add_rule(
    context: &mut ScmpFilterContext,
    default: ScmpAction,
    rule: &LinuxSyscall,
) -> Result<()> {
    let action = action(rule.action(), rule.errno_ret())?;
    if action == default {
        // libseccomp refuses a rule that says what the default says already.
        return Ok(());
    }
    let args = rule.args().as_deref().unwrap_or_default();
    for name in rule.names() {
        // A profile may name system calls that this libseccomp does not know; they fall under the default.
        let Ok(syscall) = ScmpSyscall::from_name(name) else {
            continue;
        };
        add_syscall(context, action, syscall, args)
            .map_err(failure(format!("adding a rule for {name}")))?;
    }
    Ok(())
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

fn architecture(arch: Arch) -> Result<ScmpArch> {
    Ok(match arch {
        Arch::ScmpArchNative => ScmpArch::Native,
        Arch::ScmpArchX86 => ScmpArch::X86,
        Arch::ScmpArchX86_64 => ScmpArch::X8664,
        Arch::ScmpArchX32 => ScmpArch::X32,
        Arch::ScmpArchArm => ScmpArch::Arm,
        Arch::ScmpArchAarch64 => ScmpArch::Aarch64,
        other => {
            return Err(Error::unsupported(
                "linux.seccomp.architectures",
                format!("{other} does not run on this machine"),
            ));
        }
    })
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

/// The newest system call that libseccomp knows by name.
fn newest_known() -> u32 {
    static NEWEST: std::sync::OnceLock<u32> = std::sync::OnceLock::new();
    *NEWEST.get_or_init(|| {
        (0..NUMBER_LIMIT)
            .rev()
            .find(|number| ScmpSyscall::from_raw_syscall(*number).get_name().is_ok())
            .and_then(|number| u32::try_from(number).ok())
            .unwrap_or(u32::MAX)
    })
}

/// Puts in front of the program: native system calls newer than every name a profile could mean fail with ENOSYS, so
/// that C libraries fall back to the older call, where the default EPERM would make them give up.
fn with_enosys_stub(program: Vec<libc::sock_filter>) -> Vec<libc::sock_filter> {
    const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
    const JUMP_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
    const JUMP_GREATER: u16 = 0x25; // BPF_JMP | BPF_JGT | BPF_K
    const RETURN: u16 = 0x06; // BPF_RET | BPF_K
    const RET_ERRNO: u32 = 0x0005_0000;
    const X32_BIT: u32 = 0x4000_0000;
    let newest = newest_known();
    let instruction = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut result = vec![
        // seccomp_data: the number at offset 0, the architecture at 4.
        instruction(LOAD, 0, 0, 4),
        instruction(JUMP_EQUAL, 0, 4, AUDIT_ARCH),
        instruction(LOAD, 0, 0, 0),
        instruction(JUMP_GREATER, 2, 0, X32_BIT - 1),
        instruction(JUMP_GREATER, 0, 1, newest),
        instruction(RETURN, 0, 0, RET_ERRNO | libc::ENOSYS.unsigned_abs()),
    ];
    result.extend(program);
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(json: &str) -> Result<SeccompPlan> {
        SeccompPlan::new(&serde_json::from_str(json).unwrap())
    }

    /// Runs a seccomp program (loads, compares, jumps, masks and returns) on a system call.
    fn run(program: &[libc::sock_filter], nr: u32, arch: u32, args: [u64; 6]) -> u32 {
        let mut data = Vec::new();
        data.extend(nr.to_ne_bytes());
        data.extend(arch.to_ne_bytes());
        data.extend([0u8; 8]);
        for arg in args {
            data.extend(arg.to_ne_bytes());
        }
        let (mut pc, mut a) = (0usize, 0u32);
        let mut scratch = [0u32; 16];
        let mut x = 0u32;
        loop {
            let i = program[pc];
            pc += 1;
            let mut jump = |taken: bool| pc += usize::from(if taken { i.jt } else { i.jf });
            match i.code {
                0x20 => {
                    let at = i.k as usize;
                    a = u32::from_ne_bytes(data[at..at + 4].try_into().unwrap());
                }
                0x15 => jump(a == i.k),
                0x25 => jump(a > i.k),
                0x35 => jump(a >= i.k),
                0x45 => jump(a & i.k != 0),
                0x05 => pc += i.k as usize,
                0x54 => a &= i.k,
                0x02 => scratch[i.k as usize] = a,
                0x60 => a = scratch[i.k as usize],
                0x07 => x = a,
                0x87 => a = x,
                0x06 => return i.k,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    const ALLOW: u32 = 0x7fff_0000;
    const ERRNO: u32 = 0x0005_0000;

    #[test]
    fn rules_conditions_and_the_default() {
        let plan = plan(
            r#"{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X86"],
            "syscalls":[{"names":["read","no_such_call"],"action":"SCMP_ACT_ALLOW"},
            {"names":["mkdir"],"action":"SCMP_ACT_ERRNO","errnoRet":13},
            {"names":["personality"],"action":"SCMP_ACT_ALLOW",
             "args":[{"index":0,"value":8,"op":"SCMP_CMP_EQ"},{"index":0,"value":0,"op":"SCMP_CMP_EQ"}]}]}"#,
        )
        .unwrap();
        let of = |nr: i64, args| run(&plan.program, nr as u32, AUDIT_ARCH, args);
        assert_eq!(of(libc::SYS_read, [0; 6]), ALLOW);
        assert_eq!(of(libc::SYS_mkdir, [0; 6]), ERRNO | 13);
        assert_eq!(of(libc::SYS_write, [0; 6]), ERRNO | 1);
        assert_eq!(of(libc::SYS_personality, [8, 0, 0, 0, 0, 0]), ALLOW);
        assert_eq!(of(libc::SYS_personality, [0; 6]), ALLOW);
        assert_eq!(of(libc::SYS_personality, [4, 0, 0, 0, 0, 0]), ERRNO | 1);
        assert_eq!(
            of(590, [0; 6]),
            ERRNO | 38,
            "a call nobody knows yet is ENOSYS"
        );
        // i386's read is number 3.
        assert_eq!(run(&plan.program, 3, 0x4000_0003, [0; 6]), ALLOW);
    }

    #[test]
    fn masks_compare_what_remains() {
        let plan = plan(
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["clone"],"action":"SCMP_ACT_ERRNO",
            "args":[{"index":0,"value":2114060288,"valueTwo":0,"op":"SCMP_CMP_MASKED_EQ"}]}]}"#,
        )
        .unwrap();
        let of = |flags| {
            run(
                &plan.program,
                libc::SYS_clone as u32,
                AUDIT_ARCH,
                [flags, 0, 0, 0, 0, 0],
            )
        };
        assert_eq!(of(0x11), ERRNO | 1);
        assert_eq!(of(0x1000_0000), ALLOW);
    }

    #[test]
    fn notifications_are_refused() {
        let error = plan(
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir"],"action":"SCMP_ACT_NOTIFY"}]}"#,
        )
        .unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        assert!(plan(r#"{"defaultAction":"SCMP_ACT_ALLOW","listenerPath":"/x"}"#).is_err());
    }
}
