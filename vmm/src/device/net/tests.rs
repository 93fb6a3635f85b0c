//! Frames both ways, room that comes and goes, and queues that no driver would make. A socket that keeps message
//! boundaries stands in for the tap.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use proptest::prelude::*;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::rx::NUM_BUFFERS;
use super::used::Used;
use super::*;
use crate::device::testing::{self, Buffer, DATA_BASE, INDIRECT, MockDriver, NEXT, REGIONS, WRITE};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const MTU: u16 = 1500;
const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

/// A driver of a device, and the far end of its cable.
struct Cable {
    driver: MockDriver<Net>,
    far: File,
}

impl Cable {
    fn new() -> Self {
        Self::without(0)
    }

    /// The driver declines `features`.
    fn without(features: u64) -> Self {
        let (near, far) = UnixDatagram::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        far.set_nonblocking(true).unwrap();
        let device = Net::new(OwnedFd::from(near).into(), MAC, MTU);
        let accepted = device.features() & !features;
        Self {
            driver: MockDriver::with_features(device, accepted),
            far: OwnedFd::from(far).into(),
        }
    }

    /// Sends a frame to the guest's side.
    fn arrives(&mut self, frame: &[u8]) {
        let len = self.far.write(frame).unwrap();
        assert_eq!(len, frame.len());
    }

    /// What the guest sent, whole.
    fn sent(&mut self) -> Option<Vec<u8>> {
        let mut frame = vec![0; 1 << 17];
        let len = self.far.read(&mut frame).ok()?;
        frame.truncate(len);
        Some(frame)
    }

    fn run(&mut self) {
        self.driver.run_events(Duration::ZERO).unwrap();
    }

    fn is_watched(&self) -> bool {
        self.driver
            .watcher
            .watched()
            .values()
            .any(|(_, interest)| interest.read)
    }
}

/// A header of zeros and `len` bytes of a pattern.
fn frame(len: usize) -> Vec<u8> {
    let mut frame = vec![0; HEADER];
    frame.extend((0..len).map(|at| at as u8));
    frame
}

#[test]
fn the_configuration_has_address_status_and_mtu() {
    let cable = Cable::new();
    let mut config = [0xff; 16];
    cable.driver.device.read_config(0, &mut config);
    assert_eq!(config[..6], MAC);
    assert_eq!(config[6..12], [1, 0, 1, 0, 0xdc, 0x05]);
    assert_eq!(config[12..], [0; 4]);
    let mut past = [0xff; 4];
    cable.driver.device.read_config(u64::MAX, &mut past);
    assert_eq!(past, [0; 4]);
    assert_eq!(
        cable.driver.device.features() & OFFLOADS,
        0,
        "a socket has no offloads"
    );
}

#[test]
fn frames_leave_in_order_and_whole() {
    let mut cable = Cable::new();
    let long = frame(1500);
    let (head, tail) = long.split_at(HEADER + 14);
    cable.driver.request(TX, &[&frame(60)], &[]);
    cable.driver.request(TX, &[head, tail], &[]);
    cable.driver.kick(TX).unwrap();
    assert_eq!(cable.sent(), Some(frame(60)));
    assert_eq!(cable.sent(), Some(long));
    assert_eq!(cable.sent(), None);
    let used = cable.driver.used(TX);
    assert!(used.len() == 2 && used.iter().all(|used| used.len == 0));
    assert!(cable.driver.interrupt.queue_count(TX) > 0);
}

#[test]
fn a_full_tap_holds_frames_back_and_loses_none() {
    let mut cable = Cable::new();
    let count = 64;
    for at in 0..count {
        cable.driver.free_all();
        cable.driver.request(TX, &[&frame(1000 + at)], &[]);
        cable.driver.kick(TX).unwrap();
    }
    let mut left = 0;
    while cable.driver.watcher.watched().values().any(|w| w.1.write) || left < count {
        assert_eq!(cable.sent().map(|f| f.len()), Some(HEADER + 1000 + left));
        left += 1;
        cable.run();
    }
    assert_eq!(cable.sent(), None);
    assert_eq!(cable.driver.used(TX).len(), count);
}

#[test]
fn a_frame_fills_one_buffer_or_several() {
    let mut cable = Cable::new();
    let buffers: Vec<_> = (0..8)
        .map(|_| cable.driver.request(RX, &[], &[500]))
        .collect();
    cable.driver.kick(RX).unwrap();
    cable.arrives(&frame(100));
    cable.arrives(&frame(1200));
    cable.run();
    let used = cable.driver.used(RX);
    let lens: Vec<_> = used.iter().map(|used| used.len).collect();
    assert_eq!(lens, [112, 500, 500, 212]);
    let read = |at: usize| {
        let buffer = buffers[at].1[0];
        cable.driver.read(buffer.address, used[at].len as usize)
    };
    let mut first = frame(100);
    first[NUM_BUFFERS] = 1;
    assert_eq!(read(0), first);
    let mut second = frame(1200);
    second[NUM_BUFFERS] = 3;
    assert_eq!([read(1), read(2), read(3)].concat(), second);
    assert!(cable.driver.interrupt.queue_count(RX) > 0);
}

#[test]
fn a_frame_of_several_buffers_shows_at_once() {
    let cable = Cable::new();
    let memory = cable.driver.memory().memory();
    let mut queue = Queue::new(4).unwrap();
    queue.set_avail_ring_address(Some(DATA_BASE as u32), Some(0));
    queue.set_used_ring_address(Some(DATA_BASE as u32 + 0x100), Some(0));
    queue.set_event_idx(true);
    let index = || -> u16 { memory.read_obj(GuestAddress(DATA_BASE + 0x102)).unwrap() };
    let mut used = Used::default();
    assert!(!used.wants_interrupt(&queue, &memory).unwrap());
    // The driver, on its own CPU, may look while the entries are written.
    let chains = (0..3u16).map(|head| {
        assert_eq!(index(), 0, "seen before it is whole");
        (head, 100)
    });
    used.add(&mut queue, &memory, chains).unwrap();
    assert_eq!((index(), queue.next_used()), (3, 3));
    // The driver asked to be told when it has entry 1: passed by this addition, though it is not the last.
    let event = GuestAddress(DATA_BASE + 4 + 2 * 4);
    memory.write_obj(1u16, event).unwrap();
    assert!(used.wants_interrupt(&queue, &memory).unwrap());
    assert!(!used.wants_interrupt(&queue, &memory).unwrap());
    // Not before entry 9.
    memory.write_obj(9u16, event).unwrap();
    used.add(&mut queue, &memory, std::iter::once((3, 0)))
        .unwrap();
    assert!(!used.wants_interrupt(&queue, &memory).unwrap());
    assert_eq!(index(), 4);
}

#[test]
fn a_driver_without_merging_gets_a_frame_a_buffer() {
    let mut cable = Cable::without(1 << VIRTIO_NET_F_MRG_RXBUF);
    for _ in 0..2 {
        cable.driver.request(RX, &[], &[12, 1600]);
    }
    cable.driver.kick(RX).unwrap();
    cable.arrives(&frame(1500));
    cable.arrives(&frame(60));
    cable.run();
    let lens: Vec<_> = cable.driver.used(RX).iter().map(|used| used.len).collect();
    assert_eq!(lens, [1512, 72]);
}

#[test]
fn the_tap_is_watched_only_while_there_is_room() {
    for features in [0, EVENT_IDX] {
        let mut cable = Cable::without(features);
        assert!(!cable.is_watched(), "nothing was offered yet");
        cable.driver.request(RX, &[], &[1000]);
        cable.driver.kick(RX).unwrap();
        assert!(!cable.is_watched(), "the largest frame has no room");
        cable.driver.request(RX, &[], &[1000]);
        cable.driver.kick(RX).unwrap();
        assert!(cable.is_watched());
        cable.arrives(&frame(60));
        cable.arrives(&frame(61));
        cable.run();
        assert_eq!(cable.driver.used(RX).len(), 1);
        assert!(!cable.is_watched(), "one buffer is left, and a frame waits");
        cable.driver.request(RX, &[], &[1000]);
        cable.driver.kick(RX).unwrap();
        assert_eq!(cable.driver.used(RX)[0].len, 73);
    }
}

#[test]
fn the_end_of_a_stream_is_the_end_of_the_link() {
    let (near, far) = rustix::net::socketpair(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::SEQPACKET,
        rustix::net::SocketFlags::NONBLOCK,
        None,
    )
    .unwrap();
    let mut driver = MockDriver::new(Net::new(near.into(), MAC, MTU));
    driver.request(RX, &[], &[2000]);
    driver.kick(RX).unwrap();
    drop(far);
    driver.run_events(Duration::ZERO).unwrap();
    assert!(driver.watcher.watched().is_empty(), "no busy loop");
    assert_eq!(driver.interrupt.config_count(), 1);
    let mut status = [0xff; 2];
    driver.device.read_config(6, &mut status);
    assert_eq!(status, [0, 0], "the link is down");
    // Whatever else the driver does is survived.
    driver.request(TX, &[&frame(60)], &[]);
    driver.kick(TX).unwrap();
    driver.kick(RX).unwrap();
    assert_eq!(driver.used(TX).len(), 1);
}

#[test]
fn reset_gives_everything_back_and_a_second_driver_starts_anew() {
    let mut cable = Cable::new();
    cable.driver.request(RX, &[], &[2000]);
    cable.driver.kick(RX).unwrap();
    assert!(cable.is_watched());
    assert!(cable.driver.device.reset().is_some());
    assert!(cable.driver.watcher.watched().is_empty());
    assert!(cable.driver.device.reset().is_none());
    assert!(matches!(cable.driver.kick(RX), Err(DeviceError::State(_))));
    let features = cable.driver.device.features();
    cable.driver.activate(features).unwrap();
    assert!(cable.driver.activate(features).is_err());
    cable.arrives(&frame(60));
    cable.driver.request(RX, &[], &[2000]);
    cable.driver.kick(RX).unwrap();
    let used = cable.driver.used(RX);
    assert_eq!(used.len(), 1, "no buffer of the first driver is used");
    assert_eq!(used[0].len, 72);
    assert!(matches!(cable.driver.kick(2), Err(DeviceError::State(_))));
}

#[test]
fn between_calls_the_device_holds_no_chain() {
    let mut cable = Cable::new();
    for _ in 0..4 {
        cable.driver.request(RX, &[], &[1000]);
    }
    cable.driver.kick(RX).unwrap();
    cable.arrives(&frame(60));
    cable.run();
    let used = cable.driver.used(RX).len() as u16;
    let resources = cable.driver.device.reset().unwrap();
    let queue = &resources.queues[RX];
    assert_eq!((used, queue.next_avail(), queue.next_used()), (1, 1, 1));
}

#[test]
fn a_driver_that_goes_on_from_a_snapshot_need_not_kick() {
    let mut cable = Cable::new();
    cable.driver.request(RX, &[], &[2000]);
    let mut saved = Vec::new();
    let device = &mut cable.driver.device;
    device.snapshot(SnapshotStep::Save(&mut saved)).unwrap();
    device.snapshot(SnapshotStep::Restore(&saved)).unwrap();
    cable.arrives(&frame(60));
    cable.run();
    assert_eq!(cable.driver.used(RX).len(), 1);
}

#[test]
fn another_tap_is_taken_with_the_next_kick() {
    let mut cable = Cable::new();
    cable.driver.request(RX, &[], &[2000]);
    cable.driver.request(RX, &[], &[2000]);
    cable.driver.kick(RX).unwrap();
    let (near, far) = UnixDatagram::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    far.set_nonblocking(true).unwrap();
    let next = cable.driver.device.next_tap();
    next.leave(OwnedFd::from(near).into());
    cable.driver.kick(RX).unwrap();
    let old = std::mem::replace(&mut cable.far, OwnedFd::from(far).into());
    assert!((&old).write(&frame(60)).is_err(), "the old one is closed");
    cable.arrives(&frame(60));
    cable.run();
    assert_eq!(cable.driver.used(RX).len(), 1);
    cable.driver.request(TX, &[&frame(70)], &[]);
    cable.driver.kick(TX).unwrap();
    assert_eq!(cable.sent().map(|sent| sent.len()), Some(70 + HEADER));
}

#[test]
fn chains_among_good_ones_that_are_not_fit_are_passed_over() {
    let mut cable = Cable::new();
    cable.driver.request(RX, &[], &[1000]);
    cable.driver.request(RX, &[&[1; 64]], &[]);
    cable.driver.request(RX, &[], &[1000]);
    cable.driver.kick(RX).unwrap();
    cable.arrives(&frame(1200));
    cable.run();
    let lens: Vec<_> = cable.driver.used(RX).iter().map(|used| used.len).collect();
    assert_eq!(lens, [1000, 0, 212]);
}

#[test]
fn chains_of_the_wrong_kind_or_place_carry_nothing() {
    let mut cable = Cable::new();
    let outside = [REGIONS[0].1 as u64 - 8, REGIONS[1].0 - 8, u64::MAX - 8];
    let mut heads = Vec::new();
    for queue in [RX, TX] {
        for address in outside {
            let buffer = Buffer {
                address,
                len: 64,
                writable: queue == RX,
            };
            heads.push(cable.driver.offer(queue, &[buffer]));
        }
        // A readable buffer to receive in, a writable one to send.
        let (readable, writable): (&[&[u8]], &[u32]) = match queue {
            RX => (&[&[1; 64]], &[]),
            _ => (&[], &[64]),
        };
        heads.push(cable.driver.request(queue, readable, writable).0);
        cable.driver.kick(queue).unwrap();
    }
    let used = [cable.driver.used(RX), cable.driver.used(TX)].concat();
    let expected: Vec<_> = heads
        .iter()
        .map(|&head| testing::Used { head, len: 0 })
        .collect();
    assert_eq!(used, expected);
    assert_eq!(cable.sent(), None);
}

#[test]
fn frames_larger_than_any_are_dropped() {
    let mut cable = Cable::new();
    let address = cable.driver.alloc(LARGEST + 1);
    let mut send = |len: usize| {
        let buffer = Buffer {
            address,
            len: len as u32,
            writable: false,
        };
        cable.driver.offer(TX, &[buffer]);
        cable.driver.kick(TX).unwrap();
        cable.sent().map(|frame| frame.len())
    };
    assert_eq!(send(LARGEST + 1), None);
    assert_eq!(send(LARGEST), Some(LARGEST));
}

#[test]
fn loops_and_huge_tables_end() {
    for queue in [RX, TX] {
        let mut cable = Cable::new();
        let write = if queue == RX { WRITE } else { 0 };
        let driver = &mut cable.driver;
        driver.set_descriptor(queue, 0, (DATA_BASE, 100), NEXT | write, 1);
        driver.set_descriptor(queue, 1, (DATA_BASE, 100), NEXT | write, 0);
        driver.publish(queue, 0);
        driver.set_descriptor(queue, 2, (DATA_BASE, 0x8_0000), INDIRECT, 0);
        driver.publish(queue, 2);
        driver.kick(queue).unwrap();
    }
}

#[test]
fn an_index_that_runs_ahead_is_an_error() {
    for queue in [RX, TX] {
        let mut cable = Cable::new();
        cable.driver.set_avail_index(queue, 65);
        let error = cable.driver.kick(queue).unwrap_err();
        assert!(
            matches!(error, DeviceError::Queue { queue: at, .. } if at == queue),
            "{error}"
        );
    }
}

proptest! {
    /// Whatever sizes frames and buffers have: every frame arrives whole, in order.
    #[test]
    fn frames_arrive_whole(
        frames in prop::collection::vec(14usize..1500, 1..12),
        buffers in prop::collection::vec(64u32..2048, 1..60),
        declined in prop::sample::select(vec![0, EVENT_IDX]),
    ) {
        let mut cable = Cable::without(declined);
        let mut next = 0;
        let mut received = Vec::new();
        for len in &frames {
            cable.arrives(&frame(*len));
        }
        let mut waiting = std::collections::VecDeque::new();
        let mut current: Vec<u8> = Vec::new();
        let mut parts = 0;
        for size in buffers.iter().cycle() {
            if received.len() == frames.len() {
                break;
            }
            waiting.push_back(cable.driver.request(RX, &[], &[*size]));
            next += 1;
            prop_assert!(next < 1000);
            cable.driver.kick(RX).unwrap();
            cable.run();
            for used in cable.driver.used(RX) {
                let (head, buffer) = waiting.pop_front().unwrap();
                prop_assert_eq!(used.head, head);
                let bytes = cable.driver.read(buffer[0].address, used.len as usize);
                if parts == 0 {
                    parts = bytes[NUM_BUFFERS];
                }
                current.extend(bytes);
                parts -= 1;
                if parts == 0 {
                    received.push(std::mem::take(&mut current));
                }
            }
            if waiting.is_empty() {
                cable.driver.free_all();
            }
        }
        for (got, len) in received.iter_mut().zip(&frames) {
            got[NUM_BUFFERS] = 0;
            prop_assert_eq!(&got[..], &frame(*len)[..]);
        }
    }

    #[test]
    fn hostile_queues_are_survived(rounds in prop::collection::vec(
        (0usize..2, prop::collection::vec(any::<u8>(), 0..400)), 1..6)) {
        let mut cable = Cable::new();
        for (queue, bytes) in rounds {
            // Room in the socket is not the matter here.
            while cable.sent().is_some() {}
            let _ = cable.far.write(&frame(900));
            cable.driver.scribble(queue, &bytes);
            let kicked = cable.driver.kick(queue);
            if kicked.and_then(|()| cable.driver.run_events(Duration::ZERO)).is_err() {
                cable.driver.device.reset();
                let features = cable.driver.device.features();
                cable.driver.activate(features).unwrap();
            }
        }
        while cable.sent().is_some() {}
        // The next driver is served all the same.
        cable.driver.device.reset();
        cable.driver.free_all();
        let features = cable.driver.device.features();
        cable.driver.activate(features).unwrap();
        cable.driver.request(TX, &[&frame(60)], &[]);
        cable.driver.kick(TX).unwrap();
        prop_assert_eq!(cable.sent(), Some(frame(60)));
        prop_assert_eq!(cable.driver.used(TX).len(), 1);
    }
}
