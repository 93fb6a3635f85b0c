//! What `Configure` takes and what it refuses.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;

use cella_proto::vmm::{
    Block, Configure, Device, ErrorKind, Fs, GetStats, Rng, Vsock, device, request::Call,
};

use crate::kernel::elf;
use crate::refused;
use crate::vmm::{Vmm, alone, fds};

pub const MEMORY: u64 = 32 << 20;

/// A configuration and its descriptors.
pub struct Given {
    pub configure: Configure,
    pub files: Vec<OwnedFd>,
}

pub fn memfd(bytes: u64) -> OwnedFd {
    let memory = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&memory, bytes).unwrap();
    memory
}

pub fn device(device: device::Device) -> Device {
    Device {
        device: Some(device),
        ..Device::default()
    }
}

impl Given {
    /// A machine of one vCPU, 32 MiB and `kernel`; nothing, and a word why, where there is no KVM.
    pub fn new(kernel: impl Into<OwnedFd>) -> Option<Self> {
        let Ok(kvm) = File::options().read(true).write(true).open("/dev/kvm") else {
            println!("SKIPPED: no /dev/kvm");
            return None;
        };
        let configure = Configure {
            kvm_fd: 0,
            memory_fd: 1,
            memory_bytes: MEMORY,
            vcpus: 1,
            kernel_fd: 2,
            ..Configure::default()
        };
        Some(Self {
            configure,
            files: vec![kvm.into(), memfd(MEMORY), kernel.into()],
        })
    }

    /// Adds a descriptor; its index.
    pub fn add(&mut self, file: impl Into<OwnedFd>) -> u32 {
        self.files.push(file.into());
        self.files.len() as u32 - 1
    }

    /// One of each device, over an image of `sectors`, and the listener in `directory`.
    pub fn add_devices(&mut self, directory: &std::path::Path, sectors: u64) {
        let listener = UnixListener::bind(directory.join("listener")).unwrap();
        listener.set_nonblocking(true).unwrap();
        let listener_fd = self.add(listener);
        let image = tempfile::tempfile().unwrap();
        image.set_len(sectors * 512).unwrap();
        let file_fd = self.add(image);
        self.configure.devices = vec![
            device(device::Device::Vsock(Vsock {
                guest_cid: 3,
                listener_fd,
                ..Vsock::default()
            })),
            device(device::Device::Fs(Fs {
                tag: "share".to_owned(),
                ..Fs::default()
            })),
            device(device::Device::Block(Block {
                file_fd,
                serial: "a disk".to_owned(),
                ..Block::default()
            })),
            device(device::Device::Rng(Rng::default())),
        ];
    }
}

fn idle() -> File {
    elf(guest! { "2: hlt", "jmp 2b" }, 0x1000)
}

type Change = (&'static str, fn(&mut Given));

const BLOCK: fn(u32) -> Device = |file_fd| {
    device(device::Device::Block(Block {
        file_fd,
        ..Block::default()
    }))
};

const VSOCK: fn(u64) -> Device = |guest_cid| {
    device(device::Device::Vsock(Vsock {
        guest_cid,
        ..Vsock::default()
    }))
};

/// What the caller got wrong, each by itself.
const INVALID: &[Change] = &[
    ("no vCPU", |given| given.configure.vcpus = 0),
    ("33 vCPUs", |given| given.configure.vcpus = 33),
    ("fewer vCPUs to know of than there are", |given| {
        (given.configure.vcpus, given.configure.possible_vcpus) = (2, 1);
    }),
    ("33 vCPUs to know of", |given| {
        given.configure.possible_vcpus = 33;
    }),
    ("a missing descriptor", |given| {
        given.configure.kernel_fd = 9
    }),
    ("a descriptor twice", |given| given.configure.kernel_fd = 1),
    ("an initrd that is not there", |given| {
        given.configure.initrd_fd = Some(3);
    }),
    ("a memory of another size", |given| {
        given.configure.memory_bytes = 2 * MEMORY;
    }),
    ("no memory", |given| given.configure.memory_bytes = 0),
    ("memory that is no file", |given| {
        given.files[1] = File::open("/dev/null").unwrap().into();
    }),
    ("a KVM that is none", |given| {
        given.files[0] = File::open("/dev/null").unwrap().into();
    }),
    ("a kernel that is none", |given| {
        given.files[2] = File::open("/proc/self/exe").unwrap().into();
    }),
    ("an empty kernel", |given| {
        given.files[2] = tempfile::tempfile().unwrap().into();
    }),
    ("a kernel larger than memory", |given| {
        given.files[2] = elf(&[0xf4], MEMORY).into();
    }),
    ("an initrd larger than memory", |given| {
        let initrd = tempfile::tempfile().unwrap();
        initrd.set_len(MEMORY).unwrap();
        given.configure.initrd_fd = Some(given.add(initrd));
    }),
    ("a long command line", |given| {
        given.configure.cmdline = "x".repeat(2048);
    }),
    ("a second line", |given| {
        given.configure.cmdline = "a\nb".to_owned();
    }),
    ("a device of no kind", |given| {
        given.configure.devices.push(Device::default());
    }),
    ("the host's CID", |given| {
        given.configure.devices.push(VSOCK(2));
    }),
    ("a CID of 33 bits", |given| {
        given.configure.devices.push(VSOCK(1 << 32));
    }),
    ("a tag without a letter", |given| {
        let fs = device::Device::Fs(Fs::default());
        given.configure.devices.push(device(fs));
    }),
    ("a disk of no sector", |given| {
        let image = given.add(tempfile::tempfile().unwrap());
        given.configure.devices.push(BLOCK(image));
    }),
    ("twenty devices", |given| {
        let rng = device(device::Device::Rng(Rng::default()));
        given.configure.devices = vec![rng; 20];
    }),
];

#[test]
fn what_cannot_be_is_the_callers_mistake() {
    let _alone = alone();
    for (what, change) in INVALID {
        let Some(mut vmm) = Vmm::start() else { return };
        let Some(mut given) = Given::new(idle()) else {
            return;
        };
        change(&mut given);
        let call = Call::Configure(given.configure);
        let kind = refused(vmm.call(call, &fds(&given.files)));
        assert_eq!(kind, ErrorKind::ERROR_KIND_INVALID_ARGUMENT, "{what}");
        // It lives on, but has had its one attempt.
        vmm.call(Call::GetStats(GetStats::default()), &[]);
        let again = Given::new(idle()).unwrap();
        let kind = refused(vmm.call(Call::Configure(again.configure), &fds(&again.files)));
        assert_eq!(kind, ErrorKind::ERROR_KIND_FAILED_PRECONDITION, "{what}");
        let kind = refused(vmm.call(Call::Start(Default::default()), &[]));
        assert_eq!(kind, ErrorKind::ERROR_KIND_FAILED_PRECONDITION, "{what}");
        vmm.done(Call::Stop(Default::default()), &[]);
        assert_eq!(vmm.ended(), (Some(0), None), "{what}: {}", vmm.log());
    }
}
