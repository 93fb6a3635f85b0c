//! Blocks plugged and unplugged, requests that cannot be, drivers that mean harm.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};

use proptest::prelude::*;

use super::{BLOCK_BYTES, CONFIG_BYTES, Mem, PLUG, REQUEST_BYTES, STATE, UNPLUG, UNPLUG_ALL};
use crate::device::testing::{Buffer, MockDriver, Used};
use crate::device::{Device, DeviceError, SnapshotStep};

const START: u64 = 4 << 30;
const BLOCKS: u64 = 8;
const ACK: u16 = 0;
const ERROR: u16 = 3;

fn memory() -> File {
    let fd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(fd);
    file.set_len(BLOCKS * BLOCK_BYTES).unwrap();
    file
}

fn driver() -> MockDriver<Mem> {
    MockDriver::new(Mem::new(START, BLOCKS * BLOCK_BYTES, Some(memory())))
}

fn request(kind: u16, address: u64, blocks: u16) -> [u8; REQUEST_BYTES] {
    let mut bytes = [0; REQUEST_BYTES];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&address.to_le_bytes());
    bytes[16..18].copy_from_slice(&blocks.to_le_bytes());
    bytes
}

/// What the device answers: a response's type, and a state.
fn ask(driver: &mut MockDriver<Mem>, kind: u16, block: u64, blocks: u16) -> (u16, u16) {
    let address = START + block * BLOCK_BYTES;
    let (head, room) = driver.request(0, &[&request(kind, address, blocks)], &[10]);
    driver.kick(0).unwrap();
    assert_eq!(driver.used(0), [Used { head, len: 10 }]);
    let bytes = driver.read(room[0].address, 10);
    let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    (word(0), word(8))
}

fn plugged_bytes(driver: &MockDriver<Mem>) -> u64 {
    let mut bytes = [0; 8];
    driver.device.read_config(40, &mut bytes);
    u64::from_le_bytes(bytes)
}

#[test]
fn the_configuration_asks_for_everything() {
    let driver = driver();
    let mut config = [0xff; CONFIG_BYTES + 8];
    driver.device.read_config(0, &mut config);
    let words: Vec<u64> = config
        .chunks_exact(8)
        .map(|word| u64::from_le_bytes(word.try_into().unwrap()))
        .collect();
    let (asked, region) = (BLOCKS * BLOCK_BYTES, 128 << 20);
    let expected = [BLOCK_BYTES, 0, START, region, region, 0, asked, 0];
    assert_eq!(words, expected);
}

#[test]
fn blocks_come_and_go() {
    let mut driver = driver();
    assert_eq!(ask(&mut driver, STATE, 0, 8), (ACK, 1));
    assert_eq!(ask(&mut driver, PLUG, 2, 3), (ACK, 0));
    assert_eq!(plugged_bytes(&driver), 3 * BLOCK_BYTES);
    assert_eq!(ask(&mut driver, STATE, 2, 3), (ACK, 0));
    assert_eq!(ask(&mut driver, STATE, 1, 2), (ACK, 2));
    assert_eq!(ask(&mut driver, PLUG, 4, 2), (ERROR, 0), "one is plugged");
    assert_eq!(ask(&mut driver, UNPLUG, 1, 2), (ERROR, 0), "one is not");
    assert_eq!(ask(&mut driver, UNPLUG, 3, 2), (ACK, 0));
    assert_eq!(plugged_bytes(&driver), BLOCK_BYTES);
    assert_eq!(ask(&mut driver, UNPLUG_ALL, 0, 0), (ACK, 0));
    assert_eq!(plugged_bytes(&driver), 0);
    assert_eq!(driver.interrupt.queue_count(0), 8);
}

#[test]
fn what_is_unplugged_goes_back_to_the_host() {
    let file = memory();
    let mut driver = MockDriver::new(Mem::new(
        START,
        BLOCKS * BLOCK_BYTES,
        Some(file.try_clone().unwrap()),
    ));
    assert_eq!(ask(&mut driver, PLUG, 0, 8), (ACK, 0));
    for block in 0..BLOCKS {
        file.write_all_at(b"used", block * BLOCK_BYTES).unwrap();
    }
    let pages = || file.metadata().unwrap().blocks() / 8;
    assert_eq!(pages(), 8);
    assert_eq!(ask(&mut driver, UNPLUG, 1, 2), (ACK, 0));
    assert_eq!(pages(), 6);
    assert_eq!(ask(&mut driver, UNPLUG_ALL, 0, 0), (ACK, 0));
    assert_eq!(
        (pages(), file.metadata().unwrap().len()),
        (0, 8 * BLOCK_BYTES)
    );
}

#[test]
fn blocks_of_a_saved_machine_are_plugged_again() {
    let mut driver = driver();
    assert_eq!(ask(&mut driver, PLUG, 2, 3), (ACK, 0));
    let mut saved = Vec::new();
    let step = SnapshotStep::Save(&mut saved);
    driver.device.snapshot(step).unwrap();
    assert_eq!(saved, [0, 0, 1, 1, 1, 0, 0, 0]);

    let mut restored = MockDriver::new(Mem::new(START, BLOCKS * BLOCK_BYTES, None));
    let step = SnapshotStep::Restore(&saved);
    restored.device.snapshot(step).unwrap();
    assert_eq!(plugged_bytes(&restored), 3 * BLOCK_BYTES);
    assert_eq!(ask(&mut restored, STATE, 1, 2), (ACK, 2));
    // The snapshot's file is not this machine's to make holes in.
    assert_eq!(ask(&mut restored, UNPLUG, 2, 3), (ACK, 0));
    assert_eq!(plugged_bytes(&restored), 0);

    for wrong in [&saved[1..], &[], &[2; BLOCKS as usize]] {
        let refused = restored.device.snapshot(SnapshotStep::Restore(wrong));
        assert!(
            matches!(refused, Err(DeviceError::Snapshot(_))),
            "{wrong:?}"
        );
        assert_eq!(plugged_bytes(&restored), 0);
    }
}

#[test]
fn requests_that_cannot_be_change_nothing() {
    let mut driver = driver();
    for (kind, address, blocks) in [
        (PLUG, START, 0),
        (PLUG, START, 9),
        (PLUG, START, u16::MAX),
        (PLUG, START + BLOCKS * BLOCK_BYTES, 1),
        (PLUG, START + 4096, 1),
        (PLUG, START - BLOCK_BYTES, 2),
        (PLUG, u64::MAX, 1),
        (UNPLUG, 0, 1),
        (STATE, u64::MAX - BLOCK_BYTES + 1, 1),
        (4, START, 1),
        (u16::MAX, START, 1),
    ] {
        let (_, room) = driver.request(0, &[&request(kind, address, blocks)], &[10]);
        driver.kick(0).unwrap();
        let bytes = driver.read(room[0].address, 2);
        assert_eq!(bytes, ERROR.to_le_bytes(), "{kind} {address:#x} {blocks}");
    }
    assert_eq!(plugged_bytes(&driver), 0);
}

#[test]
fn a_chain_may_be_cut_anywhere_but_not_short() {
    let mut driver = driver();
    let whole = request(PLUG, START, 1);
    let (head, room) = driver.request(0, &[&whole[..3], &whole[3..20], &whole[20..]], &[4, 6]);
    let (short, _) = driver.request(0, &[&whole[..23]], &[10]);
    let (mute, _) = driver.request(0, &[&request(PLUG, START + BLOCK_BYTES, 1)], &[]);
    let outside = Buffer {
        address: u64::MAX - 8,
        len: 64,
        writable: false,
    };
    let far = driver.offer(0, &[outside]);
    driver.kick(0).unwrap();
    let used = driver.used(0);
    let expected = [(head, 10), (short, 0), (mute, 0), (far, 0)];
    assert_eq!(used, expected.map(|(head, len)| Used { head, len }));
    assert_eq!(driver.read(room[0].address, 2), ACK.to_le_bytes());
    assert_eq!(plugged_bytes(&driver), 2 * BLOCK_BYTES);
}

proptest! {
    #[test]
    fn no_driver_does_harm(bytes in prop::collection::vec(any::<u8>(), 0..1024)) {
        let mut driver = driver();
        driver.scribble(0, &bytes);
        let _ = driver.kick(0);
        prop_assert!(plugged_bytes(&driver) <= BLOCKS * BLOCK_BYTES);
    }
}
