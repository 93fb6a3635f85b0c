//! Cella's virtual machine monitor: one KVM virtual machine in one jailed process.
//!
//! | module | what lives there |
//! | --- | --- |
//! | [`boot`] | what the guest finds in memory when it starts: kernel, command line, MP table, boot parameters |
//! | [`vcpu`] | a virtual CPU's thread, its states, what each KVM exit means, and what KVM's emulator leaves to us |
//! | [`machine`] | memory, CPUs, interrupts and devices put together; start, pause, resume, stop |
//! | [`device`] | virtio devices, which know no transport |
//! | [`transport`] | how a guest's driver reaches a device: virtio-mmio |
//! | [`snapshot`] | a machine on disk |
//! | [`jail`] | everything the process gives up before the first guest instruction |
//! | [`control`] | `vmm.proto` on the inherited socket |

pub mod boot;
pub mod control;
pub mod device;
pub mod jail;
pub mod machine;
pub mod snapshot;
pub mod transport;
pub mod vcpu;
