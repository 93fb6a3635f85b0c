//! A machine saved and taken back: its vCPUs, interrupt controllers, timer and clock. Devices are
//! [`Devices`](super::devices::Devices)' to save, the memory is [`pages`]'.

use std::fs::File;

use cella_proto::snapshot::{Chips, MachineState, Processor};
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data,
    kvm_cpuid_entry2, kvm_irqchip, kvm_pit_state2, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use vm_memory::{GuestAddressSpace, GuestMemory as _, GuestMemoryRegion};

use super::memory::AddedMemory;
use super::{Machine, MachineError, Origin, State, check_vcpus, kvm, memory};
use crate::snapshot::{SnapshotError, bytes, file, pages, value};
use crate::vcpu::state;

/// What a machine goes on from. Every file is open already.
#[derive(Debug)]
pub struct RestoreConfig {
    /// `/dev/kvm`, open for reading and writing.
    pub kvm: File,
    /// The snapshot's memory file: only read.
    pub memory: File,
    /// Guest RAM in bytes, without `added`.
    pub memory_bytes: u64,
    /// Memory that the machine gets in addition, or had got when it was saved; the last of its devices gives it to the guest.
    pub added: Option<AddedMemory>,
    /// At least as many as were saved, at most as many as the guest knows of. Those that were not saved wait for the guest to
    /// start them.
    pub vcpus: u32,
    /// The snapshot's state, from [`file::read`].
    pub state: MachineState,
}

const IRQCHIPS: [u32; 3] = [
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQCHIP_IOAPIC,
];

impl Machine {
    /// Makes a machine that goes on from a snapshot. Its devices are connected in the same order as the saved ones; then
    /// [`Machine::spawn`] gives it the saved state.
    ///
    /// # Errors
    /// The snapshot is of another shape, its memory file another one's, or KVM refuses: see [`MachineError`].
    pub fn restore(config: RestoreConfig) -> Result<Self, MachineError> {
        let state = config.state;
        let vcpus = (config.vcpus, state.possible_vcpus);
        let added = config.added.as_ref();
        let saved_bytes = added.map_or(0, AddedMemory::saved_bytes);
        let added_bytes = added.map_or(0, |added| added.bytes);
        let memory_bytes = config.memory_bytes.saturating_add(saved_bytes);
        check_shape("memory bytes", state.memory_bytes, memory_bytes)?;
        check_count(state.vcpus.len(), state.possible_vcpus, config.vcpus)?;
        check_vcpus(config.vcpus, state.possible_vcpus)?;
        pages::check(&config.memory, memory_bytes, &state.samples)?;
        let memory = memory::map_private(config.memory, config.memory_bytes, config.added)?;
        let origin = Origin::Saved(Box::new(state));
        let mut machine = Self::make(config.kvm, memory, vcpus, None, origin)?;
        machine.added_bytes = added_bytes;
        Ok(machine)
    }

    /// The state of a paused machine, but for its devices and its memory.
    ///
    /// # Errors
    /// [`MachineError::State`] unless paused; a machine with a console; KVM refuses something.
    pub fn save(&self) -> Result<MachineState, MachineError> {
        if self.state() != State::Paused {
            return Err(self.wrong_state("be saved"));
        }
        if self.facts.console {
            let why = "a machine with a console cannot be saved";
            return Err(SnapshotError::Unsavable(why).into());
        }
        self.check_xsave()?;
        let vcpus = self
            .vcpus
            .iter()
            .map(|vcpu| vcpu.save(self.host.msrs()))
            .collect::<Result<_, _>>()?;
        Ok(MachineState {
            vmm_version: file::VERSION.to_owned(),
            processor: Some(self.processor()).into(),
            memory_bytes: self
                .memory
                .memory()
                .iter()
                .map(GuestMemoryRegion::len)
                .sum(),
            vcpus,
            possible_vcpus: self.possible,
            spare_slots: self.spares,
            added_memory_bytes: self.added_bytes,
            chips: Some(self.save_chips()?).into(),
            ..MachineState::default()
        })
    }

    fn save_chips(&self) -> Result<Chips, MachineError> {
        let irqchips = IRQCHIPS
            .iter()
            .map(|&chip_id| {
                let mut chip = kvm_irqchip {
                    chip_id,
                    ..kvm_irqchip::default()
                };
                self.vm
                    .get_irqchip(&mut chip)
                    .map_err(kvm("KVM_GET_IRQCHIP"))?;
                Ok(bytes(&chip))
            })
            .collect::<Result<_, MachineError>>()?;
        Ok(Chips {
            irqchips,
            pit: bytes(&self.vm.get_pit2().map_err(kvm("KVM_GET_PIT2"))?),
            clock_ns: self.vm.get_clock().map_err(kvm("KVM_GET_CLOCK"))?.clock,
            ..Chips::default()
        })
    }

    /// Gives the saved state to the vCPUs, and then to what they are connected with.
    pub(super) fn take_back(
        &self,
        saved: &MachineState,
        vcpus: &[VcpuFd],
    ) -> Result<(), MachineError> {
        self.check_xsave()?;
        self.check_processor(saved)?;
        for ((index, vcpu), saved) in (0..).zip(vcpus).zip(&saved.vcpus) {
            state::restore(vcpu, index, saved)?;
        }
        if let Some(first) = saved.vcpus.first() {
            for (index, vcpu) in (0..).zip(vcpus).skip(saved.vcpus.len()) {
                state::join_clock(vcpu, index, first)?;
            }
        }
        let chips = saved.chips.as_ref().ok_or(SnapshotError::Part {
            what: "the interrupt controllers' state",
        })?;
        for chip in &chips.irqchips {
            let chip: kvm_irqchip = value(chip, "an interrupt controller")?;
            self.vm.set_irqchip(&chip).map_err(kvm("KVM_SET_IRQCHIP"))?;
        }
        let pit: kvm_pit_state2 = value(&chips.pit, "the timer")?;
        self.vm.set_pit2(&pit).map_err(kvm("KVM_SET_PIT2"))?;
        // The guest's clock goes on where it stood, not where the host's is: no timer of the guest's is late.
        let clock = kvm_clock_data {
            clock: chips.clock_ns,
            ..kvm_clock_data::default()
        };
        self.vm.set_clock(&clock).map_err(kvm("KVM_SET_CLOCK"))
    }

    fn processor(&self) -> Processor {
        Processor {
            cpuid: self
                .host
                .for_vcpu(0, self.possible)
                .as_slice()
                .iter()
                .map(bytes)
                .collect(),
            tsc_khz: self.facts.tsc_khz.unwrap_or_default(),
            ..Processor::default()
        }
    }

    /// The guest has looked at its processor once and for all: this one must be the same.
    fn check_processor(&self, saved: &MachineState) -> Result<(), SnapshotError> {
        let here = self.processor();
        let differs = |what: String| Err(SnapshotError::Processor { what });
        if saved.processor.tsc_khz != here.tsc_khz {
            return differs(format!(
                "a time stamp counter of {} kHz, and here {} kHz",
                saved.processor.tsc_khz, here.tsc_khz
            ));
        }
        if saved.processor.cpuid.len() != here.cpuid.len() {
            return differs(format!(
                "{} CPUID leaves, and here {}",
                saved.processor.cpuid.len(),
                here.cpuid.len()
            ));
        }
        for (saved, here) in saved.processor.cpuid.iter().zip(&here.cpuid) {
            if saved != here {
                let leaf: kvm_cpuid_entry2 = value(here, "a CPUID leaf")?;
                return differs(format!("CPUID leaf {:#x}, {}", leaf.function, leaf.index));
            }
        }
        Ok(())
    }

    /// What is saved of the floating point state is a `kvm_xsave`.
    fn check_xsave(&self) -> Result<(), SnapshotError> {
        match self.xsave_bytes > size_of::<kvm_xsave>() {
            true => Err(SnapshotError::Unsavable(
                "this host's floating point state is larger than what a snapshot has room for",
            )),
            false => Ok(()),
        }
    }
}

/// A machine has every vCPU that was saved; the guest can start others that it knows of.
fn check_count(saved: usize, possible: u32, wanted: u32) -> Result<(), SnapshotError> {
    let enough = usize::try_from(wanted).is_ok_and(|wanted| wanted >= saved);
    if enough && wanted <= possible {
        return Ok(());
    }
    Err(SnapshotError::Shape {
        what: "vCPUs",
        saved: match usize::try_from(possible) {
            Ok(most) if most > saved => format!("{saved} to {possible}"),
            _ => saved.to_string(),
        },
        wanted: wanted.to_string(),
    })
}

fn check_shape(what: &'static str, saved: u64, wanted: u64) -> Result<(), SnapshotError> {
    match saved == wanted {
        true => Ok(()),
        false => Err(SnapshotError::Shape {
            what,
            saved: saved.to_string(),
            wanted: wanted.to_string(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_has_the_saved_vcpus_and_at_most_the_possible_ones() {
        for (saved, possible, wanted) in [(1, 8, 1), (1, 8, 8), (2, 2, 2), (3, 8, 5)] {
            check_count(saved, possible, wanted).unwrap();
        }
        let refused = |saved, possible, wanted| {
            let error = check_count(saved, possible, wanted).unwrap_err();
            error.to_string()
        };
        let text = refused(1, 8, 9);
        assert!(text.contains("vCPUs 1 to 8, and this one 9"), "{text}");
        let text = refused(3, 8, 2);
        assert!(text.contains("vCPUs 3 to 8, and this one 2"), "{text}");
        let text = refused(2, 2, 3);
        assert!(text.contains("vCPUs 2, and this one 3"), "{text}");
        refused(2, 2, 0);
        // A state that contradicts itself.
        refused(4, 2, 4);
    }
}
