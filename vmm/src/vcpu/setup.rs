//! A vCPU's registers before its first instruction.

use kvm_bindings::{Msrs, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_sregs};
use kvm_ioctls::{VcpuFd, VmFd};
use vm_memory::GuestAddress;

use super::VcpuError;
use super::cpuid::HostCpuid;
use crate::boot::{self, layout};

const CR0_PROTECTION: u64 = 1;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PHYSICAL_ADDRESS_EXTENSION: u64 = 1 << 5;
const EFER_LONG_MODE: u64 = (1 << 8) | (1 << 10);
/// Bit 1 is always set.
const RFLAGS: u64 = 2;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRINGS: u64 = 1;
const MSR_MTRR_DEFAULT_TYPE: u32 = 0x2ff;
/// MTRRs on, everything write-back.
const MTRR_WRITE_BACK: u64 = (1 << 11) | 6;

/// Local vector table entries of the APIC's two pins, and the delivery modes for them.
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const DELIVER_NMI: u32 = 4 << 8;
const DELIVER_EXTINT: u32 = 7 << 8;
const DELIVERY_AND_MASK: u32 = (7 << 8) | (1 << 16);

/// Makes vCPU `index` of the `count` that the guest knows of. Each but the first waits for the guest to start it (INIT, SIPI).
///
/// # Errors
/// KVM refuses something.
pub fn create(vm: &VmFd, host: &HostCpuid, index: u32, count: u32) -> Result<VcpuFd, VcpuError> {
    let kvm = |action| {
        move |source| VcpuError::Kvm {
            index,
            action,
            source,
        }
    };
    let vcpu = vm
        .create_vcpu(u64::from(index))
        .map_err(kvm("KVM_CREATE_VCPU"))?;
    vcpu.set_cpuid2(&host.for_vcpu(index, count))
        .map_err(kvm("KVM_SET_CPUID2"))?;
    set_msrs(&vcpu, index)?;
    let mut lapic = vcpu.get_lapic().map_err(kvm("KVM_GET_LAPIC"))?;
    wire_pins(&mut lapic);
    vcpu.set_lapic(&lapic).map_err(kvm("KVM_SET_LAPIC"))?;
    Ok(vcpu)
}

/// Lets the boot processor start at `entry` as the 64-bit Linux boot protocol has it.
///
/// # Errors
/// KVM refuses the registers.
pub fn set_entry(vcpu: &VcpuFd, entry: GuestAddress) -> Result<(), VcpuError> {
    let kvm = |action| {
        move |source| VcpuError::Kvm {
            index: 0,
            action,
            source,
        }
    };
    let mut sregs = vcpu.get_sregs().map_err(kvm("KVM_GET_SREGS"))?;
    long_mode(&mut sregs);
    vcpu.set_sregs(&sregs).map_err(kvm("KVM_SET_SREGS"))?;
    let regs = kvm_regs {
        rip: entry.0,
        rsi: layout::ZERO_PAGE,
        rsp: layout::BOOT_STACK,
        rflags: RFLAGS,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(kvm("KVM_SET_REGS"))
}

fn long_mode(sregs: &mut kvm_sregs) {
    let data = boot::data_segment();
    sregs.cs = boot::code_segment();
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    (sregs.fs, sregs.gs) = (data, data);
    sregs.tr = boot::tss_segment();
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = boot::GDT_LIMIT;
    sregs.idt.base = layout::IDT;
    sregs.idt.limit = 0;
    sregs.cr3 = layout::PML4;
    sregs.cr4 |= CR4_PHYSICAL_ADDRESS_EXTENSION;
    sregs.cr0 |= CR0_PROTECTION | CR0_PAGING;
    sregs.efer |= EFER_LONG_MODE;
}

fn set_msrs(vcpu: &VcpuFd, index: u32) -> Result<(), VcpuError> {
    let entries = [
        (MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRINGS),
        (MSR_MTRR_DEFAULT_TYPE, MTRR_WRITE_BACK),
    ]
    .map(|(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    });
    let msrs = Msrs::from_entries(&entries).map_err(|_| VcpuError::Msrs { index })?;
    let set = vcpu.set_msrs(&msrs).map_err(|source| VcpuError::Kvm {
        index,
        action: "KVM_SET_MSRS",
        source,
    })?;
    if set < entries.len() {
        return Err(VcpuError::Msrs { index });
    }
    Ok(())
}

/// The PIC on pin 0, NMI on pin 1, as the MP table says.
fn wire_pins(lapic: &mut kvm_lapic_state) {
    for (at, mode) in [(LVT_LINT0, DELIVER_EXTINT), (LVT_LINT1, DELIVER_NMI)] {
        if let Some(bytes) = lapic.regs.get_mut(at..at + 4) {
            let mut word = [0; 4];
            for (to, from) in word.iter_mut().zip(bytes.iter()) {
                *to = from.cast_unsigned();
            }
            let value = (u32::from_le_bytes(word) & !DELIVERY_AND_MASK) | mode;
            for (to, from) in bytes.iter_mut().zip(value.to_le_bytes()) {
                *to = from.cast_signed();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pins_of_the_local_apic_are_unmasked() {
        let mut lapic = kvm_lapic_state { regs: [0; 1024] };
        // As after reset: masked.
        lapic.regs[LVT_LINT0 + 2] = 1;
        lapic.regs[LVT_LINT1 + 2] = 1;
        wire_pins(&mut lapic);
        assert_eq!(lapic.regs[LVT_LINT0..LVT_LINT0 + 4], [0, 7, 0, 0]);
        assert_eq!(lapic.regs[LVT_LINT1..LVT_LINT1 + 4], [0, 4, 0, 0]);
    }

    #[test]
    fn long_mode_keeps_what_reset_has_set() {
        let mut sregs = kvm_sregs {
            cr0: 0x6000_0010,
            ..Default::default()
        };
        long_mode(&mut sregs);
        assert_eq!(sregs.cr0, 0xe000_0011);
        assert_eq!((sregs.cr4, sregs.efer), (0x20, 0x500));
        assert_eq!((sregs.cs.selector, sregs.cs.l, sregs.cs.db), (0x10, 1, 0));
        assert_eq!((sregs.ss.selector, sregs.ss.l, sregs.ss.db), (0x18, 0, 1));
    }
}
