//! What `Configure` asks for, checked: a machine and its devices.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};

use cella_proto::vmm::{Configure, Device, ErrorKind, Net, Restore, device};

use super::packet::Fds;
use super::refusal::Refusal;
use crate::boot::layout;
use crate::device::mem::BLOCK_BYTES;
use crate::machine::devices::DeviceSpec;
use crate::machine::memory::{AddedMemory, MAX_MEMORY_BYTES};
use crate::machine::{MachineConfig, RestoreConfig};
use crate::snapshot;

/// Most bytes of a virtiofs tag (virtio 1.2, section 5.11.4).
const MAX_TAG: usize = 36;

/// Most bytes of a disk's serial number (virtio 1.2, section 5.2.6).
const MAX_SERIAL: usize = 20;

/// The smallest MTU of IPv4 (RFC 791), and of a network device (virtio 1.2, section 5.1.4.1).
const MIN_MTU: u16 = 68;

/// CIDs below this and the highest are not a guest's (virtio 1.2, section 5.10.4).
const FIRST_GUEST_CID: u64 = 3;

/// What a machine begins with.
pub enum Beginning {
    /// A kernel.
    Boot(MachineConfig),
    /// A snapshot.
    Restore(RestoreConfig),
}

/// Takes a `Configure` and its file descriptors apart.
///
/// # Errors
/// A file descriptor that is missing or named twice, a value out of its range, or a state file that is none; kernel,
/// memory and CPUs are the machine's to judge.
pub fn parse(
    configure: &Configure,
    fds: &mut Fds,
) -> Result<(Beginning, Vec<DeviceSpec>), Refusal> {
    let beginning = match configure.restore.as_ref() {
        Some(restore) => Beginning::Restore(saved(configure, restore, fds)?),
        None => Beginning::Boot(booted(configure, fds)?),
    };
    let mut specs: Vec<_> = configure
        .devices
        .iter()
        .map(|device| device_spec(device, fds))
        .collect::<Result<_, _>>()?;
    if let Beginning::Restore(RestoreConfig {
        added: Some(added),
        memory_bytes,
        ..
    }) = &beginning
    {
        let file = added.file.as_ref().map(File::try_clone).transpose();
        specs.push(DeviceSpec::Mem {
            start: layout::added_start(*memory_bytes),
            bytes: added.bytes,
            file: file.map_err(Refusal::io("configuring the machine: added_memory_fd"))?,
        });
    }
    Ok((beginning, specs))
}

fn saved(
    configure: &Configure,
    restore: &Restore,
    fds: &mut Fds,
) -> Result<RestoreConfig, Refusal> {
    if configure.console_fd.is_some() {
        return Err(invalid("a restored machine has no console".to_owned()));
    }
    let mut file = |index: u32, what: &str| take(fds, index, what).map(File::from);
    let state = file(restore.state_fd, "restore.state_fd")?;
    let state = snapshot::file::read(&state)
        .map_err(Refusal::snapshot("configuring the machine: the snapshot"))?;
    let kvm = file(configure.kvm_fd, "kvm_fd")?;
    let memory = file(configure.memory_fd, "memory_fd")?;
    let (memory_bytes, added) = memory_sizes(configure, restore, state.added_memory_bytes, fds)?;
    Ok(RestoreConfig {
        kvm,
        memory,
        memory_bytes,
        added,
        vcpus: configure.vcpus,
        state,
    })
}

/// What a machine began with, and what it has got since, of which `saved` bytes were saved with it.
fn memory_sizes(
    configure: &Configure,
    restore: &Restore,
    saved: u64,
    fds: &mut Fds,
) -> Result<(u64, Option<AddedMemory>), Refusal> {
    let (began_with, bytes, file) = match (saved, restore.added_memory_fd) {
        (0, None) => return Ok((configure.memory_bytes, None)),
        (0, Some(index)) => {
            let file = take(fds, index, "restore.added_memory_fd")?.into();
            let bytes = restore.added_memory_bytes;
            (configure.memory_bytes, bytes, Some(file))
        }
        (_, Some(_)) => {
            let why = "the saved machine had added memory: there is no place for more";
            return Err(invalid(why.to_owned()));
        }
        // Too little is the machine's to refuse.
        (saved, None) => (configure.memory_bytes.saturating_sub(saved), saved, None),
    };
    let all = began_with.checked_add(bytes);
    if bytes == 0
        || !bytes.is_multiple_of(BLOCK_BYTES)
        || all.is_none_or(|all| all > MAX_MEMORY_BYTES)
    {
        return Err(invalid(format!(
            "added memory of {bytes} bytes: it must be whole blocks of {BLOCK_BYTES} bytes, and all memory at most \
             {MAX_MEMORY_BYTES} bytes"
        )));
    }
    Ok((began_with, Some(AddedMemory { file, bytes })))
}

fn booted(configure: &Configure, fds: &mut Fds) -> Result<MachineConfig, Refusal> {
    let mut file = |index: u32, what: &str| take(fds, index, what).map(File::from);
    Ok(MachineConfig {
        kvm: file(configure.kvm_fd, "kvm_fd")?,
        memory: file(configure.memory_fd, "memory_fd")?,
        memory_bytes: configure.memory_bytes,
        vcpus: configure.vcpus,
        possible_vcpus: match configure.possible_vcpus {
            0 => configure.vcpus,
            possible => possible,
        },
        kernel: file(configure.kernel_fd, "kernel_fd")?,
        initrd: configure
            .initrd_fd
            .map(|index| file(index, "initrd_fd"))
            .transpose()?,
        cmdline: configure.cmdline.clone(),
        console: configure
            .console_fd
            .map(|index| file(index, "console_fd"))
            .transpose()?,
    })
}

/// Takes a `Configure` for a VMM with a companion apart: its devices, and the socket of each.
///
/// # Errors
/// A file descriptor that is missing or named twice, or a value out of its range.
pub fn parse_served(
    configure: &Configure,
    fds: &mut Fds,
) -> Result<Vec<(DeviceSpec, UnixStream)>, Refusal> {
    let devices = configure.devices.iter();
    devices
        .map(|device| {
            let index = device
                .vhost_user_fd
                .ok_or_else(|| invalid("a device lacks its vhost_user_fd".to_owned()))?;
            let socket = take(fds, index, "vhost_user_fd")?;
            Ok((device_spec(device, fds)?, UnixStream::from(socket)))
        })
        .collect()
}

fn device_spec(device: &Device, fds: &mut Fds) -> Result<DeviceSpec, Refusal> {
    match &device.device {
        Some(device::Device::Vsock(vsock)) => {
            if !(FIRST_GUEST_CID..u64::from(u32::MAX)).contains(&vsock.guest_cid) {
                return Err(invalid(format!(
                    "vsock: {} is no CID of a guest",
                    vsock.guest_cid
                )));
            }
            let listener = take(fds, vsock.listener_fd, "vsock.listener_fd")?;
            Ok(DeviceSpec::Vsock {
                guest_cid: vsock.guest_cid,
                listener: UnixListener::from(listener),
            })
        }
        Some(device::Device::Fs(fs)) => {
            let tag = bounded(&fs.tag, MAX_TAG, "fs.tag")?;
            if tag.is_empty() {
                return Err(invalid("fs.tag is empty".to_owned()));
            }
            Ok(DeviceSpec::Fs { tag })
        }
        Some(device::Device::Block(block)) => Ok(DeviceSpec::Block {
            file: take(fds, block.file_fd, "block.file_fd")?.into(),
            read_only: block.read_only,
            serial: bounded(&block.serial, MAX_SERIAL, "block.serial")?,
        }),
        Some(device::Device::Rng(_)) => Ok(DeviceSpec::Rng),
        Some(device::Device::Net(net)) => net_spec(net, fds),
        _ => Err(invalid("a device is of no kind that is known".to_owned())),
    }
}

fn net_spec(net: &Net, fds: &mut Fds) -> Result<DeviceSpec, Refusal> {
    // The lowest bit of the first byte is that of addresses of groups (IEEE 802).
    let mac = <[u8; 6]>::try_from(net.mac.as_slice())
        .ok()
        .filter(|mac| mac[0] & 1 == 0 && *mac != [0; 6])
        .ok_or_else(|| invalid(format!("net.mac: {:x?} is no card's address", net.mac)))?;
    let mtu = u16::try_from(net.mtu)
        .ok()
        .filter(|mtu| *mtu >= MIN_MTU)
        .ok_or_else(|| invalid(format!("net.mtu: {} is not 68 to 65535", net.mtu)))?;
    Ok(DeviceSpec::Net {
        tap: take(fds, net.tap_fd, "net.tap_fd")?.into(),
        mac,
        mtu,
    })
}

/// The file descriptor of `index`, which the request calls `what`.
pub fn take(fds: &mut Fds, index: u32, what: &str) -> Result<OwnedFd, Refusal> {
    fds.take(index).ok_or_else(|| {
        invalid(format!(
            "{what}: no file descriptor {index} came with the request, or it is named twice"
        ))
    })
}

fn bounded(text: &str, max: usize, what: &str) -> Result<String, Refusal> {
    if text.len() > max {
        return Err(invalid(format!("{what} is longer than {max} bytes")));
    }
    Ok(text.to_owned())
}

fn invalid(message: String) -> Refusal {
    Refusal {
        kind: ErrorKind::ERROR_KIND_INVALID_ARGUMENT,
        message: format!("configuring the machine: {message}"),
    }
}
