//! Exits counted by reason.

use std::sync::atomic::{AtomicU64, Ordering};

/// Why KVM handed a vCPU to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitReason {
    /// A read outside of RAM.
    MmioRead,
    /// A write outside of RAM that no ioeventfd took.
    MmioWrite,
    /// A read of an I/O port.
    IoIn,
    /// A write to an I/O port.
    IoOut,
    /// An instruction that KVM's emulator gave up on.
    Emulate,
    /// `HLT` (in-kernel interrupt controllers keep it in KVM).
    Hlt,
    /// A triple fault.
    Shutdown,
    /// A signal: pause, stop, or something of the host's.
    Interrupted,
    /// Reset or power-off asked for by the guest through KVM.
    SystemEvent,
    /// Everything else.
    Other,
}

impl ExitReason {
    const ALL: [ExitReason; 10] = [
        ExitReason::MmioRead,
        ExitReason::MmioWrite,
        ExitReason::IoIn,
        ExitReason::IoOut,
        ExitReason::Emulate,
        ExitReason::Hlt,
        ExitReason::Shutdown,
        ExitReason::Interrupted,
        ExitReason::SystemEvent,
        ExitReason::Other,
    ];

    /// The name that `vmm.proto` gives it.
    pub fn name(self) -> &'static str {
        match self {
            ExitReason::MmioRead => "mmio_read",
            ExitReason::MmioWrite => "mmio_write",
            ExitReason::IoIn => "io_in",
            ExitReason::IoOut => "io_out",
            ExitReason::Emulate => "emulate",
            ExitReason::Hlt => "hlt",
            ExitReason::Shutdown => "shutdown",
            ExitReason::Interrupted => "intr",
            ExitReason::SystemEvent => "system_event",
            ExitReason::Other => "other",
        }
    }
}

/// How often each reason occurred. A vCPU's thread counts, any thread reads.
#[derive(Debug, Default)]
pub struct ExitStats {
    counts: [AtomicU64; ExitReason::ALL.len()],
}

impl ExitStats {
    /// Counts one exit.
    pub fn count(&self, reason: ExitReason) {
        if let Some(count) = self.counts.get(reason as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Every reason with its count, in a fixed order.
    pub fn snapshot(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        ExitReason::ALL
            .iter()
            .zip(&self.counts)
            .map(|(reason, count)| (reason.name(), count.load(Ordering::Relaxed)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_its_own_counter() {
        let stats = ExitStats::default();
        for (index, reason) in ExitReason::ALL.into_iter().enumerate() {
            for _ in 0..=index {
                stats.count(reason);
            }
        }
        let counts: Vec<_> = stats.snapshot().map(|(_, count)| count).collect();
        assert_eq!(counts, (1..=10).collect::<Vec<u64>>());
        let mut names: Vec<_> = stats.snapshot().map(|(name, _)| name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), 10);
    }
}
