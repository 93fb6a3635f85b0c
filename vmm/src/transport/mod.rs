//! How a guest's driver reaches a device.

pub mod mmio;
