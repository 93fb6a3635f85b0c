//! A vCPU's whole state: read from one that waits, given to a new one.

use cella_proto::snapshot::{Msr, VcpuState};
use kvm_bindings::{Msrs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs};
use kvm_bindings::{kvm_debugregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave};
use kvm_ioctls::VcpuFd;
use zerocopy::FromBytes;

use super::VcpuError;
use crate::snapshot::{bytes, value};

/// Registers set in one call: far below KVM's limit of 256.
const BATCH: usize = 128;

/// Reads the state of vCPU `index`, which does not run and has no exit half done. `msrs` are the registers that KVM has;
/// those that this vCPU has not are left out.
///
/// # Errors
/// KVM refuses something.
pub fn save(vcpu: &VcpuFd, index: u32, msrs: &[u32]) -> Result<VcpuState, VcpuError> {
    let kvm = |action| kvm(index, action);
    Ok(VcpuState {
        regs: bytes(&vcpu.get_regs().map_err(kvm("KVM_GET_REGS"))?),
        sregs: bytes(&vcpu.get_sregs().map_err(kvm("KVM_GET_SREGS"))?),
        lapic: bytes(&vcpu.get_lapic().map_err(kvm("KVM_GET_LAPIC"))?),
        events: bytes(&vcpu.get_vcpu_events().map_err(kvm("KVM_GET_VCPU_EVENTS"))?),
        mp_state: vcpu
            .get_mp_state()
            .map_err(kvm("KVM_GET_MP_STATE"))?
            .mp_state,
        xcrs: bytes(&vcpu.get_xcrs().map_err(kvm("KVM_GET_XCRS"))?),
        xsave: bytes(&vcpu.get_xsave().map_err(kvm("KVM_GET_XSAVE"))?),
        debug_regs: bytes(&vcpu.get_debug_regs().map_err(kvm("KVM_GET_DEBUGREGS"))?),
        msrs: msrs
            .iter()
            .filter_map(|&msr| Some((msr, read_msr(vcpu, index, msr).transpose()?)))
            .map(|(index, value)| {
                Ok(Msr {
                    index,
                    value: value?,
                    ..Msr::default()
                })
            })
            .collect::<Result<_, VcpuError>>()?,
        ..VcpuState::default()
    })
}

/// Gives `state` to the new vCPU `index`, whose CPUID is set.
///
/// # Errors
/// KVM refuses something, or a part of the state is missing.
pub fn restore(vcpu: &VcpuFd, index: u32, state: &VcpuState) -> Result<(), VcpuError> {
    let kvm = |action| kvm(index, action);
    let mp_state = kvm_mp_state {
        mp_state: state.mp_state,
    };
    vcpu.set_mp_state(mp_state)
        .map_err(kvm("KVM_SET_MP_STATE"))?;
    let sregs: kvm_sregs = part(index, &state.sregs, "the segment and control registers")?;
    vcpu.set_sregs(&sregs).map_err(kvm("KVM_SET_SREGS"))?;
    let regs: kvm_regs = part(index, &state.regs, "the general registers")?;
    vcpu.set_regs(&regs).map_err(kvm("KVM_SET_REGS"))?;
    let xcrs: kvm_xcrs = part(index, &state.xcrs, "the extended control registers")?;
    vcpu.set_xcrs(&xcrs).map_err(kvm("KVM_SET_XCRS"))?;
    let xsave: kvm_xsave = part(index, &state.xsave, "the floating point state")?;
    // SAFETY: the machine makes sure that KVM reads no more than a `kvm_xsave`: a host with a larger area saves nothing
    // and takes nothing back.
    unsafe { vcpu.set_xsave(&xsave) }.map_err(kvm("KVM_SET_XSAVE"))?;
    let debug_regs: kvm_debugregs = part(index, &state.debug_regs, "the debug registers")?;
    vcpu.set_debug_regs(&debug_regs)
        .map_err(kvm("KVM_SET_DEBUGREGS"))?;
    let lapic: kvm_lapic_state = part(index, &state.lapic, "the local APIC")?;
    vcpu.set_lapic(&lapic).map_err(kvm("KVM_SET_LAPIC"))?;
    set_msrs(vcpu, index, &state.msrs)?;
    let events: kvm_vcpu_events = part(index, &state.events, "the pending events")?;
    vcpu.set_vcpu_events(&events)
        .map_err(kvm("KVM_SET_VCPU_EVENTS"))
}

/// The time stamp counter, and what was added to it (Intel SDM volume 4).
const CLOCK_MSRS: [u32; 2] = [0x10, 0x3b];

/// Gives the new vCPU `index` the time stamp counter of `first`, which was just restored: KVM counts a value that fits to what another
/// vCPU got within the last second as the same counter, and a guest that finds two different ones trusts none.
///
/// # Errors
/// KVM refuses it.
pub fn join_clock(vcpu: &VcpuFd, index: u32, first: &VcpuState) -> Result<(), VcpuError> {
    let saved = first.msrs.iter();
    let clock: Vec<_> = saved
        .filter(|msr| CLOCK_MSRS.contains(&msr.index))
        .cloned()
        .collect();
    set_msrs(vcpu, index, &clock)
}

fn part<T: FromBytes>(index: u32, bytes: &[u8], what: &'static str) -> Result<T, VcpuError> {
    value(bytes, what).map_err(|source| VcpuError::Snapshot { index, source })
}

/// In the order of KVM's list, in which the time stamp counter comes before what is counted by it.
fn set_msrs(vcpu: &VcpuFd, index: u32, msrs: &[Msr]) -> Result<(), VcpuError> {
    let entries: Vec<_> = msrs.iter().map(|msr| entry(msr.index, msr.value)).collect();
    let mut rest = entries.as_slice();
    while !rest.is_empty() {
        let batch = rest.get(..BATCH).unwrap_or(rest);
        let list = Msrs::from_entries(batch).map_err(|_| VcpuError::Msrs { index })?;
        let set = vcpu.set_msrs(&list).map_err(kvm(index, "KVM_SET_MSRS"))?;
        rest = rest.get(set..).unwrap_or_default();
        // KVM stops before the first that it refuses. Some can be read and not be written: no harm as long as they
        // hold what they should.
        if set < batch.len()
            && let Some((refused, after)) = rest.split_first()
        {
            if read_msr(vcpu, index, refused.index)? != Some(refused.data) {
                return Err(VcpuError::Msr {
                    index,
                    msr: refused.index,
                    value: refused.data,
                });
            }
            rest = after;
        }
    }
    Ok(())
}

/// `None`: this vCPU does not have it.
fn read_msr(vcpu: &VcpuFd, index: u32, msr: u32) -> Result<Option<u64>, VcpuError> {
    let mut list = Msrs::from_entries(&[entry(msr, 0)]).map_err(|_| VcpuError::Msrs { index })?;
    let read = vcpu
        .get_msrs(&mut list)
        .map_err(kvm(index, "KVM_GET_MSRS"))?;
    Ok(list
        .as_slice()
        .first()
        .filter(|_| read == 1)
        .map(|entry| entry.data))
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..kvm_msr_entry::default()
    }
}

fn kvm(index: u32, action: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VcpuError {
    move |source| VcpuError::Kvm {
        index,
        action,
        source,
    }
}
