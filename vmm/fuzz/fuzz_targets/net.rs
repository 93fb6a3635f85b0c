//! A hostile guest on the network device, and hostile frames for it. The mock's guard pages end the run if the device
//! touches memory outside of the guest; what it sends is never larger than the largest frame.

#![no_main]

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use cella_vmm::device::Device;
use cella_vmm::device::net::Net;
use cella_vmm::device::testing::MockDriver;
use cella_vmm_fuzz::Input;
use libfuzzer_sys::fuzz_target;

const STEPS: usize = 64;
const LARGEST: usize = 65562;
const RX: usize = 0;
const TX: usize = 1;

fn step(driver: &mut MockDriver<Net>, far: &mut std::fs::File, input: &mut Input<'_>) -> bool {
    let kind = input.byte();
    let queue = usize::from(kind & 1);
    let size = usize::from(input.byte()) * 8;
    let done = match kind >> 1 & 7 {
        0 => {
            let bytes = input.take(size).to_vec();
            driver.scribble(queue, &bytes);
            driver.kick(queue)
        }
        1 | 2 => {
            // A frame arrives; the cable may be full.
            let _ = far.write(&vec![kind; size.max(1)]);
            Ok(())
        }
        3 | 4 => {
            driver.free_all();
            driver.request(RX, &[], &[size as u32 / 3, size as u32]);
            driver.kick(RX)
        }
        5 | 6 => {
            driver.free_all();
            let bytes = input.take(size).to_vec();
            let (head, tail) = bytes.split_at(bytes.len() / 2);
            driver.request(TX, &[head, tail], &[]);
            driver.kick(TX)
        }
        _ => driver.kick(queue),
    };
    done.and_then(|()| driver.run_events(Duration::ZERO))
        .is_ok()
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let (near, far) = UnixDatagram::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    far.set_nonblocking(true).unwrap();
    let mut far = std::fs::File::from(OwnedFd::from(far));
    let device = Net::new(OwnedFd::from(near).into(), [2, 0, 0, 0, 0, 7], 1500);
    let declined = u64::from(input.byte()) << 15;
    let features = device.features() & !declined;
    let mut driver = MockDriver::with_features(device, features);
    let mut frame = vec![0; 1 << 17];
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        if !step(&mut driver, &mut far, &mut input) {
            driver.device.reset().unwrap();
            driver.activate(features).unwrap();
        }
        while let Ok(len) = far.read(&mut frame) {
            assert!(len <= LARGEST, "a frame of {len} bytes was sent");
        }
        driver.used(RX);
        driver.used(TX);
    }
});
