//! The virtio-mmio window: register pages and interrupt lines.

use super::bus::BusDevice;
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

/// What the guest finds in a slot that has no device: the registers' page of virtio-mmio with device id 0, which
/// is no device (virtio 1.2, section 4.2.2). Its driver passes it over, and looks again when it is told to.
pub(super) struct Placeholder;

impl BusDevice for Placeholder {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let value: u32 = match offset {
            0 => u32::from_le_bytes(*b"virt"),
            4 => 2,
            _ => 0,
        };
        data.fill(0);
        if let Some(word) = data.first_chunk_mut() {
            *word = value.to_le_bytes();
        }
    }

    fn write(&self, _offset: u64, _data: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_slot_has_registers_and_no_device() {
        let read = |offset| {
            let mut word = [0xff; 4];
            Placeholder.read(offset, &mut word);
            u32::from_le_bytes(word)
        };
        assert_eq!((read(0), read(4), read(8)), (0x7472_6976, 2, 0));
        let mut narrow = [0xff; 2];
        Placeholder.read(0, &mut narrow);
        assert_eq!(narrow, [0; 2], "registers are read whole");
    }

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
