//! User and group ids, and capabilities. All of this is per thread in the kernel; the calls used here are too.

use rustix::process::DumpableBehavior;
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, Gid, Uid, set_capabilities,
    set_capabilities_secure_bits, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

use super::JailError;
use super::error::{Doing, check};

/// What the file server needs to act as the guest's users. They hold in the jail's own user namespace, so they reach
/// what is mounted there, the shared directory, and nothing else of the host.
const FILE_SERVER: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID)
    // File capabilities: packages are installed in containers.
    .union(CapabilitySet::SETFCAP);

/// No program that is executed gains anything; also what lets a thread without capabilities restrict itself.
pub(super) fn forbid_new_privileges() -> Result<(), JailError> {
    rustix::thread::set_no_new_privs(true).doing("setting no_new_privs")
}

/// Gives up root: the ids, every capability but those that `confine` will give the file server (not in effect until
/// then, and only if there is one), and the ways back.
pub(super) fn become_unprivileged(uid: u32, gid: u32, serves_files: bool) -> Result<(), JailError> {
    drop_bounding_set()?;
    // Ids and capabilities have nothing to do with each other from now on, and root is a user as any other.
    set_capabilities_secure_bits(
        CapabilitiesSecureBits::NO_ROOT
            | CapabilitiesSecureBits::NO_ROOT_LOCKED
            | CapabilitiesSecureBits::NO_SETUID_FIXUP
            | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
            | CapabilitiesSecureBits::KEEP_CAPS_LOCKED
            | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
            | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED,
    )
    .doing("separating ids and capabilities")?;
    set_ids(uid, gid)?;
    let permitted = if serves_files {
        FILE_SERVER
    } else {
        CapabilitySet::empty()
    };
    set_sets(permitted, CapabilitySet::empty())?;
    // After the change of ids, which resets it to the system's default.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .doing("forbidding core dumps and tracing")
}

/// Takes the last capabilities from the calling thread.
pub(super) fn drop_capabilities() -> Result<(), JailError> {
    set_sets(CapabilitySet::empty(), CapabilitySet::empty())
}

/// Makes the calling thread root of the jail's user namespace, with the file capabilities in effect.
pub(super) fn become_file_server() -> Result<(), JailError> {
    set_sets(FILE_SERVER, FILE_SERVER)?;
    set_ids(0, 0)
}

fn set_ids(uid: u32, gid: u32) -> Result<(), JailError> {
    let (uid_, gid_) = (Uid::from_raw(uid), Gid::from_raw(gid));
    // Only root of the start has groups to give up, and only it may.
    if !rustix::process::getgroups()
        .doing("reading the supplementary groups")?
        .is_empty()
    {
        set_thread_groups(&[]).doing("leaving the supplementary groups")?;
    }
    set_thread_res_gid(gid_, gid_, gid_).doing(format!("becoming group {gid}"))?;
    set_thread_res_uid(uid_, uid_, uid_).doing(format!("becoming user {uid}"))
}

fn set_sets(permitted: CapabilitySet, effective: CapabilitySet) -> Result<(), JailError> {
    let sets = CapabilitySets {
        effective,
        permitted,
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, sets).doing(format!("reducing the capabilities to {permitted:?}"))
}

fn drop_bounding_set() -> Result<(), JailError> {
    rustix::thread::clear_ambient_capability_set().doing("clearing the ambient capabilities")?;
    for capability in 0..64 {
        // SAFETY: no memory operands. All arguments are passed as long, which the kernel reads.
        let result = check(unsafe {
            libc::prctl(
                libc::PR_CAPBSET_DROP,
                capability as libc::c_ulong,
                0 as libc::c_ulong,
                0 as libc::c_ulong,
                0 as libc::c_ulong,
            )
        });
        match result {
            // One past the last capability that this kernel knows.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => break,
            other => other
                .map(drop)
                .doing(format!("dropping capability {capability} for good"))?,
        }
    }
    Ok(())
}
