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
    /// The tap of the first interface; the others' follow.
    pub(super) first_nic_fd: RawFd,
    /// Of the host's time stamp counter.
    pub(super) tsc_khz: u64,
}

impl Line {
    /// QEMU's arguments for the machine of `spec`.
    pub(super) fn arguments(&self, spec: &VmSpec) -> Vec<String> {
        let mib = spec.memory_bytes >> 20;
        let serial = match self.console {
            Some(_) => "on",
            None => "off",
        };
        let mut arguments = Vec::new();
        let mut add = |words: &[&str]| arguments.extend(words.iter().map(|&word| word.to_owned()));
        let name = format!("cella-{}", spec.id.replace(',', "_"));
        add(&["-name", &name]);
        add(&[
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
        ]);
        add(&[
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        ]);
        add(&[
            "-M",
            &format!(
                "microvm,acpi=off,x-option-roms=off,isa-serial={serial},memory-backend=memory"
            ),
        ]);
        add(&["-accel", "tcg,tb-size=8", "-cpu", "max,-erms,-fsrm"]);
        add(&["-m", &format!("{mib}M"), "-smp", &spec.vcpus.to_string()]);
        add(&[
            "-object",
            &format!("memory-backend-memfd,id=memory,size={mib}M,share=on,seal=on"),
        ]);
        add(&["-global", "virtio-mmio.force-legacy=false"]);
        add(&["-chardev", &format!("socket,id=vsock,fd={}", self.vsock_fd)]);
        add(&["-device", "vhost-user-vsock-device,chardev=vsock"]);
        add(&["-chardev", &format!("socket,id=share,fd={}", self.share_fd)]);
        add(&[
            "-device",
            &format!("vhost-user-fs-device,chardev=share,tag={SHARE_TAG},queue-size=512"),
        ]);
        add(&["-object", "rng-builtin,id=entropy"]);
        add(&["-device", "virtio-rng-device,rng=entropy"]);
        for [netdev, device] in self.nics(spec) {
            add(&["-netdev", &netdev, "-device", &device]);
        }
        match self.console {
            Some(Console::File(fd)) => {
                add(&["-add-fd", &format!("fd={fd},set=1")]);
                add(&["-chardev", "file,id=console,path=/dev/fdset/1,append=on"]);
                add(&["-serial", "chardev:console"]);
            }
            Some(Console::Socket(fd)) => {
                add(&["-chardev", &format!("socket,id=console,fd={fd}")]);
                add(&["-serial", "chardev:console"]);
            }
            None => {}
        }
        add(&["-kernel", "/kernel", "-initrd", "/initrd"]);
        add(&["-append", &self.kernel_words(spec)]);
        arguments
    }

    /// The two ends of each interface.
    fn nics(&self, spec: &VmSpec) -> Vec<[String; 2]> {
        let nics = (self.first_nic_fd..).zip(&spec.nics).enumerate();
        nics.map(|(number, (fd, nic))| {
            let mac = nic.mac.map(|byte| format!("{byte:02x}")).join(":");
            let mtu = nic.mtu;
            [
                format!("tap,id=net{number},fd={fd},vhost=off"),
                format!("virtio-net-device,netdev=net{number},mac={mac},host_mtu={mtu}"),
            ]
        })
        .collect()
    }

    fn kernel_words(&self, spec: &VmSpec) -> String {
        let console = match self.console {
            Some(_) => "8250.nr_uarts=1 console=ttyS0",
            None => "quiet loglevel=0",
        };
        let words = format!(
            "reboot=t noreplace-smp rootfstype=ramfs no_timer_check lapic_khz=1000000 tsc_early_khz={} {console} {}",
            self.tsc_khz, spec.cmdline
        );
        words.trim_end().to_owned()
    }
}
