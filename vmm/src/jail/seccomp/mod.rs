//! The system calls that each kind of thread may make. Every other one ends the process with `SIGSYS`.
//!
//! The filters are data, in `tables`; `filters.txt` beside it is their rendering, which a test compares, so that a
//! review sees every addition. To find a call that is missing: the kernel logs the number (`dmesg`, `audit: type=1326
//! ... syscall=N`), and a debug build that is started with `CELLA_SECCOMP_REPORT=1` in its environment names the kind
//! of thread and the number on stderr before it exits.

#[cfg(debug_assertions)]
mod report;
mod tables;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use self::tables::{Call, Check};
use super::{JailError, ThreadKind};

/// Looks whether a debug build shall name the calls that it is killed for; nothing in a release build.
pub(super) fn prepare_report() -> Result<(), JailError> {
    #[cfg(debug_assertions)]
    report::prepare()?;
    Ok(())
}

/// Installs the calling thread's filter.
pub(super) fn install(kind: ThreadKind) -> Result<(), JailError> {
    let filter =
        program(kind, otherwise(kind)).map_err(|source| JailError::Filter { kind, source })?;
    seccompiler::apply_filter(&filter).map_err(|source| JailError::Install { kind, source })
}

/// What happens to a call that no table has.
#[cfg(debug_assertions)]
fn otherwise(kind: ThreadKind) -> SeccompAction {
    if report::is_wanted(kind) {
        return SeccompAction::Trap;
    }
    SeccompAction::KillProcess
}

/// What happens to a call that no table has.
#[cfg(not(debug_assertions))]
fn otherwise(_kind: ThreadKind) -> SeccompAction {
    SeccompAction::KillProcess
}

fn program(
    kind: ThreadKind,
    otherwise: SeccompAction,
) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for call in tables::of(kind) {
        rules.insert(call.number, alternatives(call)?);
    }
    let target = TargetArch::try_from(std::env::consts::ARCH)?;
    SeccompFilter::new(rules, otherwise, SeccompAction::Allow, target)?.try_into()
}

/// One rule for each check: any of them allows the call. None: the call is allowed with every argument.
fn alternatives(call: &Call) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    call.checks.iter().map(rule).collect()
}

fn rule(check: &Check) -> Result<SeccompRule, seccompiler::BackendError> {
    let masked = SeccompCmpOp::MaskedEq(u64::from(check.mask));
    SeccompRule::new(vec![SeccompCondition::new(
        check.argument,
        SeccompCmpArgLen::Dword,
        masked,
        u64::from(check.value),
    )?])
}
