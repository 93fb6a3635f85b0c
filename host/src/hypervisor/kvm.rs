//! Our own VMM on /dev/kvm: spawns the jailed `cella-vmm`, hands it opened files, and speaks `vmm.proto` with it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;

use async_trait::async_trait;
use cella_proto::vmm::{Block, Configure, Device, Fs, Net, Restore, Rng, Vsock, device};
use rustix::fs::{MemfdFlags, SealFlags};

use super::process::{self, GUEST_CID, SHARE_TAG, open};
use super::{Error, HandedVm, Hypervisor, SavedVm, Vm, VmSpec};

/// `KVM_GET_API_VERSION` (linux/kvm.h): `_IO(0xae, 0)`.
const KVM_GET_API_VERSION: libc::Ioctl = 0xae00;
/// The version that every KVM since Linux 2.6.22 has.
const KVM_API_VERSION: i32 = 12;

/// The hypervisor of this module.
pub struct Kvm;

#[async_trait]
impl Hypervisor for Kvm {
    fn name(&self) -> &'static str {
        "kvm"
    }

    async fn boot(&self, spec: VmSpec) -> Result<Box<dyn Vm>, Error> {
        let files = Files::open(&spec, guest_memory(spec.memory_bytes)?)?;
        let vm = process::spawn(&spec, &[], &[])?;
        let fds = files.descriptors(spec.console.as_ref(), &spec);
        vm.boot(configure(&spec), &fds).await?;
        Ok(Box::new(vm))
    }

    fn saves(&self) -> bool {
        true
    }

    async fn restore(&self, spec: &VmSpec, saved: &SavedVm) -> Result<Box<dyn Vm>, Error> {
        let action = || format!("handing the saved machine to {}", spec.id);
        let memory = saved
            .memory
            .try_clone()
            .map_err(|e| Error::host(action(), e))?;
        let files = Files::open(spec, memory.into())?;
        let vm = process::spawn(spec, &[], &[])?;
        // Its file server looks for the files of the past as soon as it has a machine.
        vm.mount(&spec.mounts)?;
        let mut fds = files.descriptors(None, spec);
        let added = match spec.added_memory_bytes {
            0 => None,
            bytes => Some(guest_memory(bytes)?),
        };
        let mut configure = configure(spec);
        let next = u32::try_from(fds.len()).unwrap_or(u32::MAX);
        configure.restore = Some(Restore {
            state_fd: next,
            added_memory_fd: added.as_ref().map(|_| next.saturating_add(1)),
            added_memory_bytes: spec.added_memory_bytes,
            ..Default::default()
        })
        .into();
        fds.push(saved.state.as_fd());
        fds.extend(added.as_ref().map(AsFd::as_fd));
        vm.boot(configure, &fds).await?;
        Ok(Box::new(vm))
    }

    fn take_over(&self, id: &str, handed: HandedVm) -> Result<Box<dyn Vm>, Error> {
        Ok(Box::new(process::take_over(id, handed)?))
    }
}

/// Files that the VMM gets opened, because its jail can open none.
struct Files {
    kvm: File,
    memory: OwnedFd,
    kernel: File,
    initrd: File,
    listener: UnixListener,
}

impl Files {
    fn open(spec: &VmSpec, memory: OwnedFd) -> Result<Self, Error> {
        let kvm = open_kvm()?;
        let kernel = open("opening the guest kernel", &spec.kernel)?;
        let initrd = open("opening the guest image", &spec.initrd)?;
        let listener = UnixListener::bind(&spec.vsock)
            .map_err(|e| Error::host(format!("binding {}", spec.vsock.display()), e))?;
        Ok(Self {
            kvm,
            memory,
            kernel,
            initrd,
            listener,
        })
    }

    /// In the order of the indexes that [`configure`] gives.
    fn descriptors<'a>(
        &'a self,
        console: Option<&'a File>,
        spec: &'a VmSpec,
    ) -> Vec<BorrowedFd<'a>> {
        let mut fds = vec![
            self.kvm.as_fd(),
            self.memory.as_fd(),
            self.kernel.as_fd(),
            self.initrd.as_fd(),
            self.listener.as_fd(),
        ];
        fds.extend(console.map(AsFd::as_fd));
        fds.extend(spec.nics.iter().map(|nic| nic.tap.as_fd()));
        fds.extend(spec.disks.iter().map(|disk| disk.image.as_fd()));
        fds
    }
}

/// Opens /dev/kvm for a virtual machine.
///
/// # Errors
/// [`Error::Missing`] with the system's reason: there is none, no right to it, or something else is in its place.
pub fn open_kvm() -> Result<File, Error> {
    let path = Path::new("/dev/kvm");
    let missing = |what, source| Error::Missing {
        what,
        path: path.into(),
        source,
    };
    let kvm = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map_err(|e| missing("opening", e))?;
    // SAFETY: this request's argument is a number, which has to be 0.
    match unsafe { libc::ioctl(kvm.as_raw_fd(), KVM_GET_API_VERSION, 0) } {
        KVM_API_VERSION => Ok(kvm),
        -1 => {
            let source = io::Error::last_os_error();
            Err(missing("asking for the version of", source))
        }
        version => {
            let source = io::Error::other(format!("it is {version}, not {KVM_API_VERSION}"));
            Err(missing("asking for the version of", source))
        }
    }
}

/// Guest RAM: a memfd, so that it can be shared and saved; of a fixed size, so that nobody can shrink it under
/// a mapping.
fn guest_memory(bytes: u64) -> Result<OwnedFd, Error> {
    let action = || format!("making {bytes} bytes of guest memory");
    let memfd = rustix::fs::memfd_create(
        "cella-guest-memory",
        MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
    )
    .map_err(|e| Error::host(action(), e))?;
    rustix::fs::ftruncate(&memfd, bytes).map_err(|e| Error::host(action(), e))?;
    rustix::fs::fcntl_add_seals(
        &memfd,
        SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL,
    )
    .map_err(|e| Error::host(action(), e))?;
    Ok(memfd)
}

/// The indexes are those of [`Files::descriptors`].
fn configure(spec: &VmSpec) -> Configure {
    let device = |device| Device {
        device: Some(device),
        ..Default::default()
    };
    let console_fd = spec.console.as_ref().map(|_| 5);
    let first_nic = 5 + u32::from(console_fd.is_some());
    let nics = (first_nic..).zip(&spec.nics).map(|(tap_fd, nic)| {
        device(device::Device::Net(Net {
            tap_fd,
            mac: nic.mac.to_vec(),
            mtu: nic.mtu.into(),
            ..Default::default()
        }))
    });
    let first_disk = first_nic.saturating_add(u32::try_from(spec.nics.len()).unwrap_or(u32::MAX));
    let disks = (first_disk..).zip(&spec.disks).map(|(file_fd, disk)| {
        device(device::Device::Block(Block {
            file_fd,
            read_only: disk.read_only,
            ..Default::default()
        }))
    });
    Configure {
        kvm_fd: 0,
        memory_fd: 1,
        memory_bytes: spec.memory_bytes,
        vcpus: spec.vcpus,
        possible_vcpus: spec.possible_vcpus,
        kernel_fd: 2,
        initrd_fd: Some(3),
        cmdline: spec.cmdline.clone(),
        devices: [
            device(device::Device::Vsock(Vsock {
                guest_cid: GUEST_CID,
                listener_fd: 4,
                ..Default::default()
            })),
            device(device::Device::Fs(Fs {
                tag: SHARE_TAG.into(),
                ..Default::default()
            })),
            device(device::Device::Rng(Rng::default())),
        ]
        .into_iter()
        .chain(nics)
        .chain(disks)
        .collect(),
        console_fd,
        spare_slots: spec.spare_slots,
        ..Default::default()
    }
}
