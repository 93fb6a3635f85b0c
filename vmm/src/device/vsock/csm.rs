//! The state machine of one connection between a socket of the host and a port of the guest.
//!
//! A connection moves bytes both ways and knows no queue: [`Connection::packet`] takes what the guest sent,
//! [`Connection::next_packet`] yields what the guest is to get, [`Connection::event`] takes the socket's readiness.
//! After each the owner looks at [`Connection::phase`], [`Connection::interest`], [`Connection::wants_to_send`]
//! and [`Connection::take_reset`].
//!
//! ```text
//!  host's CONNECT line                     guest's REQUEST
//!        |                                       |
//!    Connecting --- RESPONSE --->  Open  <-------+ (RESPONSE is owed)
//!        |                           |
//!        | RST, hang-up,             | guest: SHUTDOWN of both kinds (RST is owed), or RST
//!        | deadline                  |     +-- the socket has yet to take data --> Draining --+
//!        |                           |     +-- nothing is left -----------------+             |
//!        |                           | both directions ended (SHUTDOWN is sent) |             | all taken,
//!        |                           | the guest broke the rules (RST is owed)  |             | or hang-up
//!        +---------------------------+------------> Closed <--------------------+-------------+
//! ```
//!
//! While it is open each direction ends on its own and for good:
//!
//! | what happens | what follows |
//! | --- | --- |
//! | end of file on the socket | `SHUTDOWN(SEND)` to the guest, after all data |
//! | the socket takes no more data (`EPIPE`, hang-up) | `SHUTDOWN(RECEIVE)` to the guest; what is left is dropped |
//! | guest's `SHUTDOWN(SEND)` | `shutdown(SHUT_WR)` on the socket, after all data |
//! | guest's `SHUTDOWN(RECEIVE)` | `shutdown(SHUT_RD)` on the socket |
//!
//! Credit (virtio 1.2, section 5.10.6.3): each side may send at most as many bytes as the other has said that it
//! has room for. Ours is [`BUFFER_SIZE`], promised to the guest and kept in `backlog`, which holds only what
//! the socket did not take at once. The guest's is never overdrawn; a guest that overdraws ours is reset.

mod to_guest;
mod to_host;

use std::collections::VecDeque;
use std::net::Shutdown;
use std::num::Wrapping;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags};

use super::buffers::Buffers;
use super::packet::{
    Header, MAX_PAYLOAD, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
};
use crate::device::Readiness;

/// Bytes of the guest's that one connection buffers while its socket takes none.
pub const BUFFER_SIZE: u32 = 128 * 1024;

/// How far a connection has got. See the module's picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The host has asked, the guest has not answered.
    Connecting,
    /// Data flows, unless a direction has ended.
    Open,
    /// The guest is done with the connection; the socket still has to take what the guest sent.
    Draining,
    /// Nothing is left to do: drop it.
    Closed,
}

/// Both ends of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ports {
    /// The host's port.
    pub host: u32,
    /// The guest's port.
    pub guest: u32,
}

/// A connection; see the module.
pub struct Connection {
    ports: Ports,
    stream: UnixStream,
    phase: Phase,
    created: Instant,
    // Packets owed to the guest.
    request: bool,
    response: bool,
    reset: bool,
    credit_update: bool,
    credit_request: bool,
    // Flags of the SHUTDOWN packets sent so far.
    shutdown_sent: u32,
    // Guest to host.
    backlog: VecDeque<u8>,
    forwarded: Wrapping<u32>,
    announced: Wrapping<u32>,
    guest_finished: bool,
    socket_deaf: bool,
    // Host to guest.
    sent: Wrapping<u32>,
    guest_alloc: u32,
    guest_forwarded: Wrapping<u32>,
    guest_deaf: bool,
    socket_finished: bool,
    // The socket may have something to read: it has said so and not yet said otherwise.
    readable: bool,
    hung_up: bool,
    credit_requested: bool,
}

impl Connection {
    fn new(ports: Ports, stream: UnixStream, phase: Phase) -> Self {
        Self {
            ports,
            stream,
            phase,
            created: Instant::now(),
            request: false,
            response: false,
            reset: false,
            credit_update: false,
            credit_request: false,
            shutdown_sent: 0,
            backlog: VecDeque::new(),
            forwarded: Wrapping(0),
            announced: Wrapping(0),
            guest_finished: false,
            socket_deaf: false,
            sent: Wrapping(0),
            guest_alloc: 0,
            guest_forwarded: Wrapping(0),
            guest_deaf: false,
            socket_finished: false,
            readable: false,
            hung_up: false,
            credit_requested: false,
        }
    }

    /// A connection that the host asked for over `stream` (nonblocking); `ports.host` is the port made up for it.
    pub fn from_host(ports: Ports, stream: UnixStream) -> Self {
        Self {
            request: true,
            ..Self::new(ports, stream, Phase::Connecting)
        }
    }

    /// A connection that the guest asked for with `request`, made over `stream` (nonblocking).
    pub fn from_guest(request: &Header, stream: UnixStream) -> Self {
        let ports = Ports {
            host: request.dst_port,
            guest: request.src_port,
        };
        let mut connection = Self {
            response: true,
            readable: true,
            ..Self::new(ports, stream, Phase::Open)
        };
        connection.take_credit(request);
        connection
    }

    /// How far it has got.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Both ends.
    pub fn ports(&self) -> Ports {
        self.ports
    }

    /// When it was made.
    pub fn created(&self) -> Instant {
        self.created
    }

    /// The host's end.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// What the socket should be watched for; `None` if it need not be watched. Watching for nothing still
    /// reports a hang-up.
    pub fn interest(&self) -> Option<Readiness> {
        if self.hung_up || self.phase == Phase::Closed {
            return None;
        }
        Some(Readiness {
            read: self.reads() && !self.readable,
            write: !self.backlog.is_empty(),
        })
    }

    /// True once, when the guest must get a reset for this connection.
    pub fn take_reset(&mut self) -> bool {
        std::mem::take(&mut self.reset)
    }

    /// Gives the connection up: it took too long, or the host's end is gone. A guest that knows of it is reset.
    pub fn abandon(&mut self) {
        if matches!(self.phase, Phase::Connecting | Phase::Open) {
            // Before the request is sent there is nothing to take back.
            self.reset = !self.request;
        }
        self.phase = Phase::Closed;
    }

    /// Takes the socket's readiness. Whatever comes unasked for is a hang-up or an error.
    pub fn event(&mut self, readiness: Readiness) {
        let Some(interest) = self.interest() else {
            return;
        };
        if readiness.read && interest.read {
            self.readable = true;
        }
        let unasked = (readiness.read && !interest.read) || (readiness.write && !interest.write);
        if unasked && self.is_hung_up() {
            self.hang_up();
        } else if readiness.write && interest.write {
            self.flush();
        }
    }

    fn is_hung_up(&self) -> bool {
        let mut polled = [PollFd::new(&self.stream, PollFlags::empty())];
        let now = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let _ = rustix::event::poll(&mut polled, Some(&now));
        polled
            .iter()
            .any(|fd| fd.revents().intersects(PollFlags::HUP | PollFlags::ERR))
    }

    // The peer has closed its socket: it takes nothing more, but what it sent before can still be read.
    fn hang_up(&mut self) {
        self.hung_up = true;
        match self.phase {
            Phase::Open => {
                self.readable = true;
                self.become_deaf();
            }
            Phase::Connecting | Phase::Draining => self.abandon(),
            Phase::Closed => {}
        }
    }

    /// Takes a packet of the guest's with `payload`, which is as long as the header says.
    pub fn packet(&mut self, op: Op, header: &Header, payload: Buffers<'_>) {
        self.take_credit(header);
        match (self.phase, op) {
            (Phase::Connecting, Op::Response) => self.accepted(),
            (Phase::Connecting, Op::Reset) => self.phase = Phase::Closed,
            (Phase::Open, Op::ReadWrite) => self.data(payload),
            (Phase::Open, Op::Shutdown) => self.guest_shutdown(header.flags),
            (Phase::Open, Op::Reset) => self.guest_gone(),
            (Phase::Open, Op::CreditUpdate) => {}
            (Phase::Open, Op::CreditRequest) => self.credit_update = true,
            _ => self.violation(),
        }
    }

    // The guest broke the protocol: neither side can trust what was said.
    fn violation(&mut self) {
        self.reset = true;
        self.phase = Phase::Closed;
    }

    fn accepted(&mut self) {
        let mut line = format!("OK {}\n", self.ports.host).into_bytes();
        let len = line.len();
        // Nothing was ever written to the socket: it has room for a line unless its peer is gone.
        match Buffers::from(line.as_mut_slice()).send(self.stream.as_fd()) {
            Ok(sent) if sent == len => {
                self.phase = Phase::Open;
                self.readable = true;
            }
            _ => self.violation(),
        }
    }

    fn guest_shutdown(&mut self, flags: u32) {
        if flags & SHUTDOWN_RECEIVE != 0 && !self.guest_deaf {
            self.guest_deaf = true;
            let _ = self.stream.shutdown(Shutdown::Read);
            self.discard_unread();
        }
        if flags & SHUTDOWN_SEND != 0 {
            self.guest_finished = true;
            self.finish_writing();
        }
        if self.guest_deaf && self.guest_finished {
            // Answered at once, so that the guest can forget the connection; its data still drains.
            self.reset = true;
            self.guest_gone();
        }
    }

    fn guest_gone(&mut self) {
        self.guest_finished = true;
        self.phase = if self.backlog.is_empty() {
            Phase::Closed
        } else {
            Phase::Draining
        };
    }

    fn shutdown_due(&self) -> u32 {
        let mut flags = 0;
        if self.socket_finished || (self.socket_deaf && self.guest_deaf) {
            flags |= SHUTDOWN_SEND;
        }
        if self.socket_deaf && (self.socket_finished || !self.guest_finished) {
            flags |= SHUTDOWN_RECEIVE;
        }
        flags & !self.shutdown_sent
    }

    /// True if [`Connection::next_packet`] may have something.
    pub fn wants_to_send(&self) -> bool {
        match self.phase {
            Phase::Connecting => self.request,
            Phase::Open => {
                self.response
                    || self.credit_update
                    || self.credit_request
                    || self.shutdown_due() != 0
                    || (self.reads() && self.readable && self.credit() > 0)
            }
            Phase::Draining | Phase::Closed => false,
        }
    }

    /// The next packet for the guest, its data received into `room`; the header's context ids are the owner's to
    /// fill in. `None` if there is none after all.
    pub fn next_packet(&mut self, room: &mut Buffers<'_>) -> Option<Header> {
        match self.phase {
            Phase::Connecting if std::mem::take(&mut self.request) => {
                return Some(self.header(Op::Request, 0, 0));
            }
            Phase::Open => {}
            _ => return None,
        }
        if std::mem::take(&mut self.response) {
            return Some(self.header(Op::Response, 0, 0));
        }
        // Every packet tells our credit, so data comes before mere news of it.
        if let Some(len) = self.receive(room) {
            return Some(self.header(Op::ReadWrite, len, 0));
        }
        if std::mem::take(&mut self.credit_request) {
            return Some(self.header(Op::CreditRequest, 0, 0));
        }
        if self.credit_update {
            return Some(self.header(Op::CreditUpdate, 0, 0));
        }
        let due = self.shutdown_due();
        if due == 0 {
            return None;
        }
        self.shutdown_sent |= due;
        if self.shutdown_sent == SHUTDOWN_BOTH {
            self.phase = Phase::Closed;
        }
        Some(self.header(Op::Shutdown, 0, self.shutdown_sent))
    }

    fn header(&mut self, op: Op, len: u32, flags: u32) -> Header {
        self.announced = self.forwarded;
        self.credit_update = false;
        Header {
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            len,
            kind: TYPE_STREAM,
            op: op as u16,
            flags,
            buf_alloc: BUFFER_SIZE,
            fwd_cnt: self.forwarded.0,
            ..Header::default()
        }
    }
}

#[cfg(test)]
mod tests;
