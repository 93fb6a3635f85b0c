//! Guests and hosts that break the rules.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::guest::{CID, Guest};
use crate::device::Device;
use crate::device::testing::Buffer;
use crate::device::vsock::muxer::{DEADLINE, MAX_CONNECTIONS, MAX_HALF_OPEN};
use crate::device::vsock::packet::{HEADER_LEN, Header, Op, SHUTDOWN_BOTH, TYPE_STREAM};
use crate::device::vsock::{RX, TX};

// Both directions of a connection made before something hostile.
fn assert_alive(guest: &mut Guest, client: &mut UnixStream, pair: (u32, u32)) {
    guest.settle();
    guest.inbox.clear();
    client.write_all(b"ping").unwrap();
    assert_eq!(guest.data(pair), b"ping");
    assert_eq!(guest.send_data(pair, b"pong"), 4);
    let mut reply = [0; 4];
    client.read_exact(&mut reply).unwrap();
    assert_eq!(&reply, b"pong");
}

#[test]
fn packets_of_no_connection_are_answered_with_a_reset() {
    let mut guest = Guest::new();
    let stray = (5, 6);
    for op in [
        Op::Response,
        Op::Shutdown,
        Op::ReadWrite,
        Op::CreditUpdate,
        Op::CreditRequest,
    ] {
        guest.send_op(stray, op, 0);
        let (reset, _) = guest.expect(Op::Reset);
        assert_eq!((reset.src_port, reset.dst_port), stray, "{op:?}");
    }
    guest.send_op(stray, Op::Reset, 0);
    guest.expect_nothing();
}

#[test]
fn unknown_types_operations_and_addresses_are_refused() {
    let mut guest = Guest::new();
    let _listener = guest.host_listens(1);
    let request = guest.header((1, 2), Op::Request);
    for (wrong, answered) in [
        (Header { kind: 0, ..request }, true),
        (Header { kind: 2, ..request }, true),
        (Header { op: 0, ..request }, true),
        (Header { op: 8, ..request }, true),
        (
            Header {
                dst_cid: 1,
                ..request
            },
            true,
        ),
        (
            Header {
                dst_cid: u64::MAX,
                ..request
            },
            true,
        ),
        // Nobody else can send over this device.
        (
            Header {
                src_cid: CID + 1,
                ..request
            },
            false,
        ),
        (
            Header {
                src_cid: 2,
                ..request
            },
            false,
        ),
    ] {
        guest.send(&wrong, &[]);
        guest.settle();
        let answer = guest.inbox.pop_front().map(|(header, _)| header);
        assert_eq!(answer.is_some(), answered, "{wrong:?}");
        if let Some(reset) = answer {
            assert_eq!(reset.op, Op::Reset as u16);
            assert_eq!(reset.kind, wrong.kind);
            assert_eq!((reset.src_cid, reset.dst_cid), (wrong.dst_cid, CID));
        }
    }
    assert_eq!(guest.driver.device.muxer.connections(), 0);
}

#[test]
fn an_unknown_operation_ends_its_connection_only() {
    let mut guest = Guest::new();
    let (mut client, pair) = guest.accept(1);
    let (mut other, bad) = guest.accept(2);
    let header = Header {
        op: 99,
        ..guest.header(bad, Op::ReadWrite)
    };
    guest.send(&header, &[]);
    guest.expect(Op::Reset);
    assert_eq!(other.read(&mut [0; 1]).unwrap(), 0);
    assert_alive(&mut guest, &mut client, pair);
}

#[test]
fn a_second_request_on_the_same_ports_ends_the_connection() {
    let mut guest = Guest::new();
    let (mut client, pair) = guest.accept(1);
    guest.send_op(pair, Op::Request, 0);
    guest.expect(Op::Reset);
    assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn data_that_is_not_there_ends_the_connection() {
    for (len, data) in [(10, 9), (u32::MAX, 4), (1, 0)] {
        let mut guest = Guest::new();
        let (mut client, pair) = guest.accept(1);
        let header = Header {
            len,
            ..guest.header(pair, Op::ReadWrite)
        };
        guest.send(&header, &vec![1; data]);
        guest.expect(Op::Reset);
        assert_eq!(
            client.read(&mut [0; 16]).unwrap(),
            0,
            "nothing came through"
        );
    }
    // More in the buffers than the header says is not data.
    let mut guest = Guest::new();
    let (mut client, pair) = guest.accept(1);
    let header = Header {
        len: 3,
        ..guest.header(pair, Op::ReadWrite)
    };
    guest.send(&header, b"abcdef");
    let mut got = [0; 16];
    assert_eq!(client.read(&mut got).unwrap(), 3);
    assert_eq!(&got[..3], b"abc");
}

#[test]
fn chains_that_are_no_packets_are_used_up() {
    let mut guest = Guest::new();
    let (mut client, pair) = guest.accept(1);
    let address = guest.driver.alloc(64);
    let readable = |address, len| Buffer {
        address,
        len,
        writable: false,
    };
    let writable = Buffer {
        writable: true,
        ..readable(address, 64)
    };
    for chain in [
        &[readable(address, HEADER_LEN as u32 - 1)][..],
        &[readable(address, 0)],
        &[writable],
        &[readable(u64::MAX - 8, 64)],
        &[readable(1 << 20, 64)],
        &[readable((1 << 20) - 8, 64)],
        &[readable(address, 44), readable(1 << 31, 8)],
        &[readable(address, u32::MAX)],
    ] {
        let head = guest.driver.offer(TX, chain);
        guest.driver.kick(TX).unwrap();
        let used = guest.driver.used(TX);
        assert_eq!(used.len(), 1, "{chain:?}");
        assert_eq!((used[0].head, used[0].len), (head, 0));
    }
    assert_alive(&mut guest, &mut client, pair);
}

#[test]
fn receive_buffers_without_room_are_given_back_and_lose_nothing() {
    let mut guest = Guest::with_rx(1, &[44, 4096]);
    let (mut client, pair) = guest.accept(1);
    let address = guest.driver.alloc(64);
    let mut bad = Vec::new();
    for (at, len, writable) in [
        (address, 43, true),
        (address, 44, true),
        (address, 64, false),
        (1 << 31, 4096, true),
    ] {
        let buffer = Buffer {
            address: at,
            len,
            writable,
        };
        bad.push(guest.driver.offer(RX, &[buffer]));
    }
    client.write_all(&[7; 6000]).unwrap();
    guest.driver.run_events(Duration::ZERO).unwrap();
    let used = guest.driver.used(RX);
    assert_eq!(used[0].len, 44 + 4096, "the good one came first");
    let heads: Vec<u16> = used[1..].iter().map(|entry| entry.head).collect();
    assert_eq!(heads, bad);
    assert!(used[1..].iter().all(|entry| entry.len == 0));

    let good = Buffer {
        address: guest.driver.alloc(2000),
        len: 2000,
        writable: true,
    };
    guest.offer_rx(vec![good]);
    guest.driver.kick(RX).unwrap();
    assert_eq!(guest.data(pair).len(), 6000 - 4096);
}

#[test]
fn an_impossible_ring_index_stops_the_device() {
    let mut guest = Guest::new();
    guest.driver.set_avail_index(TX, 1000);
    assert!(guest.driver.kick(TX).is_err());
    assert!(guest.driver.device.reset().is_some());
}

#[test]
fn a_storm_of_connections_from_the_guest_is_bounded() {
    let mut guest = Guest::new();
    let listener = guest.host_listens(1);
    listener.set_nonblocking(true).unwrap();
    let mut streams = Vec::new();
    let mut refused = 0;
    for port in 0..1200 {
        guest.send_op((1, port), Op::Request, 0);
        streams.extend(listener.accept().map(|(stream, _)| stream));
        guest.settle();
        let (answer, _) = guest.inbox.pop_back().unwrap();
        refused += usize::from(answer.op == Op::Reset as u16);
    }
    assert_eq!(streams.len(), MAX_CONNECTIONS);
    assert_eq!(refused, 1200 - MAX_CONNECTIONS);
    // The host's wait until there is room.
    let mut client = guest.host_connects();
    client.write_all(b"CONNECT 5\n").unwrap();
    guest.expect_nothing();
    guest.send_op((1, 0), Op::Shutdown, SHUTDOWN_BOTH);
    guest.expect(Op::Reset);
    assert_eq!(guest.expect(Op::Request).0.dst_port, 5);
}

#[test]
fn a_guest_that_takes_no_answers_costs_little() {
    let mut guest = Guest::with_rx(0, &[64]);
    for port in 0..5000 {
        guest.send_op((9, port), Op::CreditRequest, 0);
    }
    assert_eq!(guest.driver.device.muxer.connections(), 0);
    let lens = vec![Buffer {
        address: guest.driver.alloc(64),
        len: 64,
        writable: true,
    }];
    guest.offer_rx(lens);
    guest.driver.kick(RX).unwrap();
    guest.settle();
    assert_eq!(
        guest.inbox.len(),
        1024,
        "the rest of the resets was dropped"
    );
}

#[test]
fn half_open_connections_are_bounded_in_number_and_time() {
    let mut guest = Guest::new();
    let mut clients: Vec<UnixStream> = (0..MAX_HALF_OPEN)
        .map(|_| {
            let client = guest.host_connects();
            guest.settle();
            client
        })
        .collect();
    // One more is not even accepted.
    clients.push(guest.host_connects());
    guest.settle();
    assert_eq!(guest.driver.device.muxer.connections(), MAX_HALF_OPEN);

    // A request that the guest never answers counts as well.
    clients[0].write_all(b"CONNECT 5\n").unwrap();
    guest.expect(Op::Request);
    assert_eq!(guest.driver.device.muxer.connections(), MAX_HALF_OPEN);

    let early = Instant::now() + DEADLINE / 2;
    guest.driver.device.muxer.look_after(early).unwrap();
    assert_eq!(guest.driver.device.muxer.connections(), MAX_HALF_OPEN);
    let late = Instant::now() + DEADLINE;
    guest.driver.device.muxer.look_after(late).unwrap();
    assert_eq!(clients[0].read(&mut [0; 1]).unwrap(), 0);
    assert_eq!(clients[1].read(&mut [0; 1]).unwrap(), 0);
    guest.driver.kick(RX).unwrap();
    guest.expect(Op::Reset);
    // The one that waited has its turn.
    clients[MAX_HALF_OPEN].write_all(b"CONNECT 6\n").unwrap();
    assert_eq!(guest.expect(Op::Request).0.dst_port, 6);
}

#[test]
fn a_starved_connection_asks_for_credit() {
    let mut guest = Guest::new();
    guest.reads = false;
    let (mut client, pair) = guest.accept(1);
    client.set_nonblocking(true).unwrap();
    while client.write(&[1; 10_000]).is_ok() {
        guest.settle();
    }
    guest.inbox.clear();
    for _ in 0..2 {
        let now = Instant::now();
        guest.driver.device.muxer.look_after(now).unwrap();
    }
    guest.driver.kick(RX).unwrap();
    guest.expect(Op::CreditRequest);
    guest.expect_nothing();
    guest.take(pair);
    assert!(!guest.data(pair).is_empty());
}

#[test]
fn memory_that_changes_while_it_is_read_harms_its_connection_only() {
    let mut guest = Guest::new();
    let (mut client, pair) = guest.accept(1);
    let (_other, victim) = guest.accept(2);
    let good = Header {
        len: 500,
        ..guest.header(victim, Op::ReadWrite)
    };
    let bytes = [&good.format()[..], &[9; 500]].concat();
    let address = guest.driver.alloc_bytes(&bytes);
    // Descriptor 63 is the last of the queue; the harness takes others.
    let table = TX as u64 * 0x2000 + 63 * 16;
    let memory = guest.driver.memory().clone();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let guard = memory.memory();
            let mut turn = 0_u32;
            while !stop.load(Ordering::Relaxed) {
                turn = turn.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let wild = turn.rotate_left(turn % 32);
                // The header's length, its operation; the descriptor's length, its address.
                guard
                    .store(wild, GuestAddress(address + 24), Ordering::Relaxed)
                    .unwrap();
                guard
                    .store(
                        (wild % 9) as u16,
                        GuestAddress(address + 30),
                        Ordering::Relaxed,
                    )
                    .unwrap();
                guard
                    .store(wild % 700, GuestAddress(table + 8), Ordering::Relaxed)
                    .unwrap();
                let place = if wild.is_multiple_of(5) {
                    u64::from(wild)
                } else {
                    address
                };
                guard
                    .store(place, GuestAddress(table), Ordering::Relaxed)
                    .unwrap();
            }
        });
        for _ in 0..20_000 {
            guest
                .driver
                .set_descriptor(TX, 63, (address, bytes.len() as u32), 0, 0);
            guest.driver.publish(TX, 63);
            guest.driver.kick(TX).unwrap();
            assert_eq!(guest.driver.used(TX).len(), 1);
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_alive(&mut guest, &mut client, pair);
}

// A header that is right in most fields, so that it gets past the first checks.
fn hostile_header() -> impl Strategy<Value = Header> {
    let mostly = |right: u64| prop_oneof![8 => Just(right), 1 => any::<u64>()];
    (
        (mostly(CID), mostly(2)),
        (0..3_u32, 0..4_u32),
        prop_oneof![4 => 0..200_u32, 1 => any::<u32>()],
        prop_oneof![8 => Just(TYPE_STREAM), 1 => any::<u16>()],
        0..9_u16,
        prop_oneof![0..4_u32, any::<u32>()],
        prop_oneof![Just(64 * 1024), any::<u32>()],
        prop_oneof![0..300_u32, any::<u32>()],
    )
        .prop_map(
            |(cids, ports, len, kind, op, flags, buf_alloc, fwd_cnt)| Header {
                src_cid: cids.0,
                dst_cid: cids.1,
                src_port: 50 + ports.1,
                dst_port: 1 + ports.0,
                len,
                kind,
                op,
                flags,
                buf_alloc,
                fwd_cnt,
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn hostile_packets_leave_other_connections_alone(
        packets in prop::collection::vec((hostile_header(), 0..200_usize), 1..60),
    ) {
        let mut guest = Guest::new();
        let listener = guest.host_listens(1);
        listener.set_nonblocking(true).unwrap();
        let (mut client, pair) = guest.accept(1000);
        let mut streams = Vec::new();
        for (header, len) in packets {
            guest.send(&header, &vec![3; len]);
            if let Ok((mut stream, _)) = listener.accept() {
                let _ = stream.write_all(b"hello");
                streams.push(stream);
            }
            // The guest's own account is not kept for these.
            let _ = guest.driver.run_events(Duration::ZERO);
        }
        guest.lenient = true;
        assert_alive(&mut guest, &mut client, pair);
    }

    #[test]
    fn hostile_queues_break_nothing(
        queue in 0..3_usize,
        bytes in prop::collection::vec(any::<u8>(), 0..600),
    ) {
        let mut guest = Guest::new();
        let (mut client, _) = guest.accept(1);
        client.set_nonblocking(true).unwrap();
        guest.driver.scribble(queue, &bytes);
        let _ = client.write(&[1; 5000]);
        // An error means that the transport resets the device.
        let _ = guest.driver.kick(queue);
        let _ = guest.driver.run_events(Duration::ZERO);
        let _ = guest.driver.kick(RX);
        prop_assert!(guest.driver.device.reset().is_some());
        let features = guest.driver.device.features();
        guest.driver.activate(features).unwrap();
    }

    #[test]
    fn data_arrives_whole_whatever_the_pieces(
        seed in any::<u64>(),
        rx in prop::collection::vec(1..3000_u32, 1..5),
        chunks in prop::collection::vec((1..70_000_usize, 1..70_000_usize), 1..25),
    ) {
        let mut rx = rx;
        rx[0] += HEADER_LEN as u32;
        let mut guest = Guest::with_rx(8, &rx);
        let (mut client, pair) = guest.accept(1);
        client.set_nonblocking(true).unwrap();
        let mut random = seed;
        let mut byte = || {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (random >> 56) as u8
        };
        let (mut out, mut back) = (Vec::<u8>::new(), Vec::<u8>::new());
        let (mut to_host, mut to_guest) = (Vec::<u8>::new(), Vec::<u8>::new());
        let mut buffer = vec![0; 40_000];
        for (up, down) in chunks {
            let data: Vec<u8> = (0..up).map(|_| byte()).collect();
            let sent = guest.send_data(pair, &data);
            out.extend(&data[..sent]);
            let data: Vec<u8> = (0..down).map(|_| byte()).collect();
            let written = client.write(&data).unwrap_or(0);
            back.extend(&data[..written]);
            to_guest.extend(guest.data(pair));
            if up % 3 > 0 {
                let len = client.read(&mut buffer).unwrap_or(0);
                to_host.extend(&buffer[..len]);
            }
        }
        client.shutdown(std::net::Shutdown::Write).unwrap();
        guest.send_op(pair, Op::Shutdown, crate::device::vsock::packet::SHUTDOWN_SEND);
        loop {
            to_guest.extend(guest.data(pair));
            match client.read(&mut buffer) {
                Ok(0) => break,
                Ok(len) => to_host.extend(&buffer[..len]),
                Err(_) => {}
            }
        }
        to_guest.extend(guest.data(pair));
        prop_assert!(to_host == out, "{} of {} bytes", to_host.len(), out.len());
        prop_assert!(to_guest == back, "{} of {} bytes", to_guest.len(), back.len());
    }
}
