//! Chains that no driver would make. The mock's guard pages end the test if the device leaves guest memory.

use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::device::testing::{DATA_BASE, INDIRECT, NEXT, REGIONS, WRITE, descriptor};

const END: u64 = REGIONS[0].1 as u64;

fn buffer(address: u64, len: u32, writable: bool) -> Buffer {
    Buffer {
        address,
        len,
        writable,
    }
}

#[test]
fn chains_without_a_status_byte_do_nothing() {
    let mut disk = Disk::new();
    disk.driver.request(0, &[&header(OUT, 0), &[1; 512]], &[]);
    disk.driver.request(0, &[&header(OUT, 0), &[1; 512]], &[0]);
    disk.driver.request(0, &[], &[0, 0]);
    disk.driver.kick(0).unwrap();
    assert!(disk.driver.used(0).iter().all(|used| used.len == 0));
    assert!(disk.unchanged());
}

#[test]
fn buffers_outside_of_memory_fail_their_request() {
    for (address, len) in [
        (END - 512, 1024),
        (END, 512),
        (REGIONS[1].0 - 512, 1024),
        (u64::MAX - 100, 512),
        (DATA_BASE, u32::MAX - 512),
    ] {
        for kind in [IN, OUT] {
            let mut disk = Disk::new();
            let header = disk.driver.alloc_bytes(&header(kind, 0));
            let status = disk.driver.alloc_bytes(&[0xee]);
            let data = buffer(address, len, kind == IN);
            disk.driver.offer(
                0,
                &[buffer(header, 16, false), data, buffer(status, 1, true)],
            );
            disk.driver.kick(0).unwrap();
            assert_eq!(disk.driver.used(0).len(), 1);
            assert_eq!(
                disk.driver.read(status, 1),
                [IOERR],
                "{address:#x} {len} {kind}"
            );
            assert!(disk.unchanged());
        }
    }
}

#[test]
fn a_status_outside_of_memory_is_not_written() {
    let mut disk = Disk::new();
    let header = disk.driver.alloc_bytes(&header(OUT, 0));
    let data = disk.driver.alloc(512);
    let status = buffer(END, 1, true);
    disk.driver.offer(
        0,
        &[buffer(header, 16, false), buffer(data, 512, false), status],
    );
    disk.driver.kick(0).unwrap();
    assert_eq!(disk.driver.used(0)[0].len, 0);
    assert!(disk.unchanged());
}

#[test]
fn what_is_read_may_not_follow_what_is_written() {
    let mut disk = Disk::new();
    let header = disk.driver.alloc_bytes(&header(OUT, 0));
    let rest = disk.driver.alloc(1024);
    let chain = [
        buffer(rest, 1, true),
        buffer(header, 16, false),
        buffer(rest + 512, 512, false),
    ];
    disk.driver.offer(0, &chain);
    disk.driver.kick(0).unwrap();
    assert_eq!(disk.driver.read(rest, 1), [IOERR]);
    assert!(disk.unchanged());
}

#[test]
fn loops_and_huge_indirect_tables_end() {
    let mut disk = Disk::new();
    let header = disk.driver.alloc_bytes(&header(IN, 0));
    disk.driver.set_descriptor(0, 0, (header, 16), NEXT, 1);
    disk.driver
        .set_descriptor(0, 1, (DATA_BASE + 512, 512), NEXT | WRITE, 1);
    disk.driver.publish(0, 0);
    // A table of 4095 entries, each naming the same two sectors.
    let table = disk.driver.alloc(4095 * 16);
    for entry in 0..4095u16 {
        let bytes = descriptor(DATA_BASE + 0x1000, 1024, NEXT | WRITE, entry + 1);
        disk.driver.write(table + u64::from(entry) * 16, &bytes);
    }
    disk.driver
        .set_descriptor(0, 2, (table, 4095 * 16), INDIRECT, 0);
    disk.driver.publish(0, 2);
    // A table that names itself as a table.
    let inner = disk.driver.alloc(32);
    disk.driver
        .write(inner, &descriptor(inner, 32, INDIRECT, 0));
    disk.driver.set_descriptor(0, 3, (inner, 32), INDIRECT, 0);
    disk.driver.publish(0, 3);
    disk.driver.kick(0).unwrap();
    assert_eq!(disk.driver.used(0).len(), 3);
    assert!(disk.unchanged());
    assert_eq!(disk.request(IN, 0, &[], 512).0, OK, "it still works");
}

#[test]
fn an_index_that_runs_ahead_is_an_error() {
    let mut disk = Disk::new();
    let size = disk.driver.queue_size(0);
    disk.driver.set_avail_index(0, size + 1);
    let source = virtio_queue::Error::InvalidAvailRingIndex;
    assert_eq!(
        disk.driver.kick(0).unwrap_err().to_string(),
        DeviceError::Queue { queue: 0, source }.to_string()
    );
}

#[test]
fn a_request_that_changes_while_it_is_read_stays_inside_of_the_disk() {
    let mut disk = Disk::new();
    let stop = Arc::new(AtomicBool::new(false));
    let header_at = disk.driver.alloc_bytes(&header(OUT, 0));
    let data = disk.driver.alloc(1024);
    let status = disk.driver.alloc(16);
    let flipper = {
        let (memory, stop) = (disk.driver.memory().clone(), stop.clone());
        std::thread::spawn(move || {
            let memory = memory.memory();
            let mut flip = 0u64;
            while !stop.load(Ordering::Relaxed) {
                flip = flip.wrapping_add(0x9e37_79b9_7f4a_7c15);
                // The sector, then kind, then the descriptor of the data: its address and its length.
                let places = [
                    (
                        header_at + 8,
                        [SECTORS - 1, u64::MAX, 1 << 54, 0][flip as usize % 4],
                    ),
                    (header_at, [0, 1, 11, 13][(flip >> 8) as usize % 4]),
                    (
                        16,
                        [data, END - 16, u64::MAX - 8][(flip >> 16) as usize % 3],
                    ),
                ];
                for (at, value) in places {
                    memory.write_obj(value, GuestAddress(at)).unwrap();
                }
                let len = [512u32, u32::MAX, 1024][(flip >> 24) as usize % 3];
                memory.write_obj(len, GuestAddress(24)).unwrap();
            }
        })
    };
    for _ in 0..2000 {
        disk.driver.set_descriptor(0, 0, (header_at, 16), NEXT, 1);
        disk.driver.set_descriptor(0, 1, (data, 512), NEXT, 2);
        disk.driver.set_descriptor(0, 2, (status, 1), WRITE, 0);
        disk.driver.publish(0, 0);
        disk.driver.kick(0).unwrap();
        assert_eq!(disk.driver.used(0).len(), 1);
    }
    stop.store(true, Ordering::Relaxed);
    flipper.join().unwrap();
    assert_eq!(disk.file.metadata().unwrap().size(), SECTORS * SECTOR);
}

proptest! {
    #[test]
    fn hostile_queues_are_survived(
        read_only in any::<bool>(),
        rounds in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..600), 1..4),
    ) {
        let mut disk = Disk::with(read_only);
        for bytes in rounds {
            disk.driver.scribble(0, &bytes);
            if disk.driver.kick(0).is_err() {
                disk.driver.device.reset();
                let features = disk.driver.device.features();
                disk.driver.activate(features).unwrap();
            }
            disk.driver.used(0);
            prop_assert_eq!(disk.file.metadata().unwrap().size(), SECTORS * SECTOR);
        }
        prop_assert!(!read_only || disk.unchanged());
        // The rings may hold anything by now; the next driver is served all the same.
        disk.driver.device.reset();
        disk.driver.free_all();
        let features = disk.driver.device.features();
        disk.driver.activate(features).unwrap();
        prop_assert_eq!(disk.request(IN, 0, &[], 512).0, OK);
    }

    #[test]
    fn any_header_and_framing_of_a_request_is_answered(
        kind in prop_oneof![prop::sample::select(vec![0u32, 1, 4, 8, 11, 13]), any::<u32>()],
        sector in prop_oneof![0..70u64, any::<u64>()],
        payload in prop::collection::vec(any::<u8>(), 0..1200),
        room in 0..1200u32,
        cut in 0..16usize,
    ) {
        let mut disk = Disk::new();
        let bytes = [&header(kind, sector)[..], &payload].concat();
        let (head, buffers) = disk.driver.request(0, &[&bytes[..cut], &bytes[cut..]], &[room, 1]);
        disk.driver.write(buffers[1].address, &[0xee]);
        disk.driver.kick(0).unwrap();
        let used = disk.driver.used(0);
        prop_assert_eq!(used.len(), 1);
        prop_assert_eq!(used[0].head, head);
        prop_assert!((1..=room + 1).contains(&used[0].len));
        prop_assert!(disk.driver.read(buffers[1].address, 1)[0] <= 2, "no status");
        prop_assert_eq!(disk.file.metadata().unwrap().size(), SECTORS * SECTOR);
    }
}
