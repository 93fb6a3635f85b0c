//! A hostile guest on the block device. The mock's guard pages end the run if the device touches memory outside of
//! the guest; the image keeps its size, and what is read-only keeps its content.

#![no_main]

use std::io::{Read, Seek, Write};

use cella_vmm::device::Device;
use cella_vmm::device::block::Block;
use cella_vmm::device::testing::MockDriver;
use cella_vmm_fuzz::Input;
use libfuzzer_sys::fuzz_target;

const SECTORS: usize = 32;
const BYTES: usize = SECTORS * 512;
const STEPS: usize = 32;

/// A sector inside, around the end, or far outside.
fn sector(form: u8) -> u64 {
    let near = u64::from(form & 0x3f);
    match form >> 6 {
        0 | 1 => near,
        2 => u64::MAX - near,
        _ => near << 55,
    }
}

fn step(driver: &mut MockDriver<Block>, input: &mut Input<'_>) -> bool {
    driver.free_all();
    let kind = input.byte();
    if kind >= 0xf0 {
        let len = usize::from(input.byte()) * 2;
        let bytes = input.take(len).to_vec();
        driver.scribble(0, &bytes);
        return driver.kick(0).is_ok();
    }
    // The types of virtio 1.2 are 0, 1, 4, 8, 11 and 13; those between are none.
    let mut header = u32::from(kind & 0xf).to_le_bytes().to_vec();
    header.extend([0; 4]);
    header.extend(sector(input.byte()).to_le_bytes());
    let cut = match kind >> 4 {
        0 => usize::from(input.byte()) % 17,
        _ => 16,
    };
    let len = usize::from(input.byte()) * 8;
    let data = input.take(len).to_vec();
    let room = u32::from(input.byte()) * 64;
    let status = u32::from(input.byte() % 8 != 0);
    let parts: Vec<&[u8]> = [&header[..cut], &header[cut..], &data]
        .into_iter()
        .filter(|part| !part.is_empty())
        .collect();
    driver.request(0, &parts, &[room / 3, room - room / 3, status]);
    driver.kick(0).is_ok()
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let read_only = input.byte() & 1 == 1;
    let pattern: Vec<u8> = (0..BYTES).map(|at| at as u8).collect();
    let mut image = tempfile::tempfile().unwrap();
    image.write_all(&pattern).unwrap();
    let device = Block::new(image.try_clone().unwrap(), read_only, "fuzz").unwrap();
    let mut driver = MockDriver::new(device);
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        if !step(&mut driver, &mut input) {
            driver.device.reset().unwrap();
            let features = driver.device.features();
            driver.activate(features).unwrap();
        }
        let _ = driver.used(0);
    }
    assert_eq!(image.metadata().unwrap().len(), BYTES as u64);
    if read_only {
        let mut content = Vec::new();
        image.rewind().unwrap();
        image.read_to_end(&mut content).unwrap();
        assert!(content == pattern, "a read-only image has changed");
    }
});
