//! Everything that the process gives up before the first guest instruction.

/// What a thread of the VMM does, which decides what it may still ask of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadKind {
    /// The main thread: the control socket, and the event loop of vsock and rng.
    Main,
    /// One for each vCPU: `KVM_RUN` and the accesses that it returns with.
    Vcpu,
    /// One for each block device: reads, writes and flushes of its file.
    Block,
    /// The file server: acts as the guest's users inside the shared directory.
    Fs,
}
