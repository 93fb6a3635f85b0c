//! Requests that are answered, capped, refused; queues that no driver would make.

use std::time::Duration;

use proptest::prelude::*;

use super::{MAX_REQUEST, Rng};
use crate::device::testing::{Buffer, DATA_BASE, INDIRECT, MockDriver, NEXT, REGIONS, Used, WRITE};
use crate::device::{Device, DeviceError};

#[test]
fn buffers_are_filled_and_nothing_around_them() {
    let mut driver = MockDriver::new(Rng::new());
    let base = driver.alloc(256);
    let buffers = [(base + 16, 32), (base + 96, 64)].map(|(address, len)| Buffer {
        address,
        len,
        writable: true,
    });
    let head = driver.offer(0, &buffers);
    driver.kick(0).unwrap();
    assert_eq!(driver.used(0), [Used { head, len: 96 }]);
    assert_eq!(driver.interrupt.queue_count(0), 1);
    let memory = driver.read(base, 256);
    for range in [0..16, 48..96, 160..256] {
        assert!(memory[range].iter().all(|&byte| byte == 0));
    }
    // 32 zero bytes in a row are no accident: 2^-256.
    assert!(memory[16..48].iter().any(|&byte| byte != 0));
    assert!(memory[128..160].iter().any(|&byte| byte != 0));
}

#[test]
fn a_huge_request_is_filled_to_the_cap() {
    let mut driver = MockDriver::new(Rng::new());
    let (head, buffers) = driver.request(0, &[], &[3000, 3000, 3000]);
    driver.kick(0).unwrap();
    assert_eq!(
        driver.used(0),
        [Used {
            head,
            len: MAX_REQUEST
        }]
    );
    let second = driver.read(buffers[1].address, 3000);
    assert!(second[1096..].iter().all(|&byte| byte == 0), "past the cap");
    assert!(
        driver
            .read(buffers[2].address, 3000)
            .iter()
            .all(|&byte| byte == 0)
    );
}

#[test]
fn buffers_outside_of_memory_end_their_request_only() {
    let mut driver = MockDriver::new(Rng::new());
    let outside = [
        REGIONS[0].1 as u64 - 8,
        REGIONS[0].1 as u64,
        u64::MAX - 8,
        REGIONS[1].0 - 8,
    ];
    let mut heads = Vec::new();
    for address in outside {
        heads.push(driver.offer(
            0,
            &[Buffer {
                address,
                len: 64,
                writable: true,
            }],
        ));
    }
    let (good, _) = driver.request(0, &[], &[16]);
    let (read_only, _) = driver.request(0, &[&[0; 16]], &[]);
    driver.kick(0).unwrap();
    let used = driver.used(0);
    assert_eq!(used.len(), 6);
    for (entry, head) in used.iter().zip(heads) {
        assert_eq!(*entry, Used { head, len: 0 });
    }
    assert_eq!(
        used[4],
        Used {
            head: good,
            len: 16
        }
    );
    assert_eq!(
        used[5],
        Used {
            head: read_only,
            len: 0
        }
    );
}

#[test]
fn a_loop_ends_at_the_cap() {
    let mut driver = MockDriver::new(Rng::new());
    driver.set_descriptor(0, 0, (DATA_BASE, 100), NEXT | WRITE, 1);
    driver.set_descriptor(0, 1, (DATA_BASE + 100, 100), NEXT | WRITE, 0);
    driver.publish(0, 0);
    driver.set_descriptor(0, 2, (DATA_BASE, 0x1_0000), INDIRECT, 0);
    driver.publish(0, 2);
    driver.kick(0).unwrap();
    let used = driver.used(0);
    assert_eq!(used.len(), 2);
    assert!(used[0].len <= MAX_REQUEST, "{used:?}");
}

#[test]
fn an_index_that_runs_ahead_is_an_error_and_a_reset_heals_it() {
    let mut driver = MockDriver::new(Rng::new());
    driver.set_avail_index(0, 33);
    assert!(matches!(
        driver.kick(0),
        Err(DeviceError::Queue {
            queue: 0,
            source: virtio_queue::Error::InvalidAvailRingIndex
        })
    ));
    assert!(driver.device.reset().is_some());
    assert!(matches!(driver.kick(0), Err(DeviceError::State(_))));
    let features = driver.device.features();
    driver.activate(features).unwrap();
    let (head, _) = driver.request(0, &[], &[8]);
    driver.kick(0).unwrap();
    assert_eq!(driver.used(0), [Used { head, len: 8 }]);
    assert!(matches!(
        driver.activate(features),
        Err(DeviceError::State(_))
    ));
    assert!(matches!(driver.kick(1), Err(DeviceError::State(_))));
}

proptest! {
    #[test]
    fn hostile_queues_are_survived(rounds in prop::collection::vec(
        prop::collection::vec(any::<u8>(), 0..400), 1..4)) {
        let mut driver = MockDriver::new(Rng::new());
        for bytes in rounds {
            driver.scribble(0, &bytes);
            if driver.kick(0).is_err() {
                driver.device.reset();
                let features = driver.device.features();
                driver.activate(features).unwrap();
            }
            prop_assert_eq!(driver.run_events(Duration::ZERO).unwrap(), 0);
        }
        // The rings may hold anything by now, entropy included; the next driver is served all the same.
        driver.device.reset();
        driver.free_all();
        let features = driver.device.features();
        driver.activate(features).unwrap();
        let (head, _) = driver.request(0, &[], &[8]);
        driver.kick(0).unwrap();
        prop_assert_eq!(driver.used(0), [Used { head, len: 8 }]);
    }
}
