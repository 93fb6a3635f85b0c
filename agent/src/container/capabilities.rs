//! The five capability sets of a process.

use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities};

use super::report::{At, ChildResult, Step};
use super::sys;

/// The highest capability of Linux 6.12, CAP_CHECKPOINT_RESTORE. A kernel that has more would need an agent that knows
/// them: they stay in the bounding set only.
const LAST: u32 = 40;
const PR_CAP_AMBIENT: i32 = 47;
const PR_CAP_AMBIENT_RAISE: u64 = 2;

/// The sets as bit masks, bit N being capability N of linux/capability.h.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct CapabilityPlan {
    pub bounding: u64,
    pub effective: u64,
    pub permitted: u64,
    pub inheritable: u64,
    pub ambient: u64,
}

impl CapabilityPlan {
    /// From the spec; a process without capabilities has none. Ambient is held to what the kernel would allow:
    /// what is both permitted and inheritable.
    pub(super) fn new(capabilities: Option<&LinuxCapabilities>) -> Self {
        let Some(capabilities) = capabilities else {
            return Self::default();
        };
        let permitted = mask(capabilities.permitted().as_ref());
        let inheritable = mask(capabilities.inheritable().as_ref());
        Self {
            bounding: mask(capabilities.bounding().as_ref()),
            effective: mask(capabilities.effective().as_ref()) & permitted,
            permitted,
            inheritable,
            ambient: mask(capabilities.ambient().as_ref()) & permitted & inheritable,
        }
    }

    /// In the child, while it still has CAP_SETPCAP: drops what the bounding set lacks.
    pub(super) fn drop_bounding(&self) -> ChildResult {
        for capability in 0..=LAST {
            if self.bounding & (1 << capability) == 0 {
                sys::prctl(libc::PR_CAPBSET_DROP, u64::from(capability), 0)
                    .at_index(Step::BoundingSet, capability as usize)?;
            }
        }
        Ok(())
    }

    /// In the child, once it is the user it shall be: the other four sets.
    pub(super) fn apply(&self) -> ChildResult {
        sys::capset(self.effective, self.permitted, self.inheritable).at(Step::Capabilities)?;
        for capability in 0..=LAST {
            if self.ambient & (1 << capability) != 0 {
                sys::prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, u64::from(capability))
                    .at_index(Step::Ambient, capability as usize)?;
            }
        }
        Ok(())
    }
}

fn mask(set: Option<&Capabilities>) -> u64 {
    set.into_iter()
        .flatten()
        .fold(0, |mask, capability| mask | 1 << number(*capability))
}

/// The capability's number in linux/capability.h.
fn number(capability: Capability) -> u32 {
    match capability {
        Capability::Chown => 0,
        Capability::DacOverride => 1,
        Capability::DacReadSearch => 2,
        Capability::Fowner => 3,
        Capability::Fsetid => 4,
        Capability::Kill => 5,
        Capability::Setgid => 6,
        Capability::Setuid => 7,
        Capability::Setpcap => 8,
        Capability::LinuxImmutable => 9,
        Capability::NetBindService => 10,
        Capability::NetBroadcast => 11,
        Capability::NetAdmin => 12,
        Capability::NetRaw => 13,
        Capability::IpcLock => 14,
        Capability::IpcOwner => 15,
        Capability::SysModule => 16,
        Capability::SysRawio => 17,
        Capability::SysChroot => 18,
        Capability::SysPtrace => 19,
        Capability::SysPacct => 20,
        Capability::SysAdmin => 21,
        Capability::SysBoot => 22,
        Capability::SysNice => 23,
        Capability::SysResource => 24,
        Capability::SysTime => 25,
        Capability::SysTtyConfig => 26,
        Capability::Mknod => 27,
        Capability::Lease => 28,
        Capability::AuditWrite => 29,
        Capability::AuditControl => 30,
        Capability::Setfcap => 31,
        Capability::MacOverride => 32,
        Capability::MacAdmin => 33,
        Capability::Syslog => 34,
        Capability::WakeAlarm => 35,
        Capability::BlockSuspend => 36,
        Capability::AuditRead => 37,
        Capability::Perfmon => 38,
        Capability::Bpf => 39,
        Capability::CheckpointRestore => 40,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absent_sets_are_empty() {
        assert_eq!(CapabilityPlan::new(None), CapabilityPlan::default());
    }

    #[test]
    fn ambient_and_effective_are_held_to_what_they_may_contain() {
        let spec: LinuxCapabilities = serde_json::from_str(
            r#"{"bounding":["CAP_CHOWN","CAP_KILL"],"effective":["CAP_CHOWN","CAP_BPF"],
                "permitted":["CAP_CHOWN","CAP_KILL"],"inheritable":["CAP_KILL"],
                "ambient":["CAP_CHOWN","CAP_KILL"]}"#,
        )
        .unwrap();
        let plan = CapabilityPlan::new(Some(&spec));
        assert_eq!(plan.bounding, 1 | 1 << 5);
        assert_eq!(plan.effective, 1);
        assert_eq!(plan.permitted, 1 | 1 << 5);
        assert_eq!(plan.inheritable, 1 << 5);
        assert_eq!(plan.ambient, 1 << 5);
    }
}
