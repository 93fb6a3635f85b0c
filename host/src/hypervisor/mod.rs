//! The hypervisor behind one narrow trait: how a sandbox's virtual machine comes to be and ends.

mod channel;
mod choose;
pub mod kvm;
pub mod mounts;
mod process;
pub mod qemu;
mod saved;

use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;

pub use choose::{Choice, choose};
pub use mounts::Mounted;
pub use saved::SavedVm;

use async_trait::async_trait;
use cella_proto::vmm::{Stats, StopReason};

use crate::error::ErrorKind;

/// Bytes in whole numbers of which memory is added to a machine: a block of virtio-mem.
pub const ADDED_BLOCK: u64 = 2 << 20;

/// The virtual machine that a sandbox asks for.
#[derive(Debug)]
pub struct VmSpec {
    /// Of the sandbox; for messages and process titles.
    pub id: String,
    /// 1 to 32. A machine that is restored has at least the saved one's, and at most those that its guest knows of.
    pub vcpus: u32,
    /// The CPUs that a guest which is booted is told of, so that a machine restored from it may have them; 0: `vcpus`.
    pub possible_vcpus: u32,
    /// Guest RAM in bytes, a multiple of 1 MiB.
    pub memory_bytes: u64,
    /// What a machine that is restored gets beyond the saved one's `memory_bytes`: bytes, a multiple of [`ADDED_BLOCK`].
    pub added_memory_bytes: u64,
    /// The cella-vmm binary.
    pub vmm: PathBuf,
    /// ELF vmlinux.
    pub kernel: PathBuf,
    /// Uncompressed cpio archive.
    pub initrd: PathBuf,
    /// Words appended to the kernel's command line.
    pub cmdline: String,
    /// The directory served to the guest by virtiofs, tag `share`.
    pub share: PathBuf,
    /// Where guest connections to CID 2 port P find the socket `<sockets>/<P>`.
    pub sockets: PathBuf,
    /// The socket on which the VMM listens for connections into the guest.
    pub vsock: PathBuf,
    /// The guest's console, if it shall have one.
    pub console: Option<File>,
    /// Places for devices that come when the machine is restored from a snapshot of this one.
    pub spare_slots: u32,
    /// Its network interfaces, in the order in which the guest finds them.
    pub nics: Vec<Nic>,
    /// Its disks, `/dev/vda` first.
    pub disks: Vec<Disk>,
    /// What is mounted in the shared directory for the VMM of a restored machine alone, before the guest runs.
    pub mounts: Vec<Mounted>,
}

/// A disk of the guest's.
#[derive(Debug)]
pub struct Disk {
    /// Its content, byte for byte; opened for writing too, unless it is `read_only`.
    pub image: File,
    /// The guest may not write to it.
    pub read_only: bool,
}

/// A network interface of the guest.
#[derive(Debug)]
pub struct Nic {
    /// A tap made with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`, with a header of 12 bytes (`TUNSETVNETHDRSZ`) and
    /// nonblocking. It is not persistent: it goes when the last descriptor of it is closed.
    pub tap: OwnedFd,
    /// The guest's hardware address.
    pub mac: [u8; 6],
    /// Bytes of the largest packet without its Ethernet header.
    pub mtu: u16,
}

/// How a virtual machine ended.
#[derive(Clone, Debug)]
pub struct Ended {
    /// Who ended it.
    pub reason: StopReason,
    /// One line for a person.
    pub message: String,
}

/// Why a virtual machine could not be made or asked something.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// What the host lacks: no KVM, no kernel, no right.
    #[error("{what} {}: {source}", path.display())]
    Missing {
        /// What was being done.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// A system call failed.
    #[error("{action}: {source}")]
    Host {
        /// What was being done, on what.
        action: String,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// The VMM refused.
    #[error("the VMM of sandbox {id}: {message}")]
    Refused {
        /// The sandbox.
        id: String,
        /// The kind that the VMM gave.
        kind: ErrorKind,
        /// Its reason.
        message: String,
    },
    /// There is no hypervisor.
    #[error("no hypervisor on this host: {kvm}; {qemu}")]
    Neither {
        /// Why not KVM.
        kvm: Box<Error>,
        /// Why not QEMU.
        qemu: Box<Error>,
    },
    /// A hypervisor that cannot be used.
    #[error("{}: {reason}", path.display())]
    Unusable {
        /// Its program.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The virtual machine is gone.
    #[error("the virtual machine of sandbox {id} ended: {message}")]
    Gone {
        /// The sandbox.
        id: String,
        /// How.
        message: String,
    },
}

impl Error {
    /// The kind of this failure.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Missing { .. } | Self::Neither { .. } | Self::Unusable { .. } => {
                ErrorKind::FailedPrecondition
            }
            Self::Host { source, .. } => ErrorKind::from(source),
            Self::Refused { kind, .. } => *kind,
            Self::Gone { .. } => ErrorKind::Unavailable,
        }
    }

    pub(crate) fn host(action: impl Into<String>, source: impl Into<std::io::Error>) -> Self {
        Self::Host {
            action: action.into(),
            source: source.into(),
        }
    }
}

/// A machine between two owners. Dropping it ends the machine, which ends with its control socket.
#[derive(Debug)]
pub struct HandedVm {
    /// The owner's end of `vmm.proto`'s socket; no call is under way on it.
    pub control: OwnedFd,
    /// The VMM, for whoever waits for its end.
    pub pidfd: OwnedFd,
    /// Its process id.
    pub pid: u32,
}

/// A running virtual machine. Dropping it ends it.
#[async_trait]
pub trait Vm: Send + Sync {
    /// The process id of the VMM on the host.
    fn pid(&self) -> u32;
    /// Stops every vCPU where it is.
    async fn pause(&self) -> Result<(), Error>;
    /// Lets the vCPUs go on.
    async fn resume(&self) -> Result<(), Error>;
    /// Ends the machine; [`Vm::wait`] returns soon after.
    async fn stop(&self) -> Result<(), Error>;
    /// Returns when the machine has ended, at once if it has.
    async fn wait(&self) -> Ended;
    /// What the machine has cost so far.
    async fn stats(&self) -> Result<Stats, Error>;
    /// Writes the paused machine to `files`, which are empty; the memory's is as long as the memory is.
    async fn snapshot(&self, _files: &SavedVm) -> Result<(), Error> {
        Err(Error::Refused {
            id: self.pid().to_string(),
            kind: ErrorKind::Unimplemented,
            message: "its hypervisor saves no machines".to_owned(),
        })
    }
    /// Gives the first network interface `tap` instead of its own; see [`Nic`].
    async fn plug(&self, _tap: BorrowedFd<'_>) -> Result<(), Error> {
        Err(Error::Refused {
            id: self.pid().to_string(),
            kind: ErrorKind::Unimplemented,
            message: "its hypervisor plugs nothing in".to_owned(),
        })
    }
    /// What another process needs to be its owner; nothing, and the machine ends, if it cannot have another.
    fn hand_over(self: Box<Self>) -> Option<HandedVm> {
        None
    }
}

/// Makes virtual machines.
#[async_trait]
pub trait Hypervisor: Send + Sync {
    /// The word that chooses it on the command line.
    fn name(&self) -> &'static str;
    /// Makes a virtual machine and lets it run.
    async fn boot(&self, spec: VmSpec) -> Result<Box<dyn Vm>, Error>;
    /// Whether its machines can be saved and restored.
    fn saves(&self) -> bool {
        false
    }
    /// Makes a virtual machine that goes on where a saved one of the same kernel and memory was, and lets it run. CPUs that the saved one
    /// had not wait for the guest to start them. Network interfaces of `spec` that the saved one had not are additional devices, and
    /// its added memory is one behind them.
    async fn restore(&self, spec: &VmSpec, _saved: &SavedVm) -> Result<Box<dyn Vm>, Error> {
        Err(Error::Refused {
            id: spec.id.clone(),
            kind: ErrorKind::Unimplemented,
            message: format!("{} restores no saved machines", self.name()),
        })
    }
    /// Owns a machine that another process has handed over, as the one of sandbox `id`.
    fn take_over(&self, id: &str, _handed: HandedVm) -> Result<Box<dyn Vm>, Error> {
        Err(Error::Refused {
            id: id.to_owned(),
            kind: ErrorKind::Unimplemented,
            message: format!("{} takes no machines over", self.name()),
        })
    }
}
