use std::io::{Read, Write};

use super::*;
use crate::device::vsock::packet::HEADER_LEN;

const PORTS: Ports = Ports {
    host: 1 << 30,
    guest: 7,
};
const ROOM: u32 = 1000;

fn header(op: Op) -> Header {
    Header {
        src_port: PORTS.guest,
        dst_port: PORTS.host,
        kind: TYPE_STREAM,
        op: op as u16,
        buf_alloc: ROOM,
        ..Header::default()
    }
}

fn pair() -> (UnixStream, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_nonblocking(true).unwrap();
    (ours, theirs)
}

// A connection in `phase`, with the program at the host's end.
fn connection(phase: Phase) -> (Connection, UnixStream) {
    let (ours, mut theirs) = pair();
    let mut connection = Connection::from_host(PORTS, ours);
    if phase == Phase::Connecting {
        return (connection, theirs);
    }
    next(&mut connection).expect("a request");
    connection.packet(Op::Response, &header(Op::Response), Buffers::default());
    let mut line = [0; 32];
    let len = theirs.read(&mut line).unwrap();
    assert_eq!(line[..len], *b"OK 1073741824\n");
    next(&mut connection);
    if phase == Phase::Draining {
        fill(&mut connection);
        connection.packet(Op::Reset, &header(Op::Reset), Buffers::default());
    }
    assert_eq!(connection.phase(), phase);
    (connection, theirs)
}

fn next(connection: &mut Connection) -> Option<Header> {
    next_data(connection).map(|(header, _)| header)
}

fn next_data(connection: &mut Connection) -> Option<(Header, Vec<u8>)> {
    let mut room = vec![0; 4096];
    let header = connection.next_packet(&mut Buffers::from(room.as_mut_slice()))?;
    room.truncate(header.len as usize);
    Some((header, room))
}

fn send(connection: &mut Connection, len: usize) {
    let mut data = vec![0x5a; len];
    let header = Header {
        len: len as u32,
        ..header(Op::ReadWrite)
    };
    let payload = Buffers::from(data.as_mut_slice());
    connection.packet(Op::ReadWrite, &header, payload);
}

// Sends until the socket takes no more and something waits; never more than the credit.
fn fill(connection: &mut Connection) {
    while connection.backlog.is_empty() {
        send(connection, 10_000);
    }
}

const READABLE: Readiness = Readiness {
    read: true,
    write: false,
};
const WRITABLE: Readiness = Readiness {
    read: false,
    write: true,
};
const BOTH: Readiness = Readiness {
    read: true,
    write: true,
};

#[test]
fn each_operation_is_allowed_in_its_phases_only() {
    use Op::*;
    let all = [
        Request,
        Response,
        Reset,
        Shutdown,
        ReadWrite,
        CreditUpdate,
        CreditRequest,
    ];
    for (phase, allowed) in [
        (Phase::Connecting, &[Response, Reset][..]),
        (
            Phase::Open,
            &[Reset, Shutdown, ReadWrite, CreditUpdate, CreditRequest][..],
        ),
    ] {
        for op in all {
            let (mut connection, _program) = connection(phase);
            connection.packet(op, &header(op), Buffers::default());
            let broken = !allowed.contains(&op);
            assert_eq!(connection.take_reset(), broken, "{op:?} in {phase:?}");
            if broken {
                assert_eq!(connection.phase(), Phase::Closed);
                assert_eq!(connection.interest(), None);
            }
            assert!(!connection.take_reset(), "one reset is enough");
        }
    }
}

#[test]
fn a_request_is_sent_once_and_taken_back_only_if_it_was_sent() {
    let (mut unsent, _program) = connection(Phase::Connecting);
    unsent.abandon();
    assert!(!unsent.take_reset());

    let (mut sent, _program) = connection(Phase::Connecting);
    assert_eq!(next(&mut sent).map(|header| header.op), Some(1));
    assert_eq!(next(&mut sent), None);
    sent.abandon();
    assert!(sent.take_reset());
}

#[test]
fn nothing_is_read_before_the_guest_has_accepted() {
    let (mut connection, mut program) = connection(Phase::Connecting);
    next(&mut connection);
    program.write_all(b"early").unwrap();
    connection.event(READABLE);
    assert_eq!(connection.interest(), Some(Readiness::default()));
    assert_eq!(next(&mut connection), None);
    connection.packet(Op::Response, &header(Op::Response), Buffers::default());
    assert_eq!(next_data(&mut connection).unwrap().1, b"early");
}

#[test]
fn a_guest_that_overdraws_its_credit_is_reset() {
    let (mut connection, _program) = connection(Phase::Open);
    fill(&mut connection);
    let left = BUFFER_SIZE as usize - connection.backlog.len();
    send(&mut connection, left);
    assert_eq!(connection.backlog.len(), BUFFER_SIZE as usize);
    assert_eq!(connection.phase(), Phase::Open, "to the last byte is fine");
    send(&mut connection, 1);
    assert!(connection.take_reset());
    assert_eq!(connection.phase(), Phase::Closed);
}

#[test]
fn data_after_the_guests_end_of_data_breaks_the_rules() {
    let (mut connection, _program) = connection(Phase::Open);
    let shutdown = Header {
        flags: SHUTDOWN_SEND,
        ..header(Op::Shutdown)
    };
    connection.packet(Op::Shutdown, &shutdown, Buffers::default());
    assert_eq!(connection.phase(), Phase::Open);
    send(&mut connection, 1);
    assert!(connection.take_reset());
}

#[test]
fn the_guests_credit_is_used_to_the_last_byte_and_asked_for_once() {
    let (mut connection, mut program) = connection(Phase::Open);
    program.write_all(&[1; ROOM as usize + 5]).unwrap();
    connection.event(READABLE);
    assert_eq!(next(&mut connection).unwrap().len, ROOM);
    assert!(connection.starved());
    assert!(!connection.wants_to_send());
    assert_eq!(next(&mut connection), None);
    let watched = connection.interest().unwrap();
    assert!(
        !watched.read,
        "a socket known to be readable is not watched for it"
    );

    connection.ask_for_credit();
    assert!(!connection.starved());
    let asked = next(&mut connection).unwrap();
    assert_eq!(asked.op, Op::CreditRequest as u16);
    assert_eq!(next(&mut connection), None);

    let update = Header {
        fwd_cnt: ROOM,
        ..header(Op::CreditUpdate)
    };
    connection.packet(Op::CreditUpdate, &update, Buffers::default());
    assert_eq!(next(&mut connection).unwrap().len, 5);
}

#[test]
fn credit_that_cannot_be_is_no_credit() {
    // The guest claims to have taken more than it was sent, or shrinks its buffer below what is in it.
    for (buf_alloc, fwd_cnt) in [(ROOM, 1), (ROOM, u32::MAX / 2), (0, 0), (u32::MAX, 1 << 31)] {
        let (mut connection, mut program) = connection(Phase::Open);
        program.write_all(b"data").unwrap();
        connection.event(READABLE);
        let lie = Header {
            buf_alloc,
            fwd_cnt,
            ..header(Op::CreditUpdate)
        };
        connection.packet(Op::CreditUpdate, &lie, Buffers::default());
        let sent = next(&mut connection).map_or(0, |header| header.len);
        let claims = fwd_cnt == 1 << 31;
        assert_eq!(sent, if claims { 4 } else { 0 }, "{buf_alloc} {fwd_cnt}");
    }
}

#[test]
fn counters_wrap_around() {
    let (mut connection, mut program) = connection(Phase::Open);
    let start = u32::MAX - 100;
    connection.sent = Wrapping(start);
    connection.guest_forwarded = Wrapping(start);
    connection.forwarded = Wrapping(start);
    connection.announced = Wrapping(start);
    program.write_all(&[1; 500]).unwrap();
    connection.event(READABLE);
    assert_eq!(next(&mut connection).unwrap().len, 500);
    let ack = Header {
        fwd_cnt: start.wrapping_add(500),
        ..header(Op::CreditUpdate)
    };
    connection.packet(Op::CreditUpdate, &ack, Buffers::default());
    assert_eq!(connection.credit(), ROOM);

    let mut read = 0;
    while read < BUFFER_SIZE as usize / 2 {
        connection.take_credit(&ack);
        let mut data = [0; 5000];
        let header = Header { len: 5000, ..ack };
        let payload = Buffers::from(data.as_mut_slice());
        connection.packet(Op::ReadWrite, &header, payload);
        read += program.read(&mut [0; 8192]).unwrap();
    }
    let update = next(&mut connection).expect("half of the buffer has been used");
    assert_eq!(update.op, Op::CreditUpdate as u16);
    assert_eq!(update.fwd_cnt, start.wrapping_add(read as u32));
}

#[test]
fn news_of_credit_rides_on_data() {
    let (mut connection, mut program) = connection(Phase::Open);
    program.write_all(b"x").unwrap();
    connection.event(READABLE);
    connection.packet(
        Op::CreditRequest,
        &header(Op::CreditRequest),
        Buffers::default(),
    );
    send(&mut connection, 10);
    let packet = next(&mut connection).unwrap();
    assert_eq!((packet.op, packet.fwd_cnt), (Op::ReadWrite as u16, 10));
    assert_eq!(next(&mut connection), None, "no update besides");
}

#[test]
fn a_full_socket_is_watched_and_drained_in_order() {
    let (mut connection, mut program) = connection(Phase::Open);
    fill(&mut connection);
    assert_eq!(connection.interest(), Some(BOTH));
    let waiting = connection.backlog.len();
    connection.event(WRITABLE);
    assert_eq!(connection.backlog.len(), waiting, "still full");
    while program.read(&mut [0; 65536]).is_ok() {}
    connection.event(WRITABLE);
    assert!(connection.backlog.is_empty());
    assert_eq!(
        connection.backlog.capacity(),
        0,
        "idle connections hold no buffer"
    );
    assert_eq!(connection.interest(), Some(READABLE));
}

#[test]
fn draining_ends_when_all_is_taken_or_nobody_is_left_to_take_it() {
    let (mut draining, mut program) = connection(Phase::Draining);
    assert!(!draining.wants_to_send());
    assert_eq!(draining.interest(), Some(WRITABLE));
    let mut buffer = vec![0; 1 << 20];
    while draining.phase() == Phase::Draining {
        assert!(program.read(&mut buffer).unwrap() > 0);
        draining.event(WRITABLE);
    }
    assert_eq!(draining.phase(), Phase::Closed);
    assert!(!draining.take_reset(), "the guest has forgotten it");

    let (mut draining, program) = connection(Phase::Draining);
    drop(program);
    draining.event(BOTH);
    assert_eq!(draining.phase(), Phase::Closed);
}

#[test]
fn a_hang_up_is_told_from_readiness() {
    let (mut connection, program) = connection(Phase::Open);
    // Ready as asked: no hang-up.
    connection.event(READABLE);
    assert!(!connection.hung_up);
    assert_eq!(next(&mut connection), None);
    // A spurious report.
    connection.event(BOTH);
    assert!(!connection.hung_up);
    assert_eq!(next(&mut connection), None);
    drop(program);
    connection.event(BOTH);
    assert!(connection.hung_up);
    assert_eq!(connection.interest(), None, "it would be reported for ever");
    let last = next(&mut connection).unwrap();
    assert_eq!((last.op, last.flags), (Op::Shutdown as u16, SHUTDOWN_BOTH));
    assert_eq!(connection.phase(), Phase::Closed);
}

#[test]
fn a_program_that_closes_unread_is_an_end_not_a_failure() {
    let (mut connection, program) = connection(Phase::Open);
    send(&mut connection, 100);
    // Unread data makes the next read fail with ECONNRESET.
    drop(program);
    connection.event(READABLE);
    let last = next(&mut connection).unwrap();
    assert_eq!((last.op, last.flags), (Op::Shutdown as u16, SHUTDOWN_BOTH));
}

#[test]
fn writing_to_a_program_that_has_gone_is_told_to_the_guest() {
    let (mut connection, program) = connection(Phase::Open);
    program.shutdown(Shutdown::Read).unwrap();
    send(&mut connection, 100);
    let told = next(&mut connection).unwrap();
    assert_eq!(
        (told.op, told.flags),
        (Op::Shutdown as u16, SHUTDOWN_RECEIVE)
    );
    assert_eq!(told.fwd_cnt, 100, "what is dropped uses no credit");
    send(&mut connection, BUFFER_SIZE as usize);
    assert_eq!(connection.phase(), Phase::Open);
}

#[test]
fn a_header_fits_before_data() {
    let mut bytes = [0; HEADER_LEN + 8];
    let mut buffers = Buffers::from(bytes.as_mut_slice());
    let mut front = buffers.reserve(HEADER_LEN).unwrap();
    assert_eq!((front.len(), buffers.len()), (HEADER_LEN, 8));
    assert!(buffers.reserve(9).is_none());
    front.write(&[7; HEADER_LEN + 1]);
    assert_eq!(bytes[HEADER_LEN - 1..=HEADER_LEN], [7, 0]);
}
