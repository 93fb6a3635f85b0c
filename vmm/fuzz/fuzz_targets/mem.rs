//! A hostile guest on the memory device: rings of its making, and requests that are nearly right. What is plugged never
//! exceeds what there is, and the memory's file keeps its length. A device that goes on from a snapshot, whatever that says, is
//! one like any other.

#![no_main]

use std::fs::File;

use cella_vmm::device::mem::{BLOCK_BYTES, Mem};
use cella_vmm::device::testing::MockDriver;
use cella_vmm::device::{Device, SnapshotStep};
use cella_vmm_fuzz::Input;
use libfuzzer_sys::fuzz_target;

const STEPS: usize = 64;
const START: u64 = 4 << 30;
const BYTES: u64 = 16 * BLOCK_BYTES;

fn step(driver: &mut MockDriver<Mem>, input: &mut Input<'_>) -> bool {
    if input.byte() & 1 == 0 {
        let size = usize::from(input.byte()) * 4;
        driver.scribble(0, input.take(size));
    } else {
        driver.free_all();
        let mut request = [0; 24];
        request[0] = input.byte() % 5;
        let block = u64::from(input.byte() % 20).wrapping_sub(2);
        let address =
            START.wrapping_add(block.wrapping_mul(BLOCK_BYTES)) ^ u64::from(input.byte() & 1);
        request[8..16].copy_from_slice(&address.to_le_bytes());
        request[16] = input.byte() % 20;
        let cut = usize::from(input.byte()) % 25;
        let (head, tail) = request.split_at(cut);
        driver.request(0, &[head, tail], &[u32::from(input.byte() % 12)]);
    }
    driver.kick(0).is_ok()
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let file = tempfile::tempfile().unwrap();
    file.set_len(BYTES).unwrap();
    let len = |file: &File| file.metadata().unwrap().len();
    let own = (input.byte() & 1 == 0).then(|| file.try_clone().unwrap());
    let mut device = Mem::new(START, BYTES, own);
    if input.byte() & 1 == 0 {
        let blocks = usize::from(input.byte() % 18);
        let _ = device.snapshot(SnapshotStep::Restore(input.take(blocks)));
    }
    let features = device.features();
    let mut driver = MockDriver::new(device);
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        if !step(&mut driver, &mut input) {
            driver.device.reset().unwrap();
            driver.activate(features).unwrap();
        }
        driver.used(0);
        let mut plugged = [0; 8];
        driver.device.read_config(40, &mut plugged);
        assert!(u64::from_le_bytes(plugged) <= BYTES);
        assert_eq!(len(&file), BYTES);
    }
});
