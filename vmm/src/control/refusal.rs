//! Why a request was not done, as the door is told.

use std::error::Error;
use std::io;

use cella_proto::vmm::ErrorKind;

use crate::boot::BootError;
use crate::device::fs::FsError;
use crate::machine::MachineError;
use crate::machine::devices::DevicesError;
use crate::machine::memory::MemoryError;
use crate::snapshot::SnapshotError;
use crate::vcpu::VcpuError;

const INTERNAL: ErrorKind = ErrorKind::ERROR_KIND_INTERNAL;
const INVALID: ErrorKind = ErrorKind::ERROR_KIND_INVALID_ARGUMENT;
const EXHAUSTED: ErrorKind = ErrorKind::ERROR_KIND_RESOURCE_EXHAUSTED;

/// A request that was not done, and why.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) kind: ErrorKind,
    pub(super) message: String,
}

impl Refusal {
    fn new(kind: ErrorKind, action: &str, error: &dyn Error) -> Self {
        Self {
            kind,
            message: format!("{action}: {error}"),
        }
    }

    /// `action` failed of the machine.
    pub(super) fn machine(action: &str) -> impl FnOnce(MachineError) -> Self {
        move |error| Self::new(of_machine(&error), action, &error)
    }

    /// `action` failed of a device.
    pub(super) fn devices(action: &str) -> impl FnOnce(DevicesError) -> Self {
        move |error| Self::new(of_devices(&error), action, &error)
    }

    /// `action` failed of a snapshot.
    pub(super) fn snapshot(action: &str) -> impl FnOnce(SnapshotError) -> Self {
        move |error| Self::new(of_snapshot(&error), action, &error)
    }

    /// `action` failed of a system call.
    pub(super) fn io(action: &str) -> impl FnOnce(io::Error) -> Self {
        move |error| Self::new(of_errno(error.raw_os_error()), action, &error)
    }
}

fn of_machine(error: &MachineError) -> ErrorKind {
    match error {
        MachineError::Vcpus(_) | MachineError::PossibleVcpus { .. } | MachineError::Slots(_) => {
            INVALID
        }
        MachineError::State { .. } => ErrorKind::ERROR_KIND_FAILED_PRECONDITION,
        MachineError::Memory(error) => of_memory(error),
        // Kernel, initrd and command line are the caller's, and so is the memory that they do not fit into.
        MachineError::Boot(BootError::Write { .. }) => INTERNAL,
        MachineError::Boot(_) => INVALID,
        MachineError::Kvm { source, .. } => of_errno(Some(source.errno())),
        MachineError::Host { source, .. } => of_errno(source.raw_os_error()),
        MachineError::Vcpu(VcpuError::Kvm { source, .. }) => of_errno(Some(source.errno())),
        MachineError::Vcpu(VcpuError::Thread { source, .. }) => of_errno(source.raw_os_error()),
        MachineError::Snapshot(error)
        | MachineError::Vcpu(VcpuError::Snapshot { source: error, .. }) => of_snapshot(error),
        MachineError::Vcpu(_) | MachineError::Bus(_) => INTERNAL,
    }
}

fn of_snapshot(error: &SnapshotError) -> ErrorKind {
    match error {
        SnapshotError::Io { source, .. } => of_errno(source.raw_os_error()),
        // The files are the caller's.
        SnapshotError::Magic
        | SnapshotError::Format { .. }
        | SnapshotError::Length { .. }
        | SnapshotError::Digest
        | SnapshotError::Content(_)
        | SnapshotError::Memory { .. }
        | SnapshotError::MemoryLength { .. }
        | SnapshotError::Part { .. }
        | SnapshotError::Shape { .. } => INVALID,
        SnapshotError::Version { .. }
        | SnapshotError::Processor { .. }
        | SnapshotError::Unsavable(_)
        | SnapshotError::Device { .. } => ErrorKind::ERROR_KIND_FAILED_PRECONDITION,
    }
}

fn of_memory(error: &MemoryError) -> ErrorKind {
    match error {
        MemoryError::Size { .. } | MemoryError::FileSize { .. } => INVALID,
        // mmap(2): no address space, or the limit of it.
        MemoryError::Map { .. } => EXHAUSTED,
        MemoryError::Stat(_) | MemoryError::Regions(_) => INTERNAL,
    }
}

fn of_devices(error: &DevicesError) -> ErrorKind {
    match error {
        DevicesError::Block(_) | DevicesError::Fs(FsError::Tag { .. }) => INVALID,
        DevicesError::Connect { source, .. } => of_machine(source),
        DevicesError::Run { source, .. } => of_errno(source.raw_os_error()),
        DevicesError::Fs(_) | DevicesError::Vsock(_) => INTERNAL,
    }
}

fn of_errno(errno: Option<i32>) -> ErrorKind {
    match errno {
        Some(libc::ENOMEM | libc::EMFILE | libc::ENFILE | libc::EAGAIN | libc::ENOSPC) => EXHAUSTED,
        // An ioctl on a descriptor that is not what it was said to be.
        Some(libc::ENOTTY) => INVALID,
        _ => INTERNAL,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::block::BlockError;
    use crate::machine::State;

    fn kvm(errno: i32) -> MachineError {
        MachineError::Kvm {
            action: "KVM_CREATE_VM",
            source: kvm_ioctls::Error::new(errno),
        }
    }

    #[test]
    fn what_the_caller_can_change_is_not_internal() {
        let state = MachineError::State {
            action: "start",
            state: State::Running,
        };
        for (error, kind) in [
            (MachineError::Vcpus(33), INVALID),
            (MachineError::Slots(19), INVALID),
            (MemoryError::Size { bytes: 1 }.into(), INVALID),
            (BootError::NotAKernel("it is empty").into(), INVALID),
            (BootError::CmdlineLength { bytes: 9999 }.into(), INVALID),
            (state, ErrorKind::ERROR_KIND_FAILED_PRECONDITION),
            (kvm(libc::ENOMEM), EXHAUSTED),
            (kvm(libc::EMFILE), EXHAUSTED),
            (kvm(libc::ENOTTY), INVALID),
            (kvm(libc::EIO), INTERNAL),
            (VcpuError::Msrs { index: 0 }.into(), INTERNAL),
        ] {
            let refusal = Refusal::machine("trying")(error);
            assert_eq!(refusal.kind, kind, "{}", refusal.message);
            assert!(refusal.message.starts_with("trying: "));
        }
        let image = DevicesError::Block(BlockError::Sectors(7));
        assert_eq!(of_devices(&image), INVALID);
        let many = DevicesError::Connect {
            name: "rng",
            source: MachineError::Slots(19),
        };
        assert_eq!(of_devices(&many), INVALID);
        let full = io::Error::from_raw_os_error(libc::EMFILE);
        assert_eq!(Refusal::io("trying")(full).kind, EXHAUSTED);
    }
}
