//! The VM itself, as KVM makes it: memory slots, interrupt controllers, and what x86 needs besides.

use std::fs::File;
use std::os::fd::IntoRawFd;

use kvm_bindings::{
    KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_PIT_SPEAKER_DUMMY, kvm_enable_cap, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VmFd};
use vm_memory::{Address, GuestAddressSpace, GuestMemory as _, GuestMemoryRegion};

use super::{MachineError, kvm as refused};
use crate::boot::layout;
use crate::device::GuestMemory;
use crate::vcpu::cpuid::HostCpuid;

/// Makes a VM with `memory` as its RAM, and reads what its vCPUs can be.
///
/// # Errors
/// KVM refuses something.
pub(super) fn create(
    device: File,
    memory: &GuestMemory,
) -> Result<(VmFd, HostCpuid), MachineError> {
    // SAFETY: the descriptor is open, and this owns it from here on.
    let kvm = unsafe { <Kvm as std::os::fd::FromRawFd>::from_raw_fd(device.into_raw_fd()) };
    let cpuid = HostCpuid::read(&kvm).map_err(refused(
        "KVM_GET_SUPPORTED_CPUID and KVM_GET_MSR_INDEX_LIST on /dev/kvm",
    ))?;
    let vm = create_vm(&kvm)?;
    add_memory(&vm, memory)?;
    let tss = usize::try_from(layout::KVM_TSS).unwrap_or(usize::MAX);
    vm.set_tss_address(tss)
        .map_err(refused("KVM_SET_TSS_ADDR"))?;
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
        .map_err(refused("KVM_SET_IDENTITY_MAP_ADDR"))?;
    if cpuid.emulated() {
        exit_on_emulation_failure(&vm)?;
    }
    vm.create_irq_chip()
        .map_err(refused("KVM_CREATE_IRQCHIP"))?;
    let pit = kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    };
    vm.create_pit2(pit).map_err(refused("KVM_CREATE_PIT2"))?;
    Ok((vm, cpuid))
}

/// `KVM_CREATE_VM` can be interrupted by a signal; then it has made nothing.
fn create_vm(kvm: &Kvm) -> Result<VmFd, MachineError> {
    loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR => {}
            made => return made.map_err(refused("KVM_CREATE_VM")),
        }
    }
}

fn add_memory(vm: &VmFd, memory: &GuestMemory) -> Result<(), MachineError> {
    for (slot, region) in (0_u32..).zip(memory.memory().iter()) {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the range is mapped, and the machine keeps it mapped for longer than the VM: its vCPUs' threads
        // have ended before the memory goes.
        unsafe { vm.set_user_memory_region(region) }
            .map_err(refused("KVM_SET_USER_MEMORY_REGION"))?;
    }
    Ok(())
}

/// Asks for the exit that carries the bytes of what KVM cannot emulate. Hardware hosts do without: there, nothing but a
/// broken guest gets as far.
fn exit_on_emulation_failure(vm: &VmFd) -> Result<(), MachineError> {
    let mut cap = kvm_enable_cap {
        cap: KVM_CAP_EXIT_ON_EMULATION_FAILURE,
        ..Default::default()
    };
    cap.args[0] = 1;
    vm.enable_cap(&cap)
        .map_err(refused("KVM_CAP_EXIT_ON_EMULATION_FAILURE"))
}
