//! What `CPUID` tells the guest: all that KVM supports, and each vCPU its own place in the topology.

use std::arch::x86_64::__cpuid;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

const FEATURES: u32 = 1;
const CACHES: u32 = 4;
const TOPOLOGY: [u32; 2] = [0xb, 0x1f];
const KVM_FEATURES: u32 = 0x4000_0001;
const AMD_SIZES: u32 = 0x8000_0008;
const AMD_TOPOLOGY: u32 = 0x8000_001e;

// Leaf 1, ECX and EDX.
const XSAVE: u32 = 1 << 26;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
const HYPER_THREADING: u32 = 1 << 28;

/// The clock, at its two addresses, and that it is stable (KVM_FEATURE_* of asm/kvm_para.h, bits 0, 3 and 24 of EAX).
const KVM_CLOCK: u32 = 1 | (1 << 3) | (1 << 24);

/// Topology leaves: what a level is made of.
const LEVEL_THREADS: u32 = 1 << 8;
const LEVEL_CORES: u32 = 2 << 8;

/// What KVM on this host supports.
#[derive(Clone, Debug)]
pub struct HostCpuid {
    entries: CpuId,
    deadline_timer: bool,
    msrs: Vec<u32>,
}

impl HostCpuid {
    /// Asks KVM.
    ///
    /// # Errors
    /// The ioctl failed.
    pub fn read(kvm: &Kvm) -> Result<Self, kvm_ioctls::Error> {
        Ok(Self {
            entries: kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?,
            deadline_timer: kvm.check_extension(Cap::TscDeadlineTimer),
            msrs: kvm.get_msr_index_list()?.as_slice().to_vec(),
        })
    }

    /// The model-specific registers that make up a vCPU's state, as far as a vCPU has them.
    pub fn msrs(&self) -> &[u32] {
        &self.msrs
    }

    /// KVM runs the guest's kernel mode in its instruction emulator: no hardware virtualization. Such a KVM
    /// cannot offer `XSAVE`, though the processor has it.
    pub fn emulated(&self) -> bool {
        let offered = self
            .entries
            .as_slice()
            .iter()
            .any(|entry| entry.function == FEATURES && entry.ecx & XSAVE != 0);
        !offered && __cpuid(FEATURES).ecx & XSAVE != 0
    }

    /// For vCPU `index` of the `count` that the guest knows of, whose APIC id is its index: one package, one thread a core.
    pub fn for_vcpu(&self, index: u32, count: u32) -> CpuId {
        let emulated = self.emulated();
        let mut cpuid = self.entries.clone();
        let place = Place { index, count };
        for entry in cpuid.as_mut_slice() {
            match entry.function {
                FEATURES => self.features(entry, place),
                // The other paravirtual features end in a hypercall, which such a KVM never returns from, or in work
                // that an emulated kernel had better not do.
                KVM_FEATURES if emulated => entry.eax &= KVM_CLOCK,
                CACHES if entry.eax & 0x1f != 0 => place.caches(entry),
                leaf if TOPOLOGY.contains(&leaf) => place.topology(entry),
                AMD_SIZES => {
                    entry.ecx = (entry.ecx & !0xf0ff) | (place.id_bits() << 12) | (count - 1);
                }
                AMD_TOPOLOGY => {
                    (entry.eax, entry.ebx, entry.ecx) = (index, index, 0);
                }
                _ => {}
            }
        }
        cpuid
    }

    fn features(&self, entry: &mut kvm_cpuid_entry2, place: Place) {
        // APIC id and number of logical processors; line size and brand stay.
        entry.ebx = (entry.ebx & 0xffff) | (place.count << 16) | (place.index << 24);
        entry.ecx |= HYPERVISOR;
        if self.deadline_timer {
            entry.ecx |= TSC_DEADLINE;
        }
        if place.count > 1 {
            entry.edx |= HYPER_THREADING;
        } else {
            entry.edx &= !HYPER_THREADING;
        }
    }
}

/// A vCPU's index, below `count`, which is 1 to 32.
#[derive(Clone, Copy)]
struct Place {
    index: u32,
    count: u32,
}

impl Place {
    /// Bits of an APIC id that tell the package's cores apart.
    fn id_bits(self) -> u32 {
        self.count.next_power_of_two().trailing_zeros()
    }

    /// Leaf 4: caches of the first two levels are a core's own, those above the package's.
    fn caches(self, entry: &mut kvm_cpuid_entry2) {
        let level = (entry.eax >> 5) & 7;
        let ids = (1 << self.id_bits()) - 1;
        let sharing = if level > 2 { ids } else { 0 };
        entry.eax = (entry.eax & 0x3fff) | (sharing << 14) | (ids << 26);
    }

    /// Leaves 0xb and 0x1f, extended topology.
    fn topology(self, entry: &mut kvm_cpuid_entry2) {
        (entry.eax, entry.ebx, entry.ecx) = match entry.index {
            0 => (0, 1, LEVEL_THREADS),
            1 => (self.id_bits(), self.count, LEVEL_CORES | 1),
            index => (0, 0, index),
        };
        entry.edx = self.index;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(function: u32, index: u32) -> HostCpuid {
        let entry = kvm_cpuid_entry2 {
            function,
            index,
            eax: 0xffff_ffff,
            ebx: 0xffff_ffff,
            ecx: 0,
            edx: 0,
            ..Default::default()
        };
        HostCpuid {
            entries: CpuId::from_entries(&[entry]).unwrap(),
            deadline_timer: true,
            msrs: Vec::new(),
        }
    }

    fn leaf(function: u32, index: u32, vcpu: u32, count: u32) -> (u32, u32, u32, u32) {
        let cpuid = host(function, index).for_vcpu(vcpu, count);
        let entry = cpuid.as_slice()[0];
        (entry.eax, entry.ebx, entry.ecx, entry.edx)
    }

    #[test]
    fn each_vcpu_has_its_apic_id() {
        assert_eq!(leaf(1, 0, 0, 1).1, 0x0001_ffff);
        assert_eq!(leaf(1, 0, 31, 32).1, 0x1f20_ffff);
        assert_eq!(leaf(1, 0, 0, 1).3, 0, "one processor: no hyper-threading");
        assert_eq!(leaf(1, 0, 0, 2).3, HYPER_THREADING);
        assert_eq!(leaf(1, 0, 0, 1).2, HYPERVISOR | TSC_DEADLINE);
    }

    #[test]
    fn the_topology_is_cores_of_one_package() {
        assert_eq!(leaf(0xb, 0, 2, 3), (0, 1, 0x100, 2));
        assert_eq!(leaf(0xb, 1, 2, 3), (2, 3, 0x201, 2));
        assert_eq!(leaf(0xb, 2, 2, 3), (0, 0, 2, 2));
        assert_eq!(leaf(0x1f, 1, 0, 1), (0, 1, 0x201, 0));
        assert_eq!(leaf(0x8000_001e, 0, 7, 8).0, 7);
        assert_eq!(leaf(0x8000_0008, 0, 0, 32).2, 0x501f);
    }

    #[test]
    fn no_xsave_in_kvm_is_an_emulated_host() {
        let processor_has_it = __cpuid(1).ecx & XSAVE != 0;
        let mut host = host(1, 0);
        assert_eq!(host.emulated(), processor_has_it);
        host.entries.as_mut_slice()[0].ecx = XSAVE;
        assert!(!host.emulated());
    }
}
