//! Devices that came with a restored machine: they are in slots that were empty when the kernel looked.

use std::path::Path;

const DEVICES: &str = "/sys/bus/platform/devices";
const BIND: &str = "/sys/bus/platform/drivers/virtio-mmio/bind";
/// As the kernel calls the slots of its command line.
const PREFIX: &str = "virtio-mmio.";

/// Has the kernel look into every virtio-mmio slot that has no driver. A slot that is still empty refuses; whether the
/// device that is missed was found shows when it is used.
pub fn look_again() {
    look_again_in(Path::new(DEVICES), Path::new(BIND));
}

fn look_again_in(devices: &Path, bind: &Path) {
    let mut slots: Vec<String> = std::fs::read_dir(devices)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with(PREFIX) && !devices.join(name).join("driver").exists())
        .collect();
    // In the order of their addresses, which is the order of the interfaces.
    slots.sort_by_key(|name| {
        name.strip_prefix(PREFIX)
            .and_then(|number| number.parse::<u32>().ok())
    });
    for slot in slots {
        // They are filled from the first on: behind an empty one there is nothing.
        if std::fs::write(bind, &slot).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_without_a_driver_are_bound_until_one_refuses() {
        let dir = std::env::temp_dir().join(format!("cella-slots-{}", std::process::id()));
        let devices = dir.join("devices");
        for name in [
            "virtio-mmio.2",
            "virtio-mmio.10",
            "virtio-mmio.0/driver",
            "serial8250",
        ] {
            std::fs::create_dir_all(devices.join(name)).unwrap();
        }
        let bind = dir.join("bind");
        std::fs::write(&bind, "").unwrap();
        look_again_in(&devices, &bind);
        // A plain file keeps the last that was written to it: each slot was tried, the highest last.
        assert_eq!(std::fs::read_to_string(&bind).unwrap(), "virtio-mmio.10");
        std::fs::remove_file(&bind).unwrap();
        std::fs::create_dir(&bind).unwrap();
        look_again_in(&devices, &bind);
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
