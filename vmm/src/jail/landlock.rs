//! What may still be opened: a second wall behind the private root, where the host's kernel has Landlock.
//!
//! The whole process gets a domain that holds only `/share` and `/vsock`, and every thread but the file server one
//! more that holds nothing (main: connections to the sockets of `/vsock`).

use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd,
    Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetStatus, Scope,
};

use super::{Jail, JailError, ThreadKind, root};

/// The newest version whose rights are all known here; what an older kernel lacks is left out.
const NEWEST: ABI = ABI::V9;

/// How much of the Landlock that this VMM asks for the host's kernel has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Landlock {
    /// All of it.
    Full,
    /// An older version.
    Partial,
    /// None, or version 1 under a file server: the private root, the capabilities and seccomp stand alone.
    Absent,
}

impl From<RulesetStatus> for Landlock {
    fn from(status: RulesetStatus) -> Self {
        match status {
            RulesetStatus::FullyEnforced => Self::Full,
            RulesetStatus::PartiallyEnforced => Self::Partial,
            RulesetStatus::NotEnforced => Self::Absent,
        }
    }
}

/// Restricts this thread, and all that it will create, to the shared directory and the sockets. The paths are those of
/// the private root.
pub(super) fn restrict_process(jail: &Jail) -> Result<Landlock, JailError> {
    let mut ruleset = Ruleset::default();
    if jail.share.is_some() {
        // Version 1 forbids every rename and link between directories: a file server does better without.
        ruleset = ruleset
            .set_compatibility(CompatLevel::SoftRequirement)
            .handle_access(AccessFs::Refer)?
            .set_compatibility(CompatLevel::BestEffort);
    }
    let mut scope = Scope::from_all(NEWEST);
    if jail.companion.is_some() {
        // It has a domain of its own, and is paused by a signal. Nobody else can be signalled: nobody else has a
        // process id in the jail's pid namespace.
        scope &= !Scope::Signal;
    }
    let mut rules = ruleset
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(scope)?
        .create()?;
    if jail.share.is_some() {
        rules = allow(rules, super::SHARE, file_server())?;
        rules = allow(rules, root::MOUNTINFO, AccessFs::ReadFile.into())?;
    }
    if jail.sockets.is_some() {
        rules = allow(rules, super::SOCKETS, AccessFs::ResolveUnix.into())?;
    }
    Ok(rules.restrict_self()?.ruleset.into())
}

/// Takes from the calling thread what [`restrict_process`] has left for the file server.
pub(super) fn restrict_thread(kind: ThreadKind) -> Result<(), JailError> {
    let mut rules = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))?
        .create()?;
    let connects = matches!(kind, ThreadKind::Main | ThreadKind::VhostUserMain);
    if connects && Path::new(super::SOCKETS).is_dir() {
        rules = allow(rules, super::SOCKETS, AccessFs::ResolveUnix.into())?;
    }
    rules.restrict_self()?;
    Ok(())
}

/// Restricts the companion, for good, to reading and executing what its root holds.
pub(super) fn restrict_companion() -> Result<(), JailError> {
    let rules = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?;
    allow(rules, "/", AccessFs::from_read(NEWEST))?.restrict_self()?;
    Ok(())
}

/// All that a file server does; executing, devices and their ioctls are nothing of it.
fn file_server() -> BitFlags<AccessFs> {
    let not = AccessFs::Execute | AccessFs::MakeBlock | AccessFs::IoctlDev | AccessFs::ResolveUnix;
    AccessFs::from_all(NEWEST) & !not
}

fn allow(
    rules: RulesetCreated,
    path: &str,
    access: BitFlags<AccessFs>,
) -> Result<RulesetCreated, JailError> {
    Ok(rules.add_rule(PathBeneath::new(PathFd::new(path)?, access))?)
}
