//! Instructions that KVM's emulator gives up on, completed here.
//!
//! Where KVM has no hardware virtualization, the guest's kernel mode runs in KVM's instruction emulator, which
//! does not know `XSAVE`, `XRSTOR`, `FWAIT` and `INT3`. A Linux guest needs them: its user mode runs on the real
//! processor, finds the AVX registers there, uses them, and its kernel has to save them. KVM then leaves with
//! `KVM_EXIT_INTERNAL_ERROR` and the instruction's bytes, and [`Emulator::complete`] does what the processor would have
//! done. Hosts with hardware virtualization never get here.

mod decode;
mod paging;
mod xstate;

use kvm_bindings::{kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xsave};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};

use crate::device::GuestMemory;
use decode::{Instruction, Operand, Operation};
use paging::{AddressSpace, Fault};
use xstate::{KVM_AREA_BYTES, Layout, MIN_AREA_BYTES};

// Exception vectors (Intel SDM volume 3, table 6-1).
const BREAKPOINT: u8 = 3;
const INVALID_OPCODE: u8 = 6;
const DEVICE_NOT_AVAILABLE: u8 = 7;
const GENERAL_PROTECTION: u8 = 13;
const PAGE_FAULT: u8 = 14;

const CR0_MONITOR_COPROCESSOR: u64 = 1 << 1;
const CR0_TASK_SWITCHED: u64 = 1 << 3;
const AREA_ALIGNMENT: u64 = 64;
const USER_MODE: u16 = 3;

/// Why an instruction could not be completed. The vCPU cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum EmulateError {
    /// The instruction is none of those completed here.
    #[error("KVM cannot emulate the instruction {bytes:02x?} at {rip:#x}, and neither can we")]
    Unknown {
        /// Its first bytes.
        bytes: Vec<u8>,
        /// Where it is.
        rip: u64,
    },
    /// The operand, or a page table on the way to it, is not in RAM.
    #[error("the instruction at {rip:#x} has its operand outside of memory, at {address:#x}")]
    NotMemory {
        /// Where the instruction is.
        rip: u64,
        /// Guest-physical address.
        address: u64,
    },
    /// KVM refused to give or take registers.
    #[error("{action} for the instruction at {rip:#x}: {source}")]
    Kvm {
        /// What was asked of KVM.
        action: &'static str,
        /// Where the instruction is.
        rip: u64,
        /// Why it refused.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// This host's vCPU state is larger than what this module handles.
    #[error("KVM's XSAVE area of {0} bytes is larger than {KVM_AREA_BYTES}")]
    AreaSize(i32),
}

/// An exception to raise in the guest instead of completing the instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Exception {
    vector: u8,
    error_code: Option<u32>,
    /// The faulting address, of a page fault.
    cr2: Option<u64>,
}

impl Exception {
    fn new(vector: u8) -> Self {
        Self {
            vector,
            error_code: None,
            cr2: None,
        }
    }

    fn protection() -> Self {
        Self {
            error_code: Some(0),
            ..Self::new(GENERAL_PROTECTION)
        }
    }
}

/// What an instruction came to.
enum Completion {
    /// It is done: go on after it.
    Done,
    /// Go on after it with an exception (a trap).
    Trap(Exception),
    /// It cannot be done: an exception at its own address.
    Fault(Exception),
}

/// Completes instructions for one vCPU.
pub struct Emulator {
    memory: GuestMemory,
    layout: Layout,
}

impl Emulator {
    /// For a vCPU of `vm`, whose RAM is `memory`.
    ///
    /// # Errors
    /// [`EmulateError::AreaSize`]: the host's area has dynamically enabled components.
    pub fn new(vm: &VmFd, memory: GuestMemory) -> Result<Self, EmulateError> {
        let size = vm.check_extension_int(Cap::Xsave2);
        if usize::try_from(size).is_ok_and(|size| size > KVM_AREA_BYTES) {
            return Err(EmulateError::AreaSize(size));
        }
        Ok(Self {
            memory,
            layout: Layout::of_host(),
        })
    }

    /// Completes the instruction at the vCPU's RIP; `bytes` are its first bytes as KVM gave them, or nothing.
    ///
    /// # Errors
    /// See [`EmulateError`].
    pub fn complete(&self, vcpu: &VcpuFd, bytes: &[u8]) -> Result<(), EmulateError> {
        let regs = vcpu.get_regs().map_err(kvm("KVM_GET_REGS", 0))?;
        let rip = regs.rip;
        let sregs = vcpu.get_sregs().map_err(kvm("KVM_GET_SREGS", rip))?;
        let memory = self.memory.memory();
        let step = Step {
            vcpu,
            layout: &self.layout,
            memory: &memory,
            regs,
            sregs,
        };
        if sregs.cs.selector & USER_MODE == USER_MODE {
            // User mode runs on the processor itself. What reaches the emulator from there is what KVM would
            // have answered with #UD, had we not asked for this exit.
            return step.raise(Exception::new(INVALID_OPCODE));
        }
        let unknown = || EmulateError::Unknown {
            bytes: bytes.to_vec(),
            rip,
        };
        if sregs.cs.l == 0 {
            return Err(unknown());
        }
        let instruction = decode::decode(bytes).ok_or_else(unknown)?;
        step.finish(instruction)
    }
}

/// One instruction on its way.
struct Step<'a> {
    vcpu: &'a VcpuFd,
    layout: &'a Layout,
    memory: &'a GuestMemoryMmap,
    regs: kvm_regs,
    sregs: kvm_sregs,
}

impl Step<'_> {
    fn finish(mut self, instruction: Instruction) -> Result<(), EmulateError> {
        let next = self.regs.rip.wrapping_add(u64::from(instruction.length));
        let exception = match self.execute(&instruction, next)? {
            Completion::Fault(exception) => return self.raise(exception),
            Completion::Trap(exception) => Some(exception),
            Completion::Done => None,
        };
        self.regs.rip = next;
        self.vcpu
            .set_regs(&self.regs)
            .map_err(self.kvm("KVM_SET_REGS"))?;
        exception.map_or(Ok(()), |exception| self.raise(exception))
    }

    fn execute(&self, instruction: &Instruction, next: u64) -> Result<Completion, EmulateError> {
        let cr0 = self.sregs.cr0;
        match (instruction.operation, instruction.operand) {
            (Operation::Int3, _) => Ok(Completion::Trap(Exception::new(BREAKPOINT))),
            (Operation::Fwait, _) => {
                let wait = CR0_MONITOR_COPROCESSOR | CR0_TASK_SWITCHED;
                if cr0 & wait == wait {
                    return Ok(Completion::Fault(Exception::new(DEVICE_NOT_AVAILABLE)));
                }
                // A pending x87 exception is raised by the next x87 instruction of user mode.
                Ok(Completion::Done)
            }
            (_, None) => Ok(Completion::Fault(Exception::new(INVALID_OPCODE))),
            (operation, Some(operand)) => {
                if cr0 & CR0_TASK_SWITCHED != 0 {
                    return Ok(Completion::Fault(Exception::new(DEVICE_NOT_AVAILABLE)));
                }
                self.extended_state(operation, &operand, instruction.wide, next)
            }
        }
    }

    /// `XSAVE` and `XRSTOR`.
    fn extended_state(
        &self,
        operation: Operation,
        operand: &Operand,
        wide: bool,
        next: u64,
    ) -> Result<Completion, EmulateError> {
        let address = operand.address(&self.regs, &self.sregs, next);
        if !address.is_multiple_of(AREA_ALIGNMENT) {
            return Ok(Completion::Fault(Exception::protection()));
        }
        let requested = (self.regs.rdx << 32) | (self.regs.rax & 0xffff_ffff);
        // XCR0 is the host's, as CPUID is: KVM's idea of the guest's says nothing about what user mode uses.
        let components = self.layout.existing(requested);
        let done = if operation == Operation::Xsave {
            self.xsave(address, components, wide)
        } else {
            self.xrstor(address, components)
        };
        match done {
            Ok(()) => Ok(Completion::Done),
            Err(Stopped::Error(error)) => Err(error),
            Err(Stopped::Invalid) => Ok(Completion::Fault(Exception::protection())),
            Err(Stopped::Fault(fault)) => self.operand_fault(fault),
        }
    }

    fn xsave(&self, address: u64, components: u64, wide: bool) -> Result<(), Stopped> {
        let state = self.state()?;
        let space = AddressSpace::new(self.memory, &self.sregs);
        space.modify(address, self.layout.extent(components), |area| {
            xstate::save(area, &state, components, self.layout, wide);
        })?;
        Ok(())
    }

    fn xrstor(&self, address: u64, components: u64) -> Result<(), Stopped> {
        let space = AddressSpace::new(self.memory, &self.sregs);
        let mut area = vec![0; MIN_AREA_BYTES];
        space.read(address, &mut area)?;
        // Components that the area does not hold need not be there.
        let held = components & self.layout.existing(xstate::in_use(&area));
        area.resize(self.layout.extent(held), 0);
        space.read(address, &mut area)?;
        let mut state = self.state()?;
        xstate::restore(&mut state, &area, components, self.layout)
            .map_err(|xstate::Invalid| Stopped::Invalid)?;
        self.set_state(&state)?;
        Ok(())
    }

    /// The vCPU's XSAVE area.
    fn state(&self) -> Result<Vec<u8>, EmulateError> {
        let xsave = self.vcpu.get_xsave().map_err(self.kvm("KVM_GET_XSAVE"))?;
        Ok(xsave
            .region
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect())
    }

    fn set_state(&self, state: &[u8]) -> Result<(), EmulateError> {
        let mut xsave = kvm_xsave::default();
        for (word, bytes) in xsave.region.iter_mut().zip(state.chunks_exact(4)) {
            *word = u32::from_le_bytes(bytes.try_into().unwrap_or_default());
        }
        // SAFETY: `Emulator::new` has made sure that KVM reads no more than a `kvm_xsave`.
        unsafe { self.vcpu.set_xsave(&xsave) }.map_err(self.kvm("KVM_SET_XSAVE"))
    }

    fn operand_fault(&self, fault: Fault) -> Result<Completion, EmulateError> {
        match fault {
            Fault::NotCanonical => Ok(Completion::Fault(Exception::protection())),
            Fault::Page { address, code } => Ok(Completion::Fault(Exception {
                vector: PAGE_FAULT,
                error_code: Some(code),
                cr2: Some(address),
            })),
            Fault::NotMemory(address) => Err(EmulateError::NotMemory {
                rip: self.regs.rip,
                address: address.0,
            }),
        }
    }

    /// Lets the guest take `exception` when it next runs.
    fn raise(&self, exception: Exception) -> Result<(), EmulateError> {
        if let Some(address) = exception.cr2 {
            let sregs = kvm_sregs {
                cr2: address,
                ..self.sregs
            };
            self.vcpu
                .set_sregs(&sregs)
                .map_err(self.kvm("KVM_SET_SREGS"))?;
        }
        let mut events = self
            .vcpu
            .get_vcpu_events()
            .map_err(self.kvm("KVM_GET_VCPU_EVENTS"))?;
        inject(&mut events, exception);
        self.vcpu
            .set_vcpu_events(&events)
            .map_err(self.kvm("KVM_SET_VCPU_EVENTS"))
    }

    fn kvm(&self, action: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> EmulateError {
        kvm(action, self.regs.rip)
    }
}

fn inject(events: &mut kvm_vcpu_events, exception: Exception) {
    events.exception.injected = 1;
    events.exception.nr = exception.vector;
    events.exception.has_error_code = u8::from(exception.error_code.is_some());
    events.exception.error_code = exception.error_code.unwrap_or_default();
}

fn kvm(action: &'static str, rip: u64) -> impl FnOnce(kvm_ioctls::Error) -> EmulateError {
    move |source| EmulateError::Kvm {
        action,
        rip,
        source,
    }
}

/// Why an `XSAVE` or `XRSTOR` was not completed.
enum Stopped {
    /// The operand cannot be reached.
    Fault(Fault),
    /// The operand is no valid area.
    Invalid,
    /// We cannot go on.
    Error(EmulateError),
}

impl From<Fault> for Stopped {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

impl From<EmulateError> for Stopped {
    fn from(error: EmulateError) -> Self {
        Self::Error(error)
    }
}
