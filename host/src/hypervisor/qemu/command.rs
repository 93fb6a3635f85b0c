//! QEMU's command line. Why each word is there: `docs/qemu.md`, and `guest-kernel/README.md` for the kernel's.

use std::os::fd::RawFd;

use crate::hypervisor::VmSpec;
use crate::hypervisor::process::SHARE_TAG;

/// What the guest's console goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Console {
    /// A file, pipe or terminal, opened for writing only.
    File(RawFd),
    /// A connected stream socket.
    Socket(RawFd),
}

/// The numbers that QEMU's command line is made of, beside the machine's specification.
#[derive(Clone, Copy, Debug)]
pub(super) struct Line {
    /// Connected to our vsock device.
    pub(super) vsock_fd: RawFd,
    /// Connected to our file system device.
    pub(super) share_fd: RawFd,
    pub(super) console: Option<Console>,
    /// The tap of the first network interface; those of the others follow, and then the disks'.
    pub(super) first_nic_fd: RawFd,
    /// Of the host's time stamp counter.
    pub(super) tsc_khz: u64,
}

impl Line {
    /// QEMU's arguments for the machine of `spec`.
    pub(super) fn arguments(&self, spec: &VmSpec) -> Vec<String> {
        let name = format!("cella-{}", spec.id.replace(',', "_"));
        let kernel = self.kernel_words(spec);
        let mut line: Vec<String> = [
            "-name",
            &name,
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        ]
        .map(str::to_owned)
        .into();
        line.extend(self.machine(spec));
        line.extend(self.devices(spec));
        line.extend(self.console());
        let boot = [
            "-kernel",
            "/boot/kernel",
            "-initrd",
            "/boot/initrd",
            "-append",
            &kernel,
        ];
        line.extend(boot.map(str::to_owned));
        line
    }

    fn machine(&self, spec: &VmSpec) -> Vec<String> {
        let mib = spec.memory_bytes >> 20;
        let serial = match self.console {
            Some(_) => "on",
            None => "off",
        };
        vec![
            "-M".into(),
            format!("microvm,acpi=off,x-option-roms=off,isa-serial={serial},memory-backend=memory"),
            "-accel".into(),
            "tcg,tb-size=20".into(),
            "-cpu".into(),
            "max,-erms,-fsrm".into(),
            "-m".into(),
            format!("{mib}M"),
            "-smp".into(),
            spec.vcpus.to_string(),
            "-object".into(),
            format!("memory-backend-memfd,id=memory,size={mib}M,share=on,seal=on"),
            "-global".into(),
            "virtio-mmio.force-legacy=false".into(),
        ]
    }

    fn devices(&self, spec: &VmSpec) -> Vec<String> {
        let mut line = vec![
            "-chardev".into(),
            format!("socket,id=vsock,fd={}", self.vsock_fd),
            "-device".into(),
            "vhost-user-vsock-device,chardev=vsock".into(),
            "-chardev".into(),
            format!("socket,id=share,fd={}", self.share_fd),
            "-device".into(),
            format!("vhost-user-fs-device,chardev=share,tag={SHARE_TAG},queue-size=512"),
            "-object".into(),
            "rng-builtin,id=entropy".into(),
            "-device".into(),
            "virtio-rng-device,rng=entropy".into(),
        ];
        for (fd, nic) in (self.first_nic_fd..).zip(&spec.nics) {
            let [a, b, c, d, e, f] = nic.mac;
            let mac = format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}");
            let mtu = nic.mtu;
            line.extend([
                "-netdev".into(),
                format!("tap,id=net{fd},fd={fd},vhost=off"),
                "-device".into(),
                format!("virtio-net-device,netdev=net{fd},mac={mac},host_mtu={mtu}"),
            ]);
        }
        let first_disk_fd = self
            .first_nic_fd
            .saturating_add_unsigned(spec.nics.len() as u32);
        for (fd, disk) in (first_disk_fd..).zip(&spec.disks) {
            let read_only = if disk.read_only { "on" } else { "off" };
            line.extend([
                "-add-fd".into(),
                format!("fd={fd},set={fd}"),
                "-blockdev".into(),
                format!(
                    "driver=file,node-name=disk{fd},filename=/dev/fdset/{fd},locking=off,read-only={read_only}"
                ),
                "-device".into(),
                format!("virtio-blk-device,drive=disk{fd}"),
            ]);
        }
        line
    }

    fn console(&self) -> Vec<String> {
        let serial = ["-serial".into(), "chardev:console".into()];
        let mut line: Vec<String> = match self.console {
            Some(Console::File(fd)) => vec![
                "-add-fd".into(),
                format!("fd={fd},set=1"),
                "-chardev".into(),
                "file,id=console,path=/dev/fdset/1,append=on".into(),
            ],
            Some(Console::Socket(fd)) => {
                vec!["-chardev".into(), format!("socket,id=console,fd={fd}")]
            }
            None => return Vec::new(),
        };
        line.extend(serial);
        line
    }

    fn kernel_words(&self, spec: &VmSpec) -> String {
        let console = match self.console {
            Some(_) => "8250.nr_uarts=1 console=ttyS0",
            None => "quiet loglevel=0",
        };
        let words = format!(
            "reboot=t noreplace-smp rootfstype=ramfs init_on_alloc=1 no_timer_check lapic_khz=1000000 tsc_early_khz={} {console} {}",
            self.tsc_khz, spec.cmdline
        );
        words.trim_end().to_owned()
    }
}
