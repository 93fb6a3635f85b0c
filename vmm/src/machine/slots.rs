//! The virtio-mmio window: register pages and interrupt lines.

use crate::boot::layout::{FIRST_GSI, LAST_GSI, MMIO_SLOT_BYTES, MMIO_START};

/// A virtio-mmio device's place: made by [`super::Machine::allocate_slot`], used up by
/// [`super::Machine::connect`].
#[derive(Debug, PartialEq, Eq)]
pub struct MmioSlot {
    pub(super) base: u64,
    pub(super) gsi: u32,
}

impl MmioSlot {
    /// Guest-physical address of the register page.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Interrupt line, edge-triggered.
    pub fn gsi(&self) -> u32 {
        self.gsi
    }
}

/// Hands out slots in order.
#[derive(Debug, Default)]
pub(super) struct Slots {
    used: u32,
}

impl Slots {
    /// How many a machine has.
    pub(super) const COUNT: u32 = LAST_GSI - FIRST_GSI + 1;

    /// The next slot, or `None` if all are taken.
    pub(super) fn take(&mut self) -> Option<MmioSlot> {
        if self.used >= Self::COUNT {
            return None;
        }
        let slot = MmioSlot {
            base: MMIO_START + u64::from(self.used) * MMIO_SLOT_BYTES,
            gsi: FIRST_GSI + self.used,
        };
        self.used += 1;
        Some(slot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_distinct_and_end_at_the_last_line() {
        let mut slots = Slots::default();
        let taken: Vec<_> = std::iter::from_fn(|| slots.take()).collect();
        assert_eq!(taken.len(), 19);
        assert_eq!(
            taken[0],
            MmioSlot {
                base: 0xd000_0000,
                gsi: 5
            }
        );
        assert_eq!(
            taken[18],
            MmioSlot {
                base: 0xd001_2000,
                gsi: 23
            }
        );
        assert!(slots.take().is_none());
    }
}
