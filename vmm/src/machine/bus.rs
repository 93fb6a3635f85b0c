//! The address spaces that a guest's access can leave KVM through, and who answers there.

use std::sync::Arc;

/// Answers accesses to a range of guest-physical addresses (MMIO) or of ports.
///
/// Called from every vCPU's thread. `offset` counts from the range's start and the whole access lies inside the
/// range; its width is the guest's choice (1, 2, 4 or 8 bytes).
pub trait BusDevice: Send + Sync {
    /// Fills `data` with what the guest reads.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Takes what the guest writes.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Ranges that do not overlap, each with its device.
#[derive(Default, Clone)]
pub struct Bus {
    // Sorted by base.
    ranges: Vec<Range>,
}

#[derive(Clone)]
struct Range {
    base: u64,
    len: u64,
    device: Arc<dyn BusDevice>,
}

/// Why a range could not be added to a [`Bus`].
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    /// The range is empty or passes the end of the address space.
    #[error("bus range {base:#x}+{len:#x} is empty or too long")]
    Range {
        /// First address.
        base: u64,
        /// Bytes.
        len: u64,
    },
    /// Another device answers in the range.
    #[error("bus range {base:#x}+{len:#x} overlaps another")]
    Overlap {
        /// First address.
        base: u64,
        /// Bytes.
        len: u64,
    },
}

impl Bus {
    /// Gives the range of `len` addresses from `base` to `device`.
    ///
    /// # Errors
    /// See [`BusError`].
    pub fn insert(
        &mut self,
        base: u64,
        len: u64,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), BusError> {
        let end = base
            .checked_add(len)
            .filter(|_| len > 0)
            .ok_or(BusError::Range { base, len })?;
        let at = self.ranges.partition_point(|range| range.base < base);
        let before = at.checked_sub(1).and_then(|index| self.ranges.get(index));
        if before.is_some_and(|range| range.base + range.len > base)
            || self.ranges.get(at).is_some_and(|range| range.base < end)
        {
            return Err(BusError::Overlap { base, len });
        }
        self.ranges.insert(at, Range { base, len, device });
        Ok(())
    }

    /// Reads at `address`; false, with `data` all ones as on an empty bus, where nobody answers.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        match self.find(address, data.len()) {
            Some((device, offset)) => {
                device.read(offset, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// Writes at `address`; false where nobody answers.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some((device, offset)) => {
                device.write(offset, data);
                true
            }
            None => false,
        }
    }

    fn find(&self, address: u64, width: usize) -> Option<(&dyn BusDevice, u64)> {
        let at = self.ranges.partition_point(|range| range.base <= address);
        let range = self.ranges.get(at.checked_sub(1)?)?;
        let offset = address - range.base;
        let end = offset.checked_add(u64::try_from(width).ok()?)?;
        (end <= range.len).then(|| (range.device.as_ref(), offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo;

    impl BusDevice for Echo {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, _offset: u64, _data: &[u8]) {}
    }

    #[test]
    fn accesses_reach_the_device_of_their_range_and_no_other() {
        let mut bus = Bus::default();
        bus.insert(0x1000, 0x100, Arc::new(Echo)).unwrap();
        bus.insert(0x2000, 0x100, Arc::new(Echo)).unwrap();
        let mut data = [0; 4];
        assert!(bus.read(0x10f0, &mut data));
        assert_eq!(data, [0xf0; 4]);
        assert!(!bus.read(0x10fe, &mut data), "straddles the end");
        assert_eq!(data, [0xff; 4]);
        assert!(!bus.read(0xfff, &mut data));
        assert!(!bus.write(u64::MAX, &data));
    }

    #[test]
    fn overlapping_and_empty_ranges_are_refused() {
        let mut bus = Bus::default();
        bus.insert(0x1000, 0x100, Arc::new(Echo)).unwrap();
        for (base, len) in [(0xfff, 2), (0x1000, 1), (0x10ff, 1), (0x800, 0x1000)] {
            assert!(matches!(
                bus.insert(base, len, Arc::new(Echo)),
                Err(BusError::Overlap { .. })
            ));
        }
        assert!(matches!(
            bus.insert(5, 0, Arc::new(Echo)),
            Err(BusError::Range { .. })
        ));
        assert!(matches!(
            bus.insert(u64::MAX, 2, Arc::new(Echo)),
            Err(BusError::Range { .. })
        ));
        bus.insert(0x1100, 1, Arc::new(Echo)).unwrap();
    }
}
