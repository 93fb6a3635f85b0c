//! Which hypervisor runs a sandbox: the one that was named, or the best that this host has.

use std::path::Path;

use super::{Error, Hypervisor, kvm, qemu};

/// A hypervisor, and what there is to say about it.
pub struct Choice {
    /// The hypervisor.
    pub hypervisor: Box<dyn Hypervisor>,
    /// One line for whoever did not ask for it.
    pub warning: Option<String>,
}

/// The hypervisor called `name`: `kvm`, `qemu`, or `auto`, which is KVM where /dev/kvm can be used, and QEMU's software
/// emulation elsewhere. `program` is QEMU.
///
/// # Errors
/// [`Error::Missing`]: QEMU is not installed.
pub fn choose(name: &str, program: &Path) -> Result<Choice, Error> {
    let kvm = || -> Box<dyn Hypervisor> { Box::new(kvm::Kvm) };
    let (hypervisor, warning) = match name {
        "kvm" => (kvm(), None),
        "qemu" => (qemu(program)?, None),
        _ => match (kvm::open_kvm(), qemu(program)) {
            (Ok(_), _) => (kvm(), None),
            (Err(why), Ok(qemu)) => (qemu, Some(emulation(&why))),
            // Neither: KVM's reason is the one to act on, and QEMU's the other way out.
            (Err(why), Err(other)) => {
                return Err(Error::Neither {
                    kvm: Box::new(why),
                    qemu: Box::new(other),
                });
            }
        },
    };
    Ok(Choice {
        hypervisor,
        warning,
    })
}

fn qemu(program: &Path) -> Result<Box<dyn Hypervisor>, Error> {
    Ok(Box::new(qemu::Qemu::find(program)?))
}

fn emulation(why: &Error) -> String {
    format!(
        "no KVM here ({why}): QEMU's software emulation runs the sandbox, which is slow and no security boundary"
    )
}
