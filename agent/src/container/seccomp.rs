//! The system call filter: the spec's rules, compiled to a BPF program before the process exists. What rules say of a system
//! call whatever its arguments are becomes a tree ([`ranges`]); the others are libseccomp's to compile.

mod ranges;
mod rules;

use std::sync::Arc;

use libseccomp::{ScmpAction, ScmpArch, ScmpSyscall};
use oci_spec::runtime::{Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompFilterFlag};

use self::ranges::{either, instruction};
use self::rules::Rules;
use super::kept::Kept;
use super::{Error, Result};

/// No Linux has system call numbers near this yet; the search for the newest known name starts here.
const NUMBER_LIMIT: i32 = 600;
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
const AUDIT_ARCH_I386: u32 = 0x4000_0003;
#[cfg(target_arch = "x86_64")]
const NATIVE: ScmpArch = ScmpArch::X8664;
#[cfg(target_arch = "x86_64")]
const AUDIT_ARCH: u32 = AUDIT_ARCH_X86_64;
#[cfg(target_arch = "aarch64")]
const NATIVE: ScmpArch = ScmpArch::Aarch64;
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
        #[cfg(target_env = "gnu")]
        // SAFETY: gives free memory of the C library back.
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
        // What 32-bit x86 has two ways to call is plain elsewhere.
        let (two_ways, one_way): (Vec<_>, Vec<_>) = architectures(spec)?
            .into_iter()
            .partition(|arch| *arch == ScmpArch::X86);
        let mut program = Rules::new(spec, default, false)?.compile(default, &one_way)?;
        if !two_ways.is_empty() {
            let of_i386 = Rules::new(spec, default, true)?.compile(default, &two_ways)?;
            program = either(AUDIT_ARCH_I386, &of_i386, &program);
        }
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

/// Those of the spec, and this machine's, which every filter has.
fn architectures(spec: &LinuxSeccomp) -> Result<Vec<ScmpArch>> {
    let mut all = vec![NATIVE];
    for arch in spec.architectures().iter().flatten() {
        let arch = architecture(*arch)?;
        if !all.contains(&arch) {
            all.push(arch);
        }
    }
    Ok(all)
}

fn architecture(arch: Arch) -> Result<ScmpArch> {
    Ok(match arch {
        Arch::ScmpArchNative => NATIVE,
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
    use ranges::{ARCHITECTURE, JUMP_EQUAL, JUMP_GREATER, LOAD, NUMBER, RETURN};
    const X32_BIT: u32 = 0x4000_0000;
    let newest = newest_known();
    let no_such_call = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs();
    let mut result = vec![
        instruction(LOAD, 0, 0, ARCHITECTURE),
        instruction(JUMP_EQUAL, 0, 4, AUDIT_ARCH),
        instruction(LOAD, 0, 0, NUMBER),
        instruction(JUMP_GREATER, 2, 0, X32_BIT - 1),
        instruction(JUMP_GREATER, 0, 1, newest),
        instruction(RETURN, 0, 0, no_such_call),
    ];
    result.extend(program);
    result
}

#[cfg(test)]
mod tests;
