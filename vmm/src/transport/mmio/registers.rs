//! The register file: what a driver selects, negotiates and sets up before it uses a device.

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemory};

use super::VERSION_1;

/// A register of virtio-mmio version 2, by its offset (virtio 1.2, section 4.2.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub(super) enum Register {
    MagicValue = 0x000,
    Version = 0x004,
    DeviceId = 0x008,
    VendorId = 0x00c,
    DeviceFeatures = 0x010,
    DeviceFeaturesSel = 0x014,
    DriverFeatures = 0x020,
    DriverFeaturesSel = 0x024,
    QueueSel = 0x030,
    QueueNumMax = 0x034,
    QueueNum = 0x038,
    QueueReady = 0x044,
    QueueNotify = 0x050,
    InterruptStatus = 0x060,
    InterruptAck = 0x064,
    Status = 0x070,
    QueueDescLow = 0x080,
    QueueDescHigh = 0x084,
    QueueDriverLow = 0x090,
    QueueDriverHigh = 0x094,
    QueueDeviceLow = 0x0a0,
    QueueDeviceHigh = 0x0a4,
    ShmLenLow = 0x0b0,
    ShmLenHigh = 0x0b4,
    ShmBaseLow = 0x0b8,
    ShmBaseHigh = 0x0bc,
    ConfigGeneration = 0x0fc,
}

impl Register {
    const ALL: [Self; 27] = [
        Self::MagicValue,
        Self::Version,
        Self::DeviceId,
        Self::VendorId,
        Self::DeviceFeatures,
        Self::DeviceFeaturesSel,
        Self::DriverFeatures,
        Self::DriverFeaturesSel,
        Self::QueueSel,
        Self::QueueNumMax,
        Self::QueueNum,
        Self::QueueReady,
        Self::QueueNotify,
        Self::InterruptStatus,
        Self::InterruptAck,
        Self::Status,
        Self::QueueDescLow,
        Self::QueueDescHigh,
        Self::QueueDriverLow,
        Self::QueueDriverHigh,
        Self::QueueDeviceLow,
        Self::QueueDeviceHigh,
        Self::ShmLenLow,
        Self::ShmLenHigh,
        Self::ShmBaseLow,
        Self::ShmBaseHigh,
        Self::ConfigGeneration,
    ];

    /// The register at `offset`, if there is one.
    pub(super) fn at(offset: u64) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|&register| register as u64 == offset)
    }
}

/// What the driver has written: all of a transport's state that is not the device's or an interrupt's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TransportState {
    /// Device status bits (virtio 1.2, section 2.1) but for `DEVICE_NEEDS_RESET`.
    pub status: u32,
    /// Feature bits that the driver accepts.
    pub driver_features: u64,
    /// Which half of the device's features is read.
    pub device_features_select: u32,
    /// Which half of the driver's features is written.
    pub driver_features_select: u32,
    /// Which queue the queue registers are about.
    pub queue_select: u32,
    /// The queues.
    pub queues: Vec<QueueState>,
}

/// What the driver has set up of a queue.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct QueueState {
    /// The largest size that the device has.
    pub max_size: u16,
    /// The size that the driver chose, as it wrote it.
    pub size: u32,
    /// The driver may use it: size and rings are valid.
    pub ready: bool,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the available ring.
    pub available: u64,
    /// Guest-physical address of the used ring.
    pub used: u64,
}

/// What a write to the status register asks of the transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StatusChange {
    None,
    Reset,
    Activate,
}

impl TransportState {
    pub(super) fn new(sizes: &[u16]) -> Self {
        let queues = sizes
            .iter()
            .map(|&max_size| QueueState {
                max_size,
                ..QueueState::default()
            })
            .collect();
        Self {
            status: 0,
            driver_features: 0,
            device_features_select: 0,
            driver_features_select: 0,
            queue_select: 0,
            queues,
        }
    }

    pub(super) fn reset(&mut self) {
        let sizes: Vec<u16> = self.queues.iter().map(|queue| queue.max_size).collect();
        *self = Self::new(&sizes);
    }

    fn has(&self, bit: u32) -> bool {
        self.status & bit != 0
    }

    /// Takes a write of the status register. A write that takes a bit back, or a step before the one that it
    /// follows, is ignored; so is `FEATURES_OK` on features that were not offered, which is how the
    /// driver learns of it.
    pub(super) fn change_status(&mut self, value: u32, features: u64) -> StatusChange {
        if value == 0 {
            return StatusChange::Reset;
        }
        if self.status & !value != 0 {
            return StatusChange::None;
        }
        let (mut reached, mut change) = (true, StatusChange::None);
        for step in [
            VIRTIO_CONFIG_S_ACKNOWLEDGE,
            VIRTIO_CONFIG_S_DRIVER,
            VIRTIO_CONFIG_S_FEATURES_OK,
            VIRTIO_CONFIG_S_DRIVER_OK,
        ] {
            let wanted = value & step != 0 && !self.has(step) && !self.has(VIRTIO_CONFIG_S_FAILED);
            let acceptable =
                step != VIRTIO_CONFIG_S_FEATURES_OK || self.features_acceptable(features);
            if wanted && reached && acceptable {
                self.status |= step;
                if step == VIRTIO_CONFIG_S_DRIVER_OK {
                    change = StatusChange::Activate;
                }
            }
            reached = self.has(step);
        }
        self.status |= value & VIRTIO_CONFIG_S_FAILED;
        change
    }

    fn features_acceptable(&self, offered: u64) -> bool {
        self.driver_features & !offered == 0 && self.driver_features & VERSION_1 != 0
    }

    fn queue(&self) -> Option<&QueueState> {
        self.queues.get(usize::try_from(self.queue_select).ok()?)
    }

    /// The selected queue where the driver may still set it up.
    fn queue_in_setup(&mut self) -> Option<&mut QueueState> {
        let in_setup = self.has(VIRTIO_CONFIG_S_DRIVER)
            && !self.has(VIRTIO_CONFIG_S_DRIVER_OK | VIRTIO_CONFIG_S_FAILED);
        let index = usize::try_from(self.queue_select).ok()?;
        self.queues.get_mut(index).filter(|_| in_setup)
    }

    pub(super) fn read(&self, register: Register, features: u64) -> u32 {
        match register {
            Register::DeviceFeatures => match self.device_features_select {
                0 => features as u32,
                1 => (features >> 32) as u32,
                _ => 0,
            },
            Register::QueueNumMax => self.queue().map_or(0, |queue| queue.max_size.into()),
            Register::QueueReady => self.queue().is_some_and(|queue| queue.ready).into(),
            // No device has shared memory: its length reads as all ones (section 4.2.2).
            Register::ShmLenLow | Register::ShmLenHigh => u32::MAX,
            Register::ShmBaseLow | Register::ShmBaseHigh => u32::MAX,
            _ => 0,
        }
    }

    pub(super) fn write<M: GuestMemory>(&mut self, register: Register, value: u32, memory: &M) {
        match register {
            Register::DeviceFeaturesSel => self.device_features_select = value,
            Register::DriverFeaturesSel => self.driver_features_select = value,
            Register::QueueSel => self.queue_select = value,
            Register::DriverFeatures => self.accept_features(value),
            Register::QueueReady => {
                if let Some(queue) = self.queue_in_setup() {
                    queue.ready = value == 1 && queue.is_valid(memory);
                }
            }
            other => {
                // A queue that is in use stays as it is.
                if let Some(queue) = self.queue_in_setup().filter(|queue| !queue.ready) {
                    queue.write(other, value);
                }
            }
        }
    }

    fn accept_features(&mut self, value: u32) {
        let open = self.has(VIRTIO_CONFIG_S_DRIVER) && !self.has(VIRTIO_CONFIG_S_FEATURES_OK);
        let value = u64::from(value);
        match self.driver_features_select {
            0 if open => self.driver_features = self.driver_features & !0xffff_ffff | value,
            1 if open => self.driver_features = self.driver_features & 0xffff_ffff | value << 32,
            _ => {}
        }
    }

    /// The queues as the driver set them up; `None` if one is not ready.
    pub(super) fn build_queues<M: GuestMemory>(&self, memory: &M) -> Option<Vec<Queue>> {
        let event_idx = self.driver_features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        self.queues
            .iter()
            .map(|state| {
                let mut queue = state.build(memory).filter(|_| state.ready)?;
                queue.set_event_idx(event_idx);
                Some(queue)
            })
            .collect()
    }
}

impl QueueState {
    fn write(&mut self, register: Register, value: u32) {
        match register {
            Register::QueueNum => self.size = value,
            Register::QueueDescLow => set_low(&mut self.descriptors, value),
            Register::QueueDescHigh => set_high(&mut self.descriptors, value),
            Register::QueueDriverLow => set_low(&mut self.available, value),
            Register::QueueDriverHigh => set_high(&mut self.available, value),
            Register::QueueDeviceLow => set_low(&mut self.used, value),
            Register::QueueDeviceHigh => set_high(&mut self.used, value),
            _ => {}
        }
    }

    fn is_valid<M: GuestMemory>(&self, memory: &M) -> bool {
        self.build(memory).is_some()
    }

    /// The queue, if its size is a power of two that the device has and its rings are aligned and inside of guest
    /// memory.
    fn build<M: GuestMemory>(&self, memory: &M) -> Option<Queue> {
        let size = u16::try_from(self.size).ok()?;
        let entries = usize::from(size);
        // Sizes as in virtio 1.2, section 2.7, with the event index of each ring.
        for (address, len) in [
            (self.descriptors, 16 * entries),
            (self.available, 6 + 2 * entries),
            (self.used, 6 + 8 * entries),
        ] {
            if !memory.check_range(GuestAddress(address), len) {
                return None;
            }
        }
        let mut queue = Queue::new(self.max_size).ok()?;
        queue.try_set_size(size).ok()?;
        queue
            .try_set_desc_table_address(GuestAddress(self.descriptors))
            .ok()?;
        queue
            .try_set_avail_ring_address(GuestAddress(self.available))
            .ok()?;
        queue
            .try_set_used_ring_address(GuestAddress(self.used))
            .ok()?;
        queue.set_ready(true);
        Some(queue)
    }
}

fn set_low(address: &mut u64, value: u32) {
    *address = *address & !0xffff_ffff | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = *address & 0xffff_ffff | u64::from(value) << 32;
}
