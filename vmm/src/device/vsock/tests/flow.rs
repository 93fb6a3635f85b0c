//! Connections made, used and ended by well-behaved guests and hosts.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use super::guest::{Guest, ROOM};
use crate::device::testing::MockDriver;
use crate::device::vsock::csm::BUFFER_SIZE;
use crate::device::vsock::packet::{
    HEADER_LEN, Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND,
};
use crate::device::vsock::{RX, Vsock};
use crate::device::{Device, DeviceError};

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|at| (at.wrapping_mul(31) >> 3) as u8 ^ at as u8 ^ seed)
        .collect()
}

// Everything that `stream` has now.
fn read_now(stream: &mut UnixStream) -> Vec<u8> {
    stream.set_nonblocking(true).unwrap();
    let mut all = Vec::new();
    match stream.read_to_end(&mut all) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
    }
    all
}

#[test]
fn a_host_program_reaches_a_port_of_the_guest() {
    let mut guest = Guest::new();
    let (mut client, pair) = guest.accept(1024);
    assert!(
        pair.0 >= 1 << 30,
        "host ports are out of the well-known ones' way"
    );
    client.write_all(b"ping").unwrap();
    assert_eq!(guest.data(pair), b"ping");
    assert_eq!(guest.send_data(pair, b"pong"), 4);
    assert_eq!(read_now(&mut client), b"pong");
    assert!(guest.driver.interrupt.queue_count(RX) > 0);
}

#[test]
fn a_guest_program_reaches_a_socket_of_the_host() {
    let mut guest = Guest::new();
    let listener = guest.host_listens(52);
    let mut server = guest.connect(&listener, (52, 7000));
    assert_eq!(guest.send_data((52, 7000), b"hello"), 5);
    assert_eq!(read_now(&mut server), b"hello");
    server.write_all(b"world").unwrap();
    assert_eq!(guest.data((52, 7000)), b"world");
}

#[test]
fn data_sent_right_behind_the_connect_line_is_the_guests() {
    let mut guest = Guest::new();
    let mut client = guest.host_connects();
    client.write_all(b"CONNECT 9\nearly").unwrap();
    let (request, _) = guest.expect(Op::Request);
    let pair = (request.src_port, 9);
    guest.expect_nothing();
    guest.send_op(pair, Op::Response, 0);
    assert_eq!(guest.data(pair), b"early");
}

#[test]
fn a_port_without_a_listener_is_refused_on_either_side() {
    let mut guest = Guest::new();
    guest.send_op((99, 7000), Op::Request, 0);
    let (reset, _) = guest.expect(Op::Reset);
    assert_eq!((reset.src_port, reset.dst_port), (99, 7000));

    // A file that is no socket, and a socket that nobody listens to any more.
    std::fs::write(guest.socket(98), b"").unwrap();
    drop(guest.host_listens(97));
    for port in [97, 98] {
        guest.send_op((port, 7000), Op::Request, 0);
        guest.expect(Op::Reset);
    }

    let mut client = guest.host_connects();
    client.write_all(b"CONNECT 5\n").unwrap();
    let (request, _) = guest.expect(Op::Request);
    guest.send_op((request.src_port, 5), Op::Reset, 0);
    assert_eq!(client.read(&mut [0; 8]).unwrap(), 0, "closed without an OK");
    assert_eq!(guest.driver.device.muxer.connections(), 0);
}

#[test]
fn a_host_program_that_gives_up_takes_its_request_back() {
    let mut guest = Guest::new();
    let mut client = guest.host_connects();
    client.write_all(b"CONNECT 5\n").unwrap();
    let (request, _) = guest.expect(Op::Request);
    drop(client);
    let (reset, _) = guest.expect(Op::Reset);
    assert_eq!(reset.src_port, request.src_port);
    assert_eq!(guest.driver.device.muxer.connections(), 0);
}

#[test]
fn an_end_of_data_passes_each_way_on_its_own() {
    let mut guest = Guest::new();
    let (mut client, pair) = guest.accept(1);
    client.write_all(b"last").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.data(pair), b"last");
    let (shutdown, _) = guest.expect(Op::Shutdown);
    assert_eq!(shutdown.flags, SHUTDOWN_SEND);

    // The other way still works.
    guest.send_data(pair, b"reply");
    guest.send_op(pair, Op::Shutdown, SHUTDOWN_SEND);
    assert_eq!(read_now(&mut client), b"reply");
    assert_eq!(client.read(&mut [0; 1]).unwrap(), 0, "end of file");
    let (shutdown, _) = guest.expect(Op::Shutdown);
    assert_eq!(shutdown.flags, SHUTDOWN_BOTH, "both directions have ended");
    assert_eq!(guest.driver.device.muxer.connections(), 0);
}

#[test]
fn a_guest_that_finished_sending_first_still_receives() {
    let mut guest = Guest::new();
    let (mut client, pair) = guest.accept(1);
    guest.send_data(pair, b"request");
    guest.send_op(pair, Op::Shutdown, SHUTDOWN_SEND);
    let mut request = String::new();
    client.read_to_string(&mut request).unwrap();
    assert_eq!(request, "request");
    guest.expect_nothing();
    client.write_all(b"response").unwrap();
    drop(client);
    assert_eq!(guest.data(pair), b"response");
    assert_eq!(guest.expect(Op::Shutdown).0.flags, SHUTDOWN_BOTH);
}

#[test]
fn a_guest_that_stops_receiving_breaks_the_writers_pipe() {
    let mut guest = Guest::new();
    let (mut client, pair) = guest.accept(1);
    guest.send_op(pair, Op::Shutdown, SHUTDOWN_RECEIVE);
    assert_eq!(
        client.write(b"x").unwrap_err().kind(),
        ErrorKind::BrokenPipe
    );
    guest.send_data(pair, b"still talking");
    assert_eq!(read_now(&mut client), b"still talking");
}

#[test]
fn a_guest_that_closes_is_answered_with_a_reset_and_the_reader_gets_an_end_of_file() {
    let mut guest = Guest::new();
    let (mut client, pair) = guest.accept(1);
    guest.reads = false;
    client.write_all(b"never read").unwrap();
    guest.send_data(pair, b"bye");
    guest.send_op(pair, Op::Shutdown, SHUTDOWN_BOTH);
    guest.settle();
    assert_eq!(guest.inbox.pop_back().unwrap().0.op, Op::Reset as u16);
    let mut rest = String::new();
    client.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "bye");
    assert_eq!(guest.driver.device.muxer.connections(), 0);
}

#[test]
fn a_host_program_that_goes_away_ends_both_directions() {
    let mut guest = Guest::new();
    let (mut client, pair) = guest.accept(1);
    client.write_all(b"bye").unwrap();
    drop(client);
    assert_eq!(guest.data(pair), b"bye", "what it sent before arrives");
    let (shutdown, _) = guest.expect(Op::Shutdown);
    assert_eq!(shutdown.flags, SHUTDOWN_BOTH);
    assert_eq!(guest.driver.device.muxer.connections(), 0);
    assert_eq!(guest.driver.watcher.watched().len(), 3, "nothing leaks");
}

#[test]
fn a_host_program_that_goes_away_unread_is_noticed_without_credit_too() {
    let mut guest = Guest::new();
    guest.reads = false;
    let (mut client, pair) = guest.accept(1);
    let data = pattern(ROOM as usize + 100, 1);
    client.write_all(&data).unwrap();
    assert_eq!(guest.data(pair).len(), ROOM as usize);
    drop(client);
    assert_eq!(guest.expect(Op::Shutdown).0.flags, SHUTDOWN_RECEIVE);
    guest.expect_nothing();
    guest.take(pair);
    assert_eq!(guest.data(pair), data[ROOM as usize..]);
    assert_eq!(guest.expect(Op::Shutdown).0.flags, SHUTDOWN_BOTH);
}

#[test]
fn what_a_guest_sent_drains_after_it_has_gone() {
    for end in [Op::Shutdown, Op::Reset] {
        let mut guest = Guest::new();
        let (mut client, pair) = guest.accept(1);
        // The socket takes some, the connection's buffer the rest.
        let mut sent = Vec::new();
        loop {
            let data = pattern(50_000, sent.len() as u8);
            let len = guest.send_data(pair, &data);
            if len == 0 {
                break;
            }
            sent.extend(&data[..len]);
            guest.settle();
        }
        assert!(sent.len() > BUFFER_SIZE as usize);
        guest.send_op(pair, end, SHUTDOWN_BOTH);
        guest.settle();
        guest.inbox.clear();
        // The ports are free again at once.
        guest.send_op(pair, Op::CreditRequest, 0);
        guest.expect(Op::Reset);

        let mut got = Vec::new();
        while guest.driver.device.muxer.connections() > 0 {
            got.extend(read_now(&mut client));
            guest.settle();
        }
        got.extend(read_now(&mut client));
        assert!(got == sent, "{} of {} bytes", got.len(), sent.len());
        assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
    }
}

#[test]
fn credit_bounds_what_waits_on_either_side() {
    let mut guest = Guest::new();
    guest.reads = false;
    let (mut client, pair) = guest.accept(1);
    client.set_nonblocking(true).unwrap();
    let data = pattern(4 * ROOM as usize, 5);
    let mut written = 0;
    let mut got = Vec::new();
    while got.len() < data.len() {
        if let Ok(len) = client.write(&data[written..]) {
            written += len;
        }
        let now = guest.data(pair);
        assert!(now.len() <= ROOM as usize);
        got.extend(now);
        guest.expect_nothing();
        guest.take(pair);
    }
    assert!(got == data);

    // The other way: no more than promised, and the promise is renewed as the reader reads.
    let mut sent = Vec::new();
    while guest.credit(pair) > 0 {
        let chunk = pattern(10_000, 9);
        let len = guest.send_data(pair, &chunk);
        sent.extend(&chunk[..len]);
        guest.settle();
    }
    guest.inbox.clear();
    let got = read_now(&mut client);
    assert!(sent.starts_with(&got));
    guest.settle();
    assert!(guest.credit(pair) > 0, "the reader has made room");
}

#[test]
fn a_credit_request_is_answered() {
    let mut guest = Guest::new();
    let (_client, pair) = guest.accept(1);
    guest.send_data(pair, b"abc");
    guest.expect_nothing();
    guest.send_op(pair, Op::CreditRequest, 0);
    let (update, _) = guest.expect(Op::CreditUpdate);
    assert_eq!((update.buf_alloc, update.fwd_cnt), (BUFFER_SIZE, 3));
}

#[test]
fn a_program_that_never_reads_holds_up_nobody_else() {
    let mut guest = Guest::new();
    let (_stuck, stuck) = guest.accept(1);
    while guest.credit(stuck) > 0 {
        guest.send_data(stuck, &[1; 60_000]);
        guest.settle();
    }
    guest.inbox.clear();
    let (mut client, pair) = guest.accept(2);
    guest.send_data(pair, b"through");
    assert_eq!(read_now(&mut client), b"through");

    // And a guest program that never reads.
    guest.reads = false;
    let (mut deaf, deaf_pair) = guest.accept(3);
    deaf.set_nonblocking(true).unwrap();
    while deaf.write(&[2; 50_000]).is_ok() {
        guest.settle();
    }
    assert_eq!(guest.data(deaf_pair).len(), ROOM as usize);
    client.set_nonblocking(true).unwrap();
    client.write_all(b"back").unwrap();
    assert_eq!(guest.data(pair), b"back");
}

#[test]
fn receive_buffers_are_shared_fairly() {
    let mut guest = Guest::with_rx(1, &[HEADER_LEN as u32 + 1000]);
    let mut streams = Vec::new();
    for port in 0..3 {
        streams.push(guest.accept(port));
    }
    for (stream, _) in &mut streams {
        stream.write_all(&[0; 5000]).unwrap();
    }
    guest.settle();
    let order: Vec<u32> = guest
        .inbox
        .iter()
        .map(|(header, _)| header.dst_port)
        .collect();
    assert_eq!(order.len(), 15);
    // The first packet left before the others' data was seen.
    for turn in order[1..13].chunks(3) {
        let mut ports = turn.to_vec();
        ports.sort_unstable();
        assert_eq!(ports, [0, 1, 2], "each gets its turn: {order:?}");
    }
}

#[test]
fn headers_and_data_may_be_split_over_descriptors() {
    let mut guest = Guest::with_rx(8, &[1, 20, 30, 100, 1, 50]);
    let (mut client, pair) = guest.accept(1);
    let data = pattern(5000, 3);
    let header = Header {
        len: 5000,
        ..guest.header(pair, Op::ReadWrite)
    };
    let cuts: Vec<usize> = (1..44).step_by(7).chain((44..5000).step_by(113)).collect();
    guest.send_cut(&header, &data, &cuts);
    assert!(read_now(&mut client) == data);
    client.set_nonblocking(true).unwrap();
    client.write_all(&data).unwrap();
    assert!(guest.data(pair) == data);
}

#[test]
fn a_thousand_connections_work_side_by_side() {
    let mut guest = Guest::new();
    let listener = guest.host_listens(10);
    let mut servers = Vec::new();
    for port in 0..500 {
        servers.push((guest.accept(port).0, None));
        let server = guest.connect(&listener, (10, 10_000 + port));
        servers.push((server, Some(10_000 + port)));
    }
    assert_eq!(guest.driver.device.muxer.connections(), 1000);
    for (index, (stream, _)) in servers.iter_mut().enumerate() {
        stream.write_all(&(index as u32).to_le_bytes()).unwrap();
    }
    guest.settle();
    let mut seen: Vec<u32> = guest
        .inbox
        .drain(..)
        .map(|(_, data)| u32::from_le_bytes(data.try_into().unwrap()))
        .collect();
    seen.sort_unstable();
    assert_eq!(seen, (0..1000).collect::<Vec<_>>());
    drop(servers);
    guest.settle();
    assert_eq!(guest.driver.device.muxer.connections(), 0);
}

#[test]
fn reset_closes_everything_and_the_device_can_be_activated_again() {
    let mut guest = Guest::new();
    let (mut client, _) = guest.accept(1);
    let resources = guest.driver.device.reset().expect("was active");
    assert_eq!(resources.queues.len(), 3);
    assert!(guest.driver.device.reset().is_none());
    assert!(guest.driver.watcher.watched().is_empty());
    assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
    assert!(matches!(guest.driver.kick(RX), Err(DeviceError::State(_))));

    let features = guest.driver.device.features();
    guest.driver.activate(features).unwrap();
    assert!(matches!(
        guest
            .driver
            .device
            .activate(resources, guest.driver.watcher.clone()),
        Err(DeviceError::State(_))
    ));
}

#[test]
fn the_configuration_is_the_context_id_and_zeros() {
    let dir = tempfile::tempdir().unwrap();
    let listener = std::os::unix::net::UnixListener::bind(dir.path().join("l")).unwrap();
    let device = Vsock::new(0x1_0000_0005, listener, dir.path().into()).unwrap();
    let driver = MockDriver::new(device);
    let mut data = [0xff; 12];
    driver.device.read_config(0, &mut data);
    assert_eq!(data, [5, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    driver.device.read_config(u64::MAX, &mut data);
    assert_eq!(data, [0; 12]);
    driver.device.read_config(4, &mut data[..1]);
    assert_eq!(data[0], 1);
}
