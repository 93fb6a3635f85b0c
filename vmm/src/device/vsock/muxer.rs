//! All connections of a guest: who is at which ports, what the guest must be told next, which sockets are
//! watched.
//!
//! Fairness: connections with something for the guest stand in one queue and yield one packet a turn. What a
//! connection may hold up is only itself: its data waits in its own bounded buffer ([`super::csm`]) or in its
//! socket. Bounds: [`MAX_CONNECTIONS`] in all, [`MAX_HALF_OPEN`] of them half-open, each of those for at most
//! [`DEADLINE`]; beyond them the guest's requests are reset, the host's wait in the listener's backlog.

mod host;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use vmm_sys_util::timerfd::TimerFd;

use super::buffers::Buffers;
use super::csm::{Connection, Phase, Ports};
use super::handshake::Handshake;
use super::packet::{HOST_CID, Header, Op, TYPE_STREAM};
use crate::device::{Readiness, Watcher};

/// The most connections at a time, half-open and draining ones included.
pub const MAX_CONNECTIONS: usize = 1024;
/// The most connections of the host's at a time that are not open yet.
pub const MAX_HALF_OPEN: usize = 128;
/// How long a connection may stay half-open.
pub const DEADLINE: Duration = Duration::from_secs(10);
/// The most resets for unknown connections that wait for the guest to make room; more are dropped.
const MAX_RESETS: usize = 1024;
/// The host's ports are made up from here, so that they are not mistaken for well-known ones.
const FIRST_HOST_PORT: u32 = 1 << 30;

const LISTENER: u64 = 0;
const TIMER: u64 = 1;
/// Tokens from here on belong to connections; the device uses others below.
const FIRST_TOKEN: u64 = 16;

const READ: Readiness = Readiness {
    read: true,
    write: false,
};

enum Kind {
    Handshake(Handshake),
    Connection(Box<Connection>),
}

struct Entry {
    kind: Kind,
    watched: Option<Readiness>,
    // Stands in the queue of those with something for the guest.
    queued: bool,
    // Counted as half-open.
    half_open: bool,
}

impl Entry {
    fn fd(&self) -> RawFd {
        match &self.kind {
            Kind::Handshake(handshake) => handshake.stream().as_raw_fd(),
            Kind::Connection(connection) => connection.stream().as_raw_fd(),
        }
    }

    fn interest(&self) -> Option<Readiness> {
        match &self.kind {
            Kind::Handshake(_) => Some(READ),
            Kind::Connection(connection) => connection.interest(),
        }
    }

    fn is_half_open(&self) -> bool {
        match &self.kind {
            Kind::Handshake(_) => true,
            Kind::Connection(connection) => connection.phase() == Phase::Connecting,
        }
    }

    fn is_late(&self, now: Instant) -> bool {
        let created = match &self.kind {
            Kind::Handshake(handshake) => handshake.created(),
            Kind::Connection(connection) => connection.created(),
        };
        self.is_half_open() && now.saturating_duration_since(created) >= DEADLINE
    }
}

/// See the module.
pub struct Muxer {
    guest_cid: u64,
    listener: UnixListener,
    sockets_dir: PathBuf,
    timer: TimerFd,
    watcher: Option<Arc<dyn Watcher + Send + Sync>>,
    entries: HashMap<u64, Entry>,
    // The connections that the guest knows of.
    by_ports: HashMap<Ports, u64>,
    ready: VecDeque<u64>,
    resets: VecDeque<Header>,
    half_open: usize,
    next_token: u64,
    next_port: u32,
    listening: bool,
    ticking: bool,
}

impl Muxer {
    /// Connections of the guest `guest_cid`; see [`super::Vsock::new`].
    ///
    /// # Errors
    /// The listener cannot be made nonblocking, or no timer can be had.
    pub fn new(guest_cid: u64, listener: UnixListener, sockets_dir: PathBuf) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self {
            guest_cid,
            listener,
            sockets_dir,
            timer: TimerFd::new().map_err(io::Error::from)?,
            watcher: None,
            entries: HashMap::new(),
            by_ports: HashMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            half_open: 0,
            next_token: FIRST_TOKEN,
            next_port: FIRST_HOST_PORT,
            listening: false,
            ticking: false,
        })
    }

    /// Begins to accept and watch.
    ///
    /// # Errors
    /// The watcher's.
    pub fn start(&mut self, watcher: Arc<dyn Watcher + Send + Sync>) -> io::Result<()> {
        watcher.watch(self.timer.as_raw_fd(), TIMER, READ)?;
        self.watcher = Some(watcher);
        self.listen(true)
    }

    /// Closes every connection and watches nothing any more.
    pub fn stop(&mut self) {
        let tokens: Vec<u64> = self.entries.keys().copied().collect();
        for token in tokens {
            self.remove(token);
        }
        let _ = self.listen(false);
        let _ = self.timer.clear();
        if let Some(watcher) = self.watcher.take() {
            let _ = watcher.unwatch(self.timer.as_raw_fd());
        }
        self.ticking = false;
        self.ready.clear();
        self.resets.clear();
    }

    /// The host's port of the next connection into the guest.
    pub fn next_port(&self) -> u32 {
        self.next_port
    }

    /// Has the host's ports begin at `port`: a guest that was restored refuses those of sockets that it has not closed yet.
    pub fn go_on_from(&mut self, port: u32) {
        self.next_port = FIRST_HOST_PORT | (port & (FIRST_HOST_PORT - 1));
    }

    /// Connections, half-open and draining ones included.
    pub fn connections(&self) -> usize {
        self.entries.len()
    }

    /// Takes a packet of the guest's; `payload` is what follows the header in its buffers.
    ///
    /// Packets from another context id are dropped: nobody could have sent them. Whatever else fits no
    /// connection is answered with a reset (but a reset is not).
    ///
    /// # Errors
    /// The watcher's, for the listener. A connection that cannot be watched is closed.
    pub fn packet(&mut self, header: &Header, mut payload: Buffers<'_>) -> io::Result<()> {
        if header.src_cid != self.guest_cid {
            return Ok(());
        }
        let ports = Ports {
            host: header.dst_port,
            guest: header.src_port,
        };
        let op = Op::from_wire(header.op);
        let token = self.by_ports.get(&ports).copied();
        if header.kind != TYPE_STREAM || header.dst_cid != HOST_CID {
            self.refuse(header);
            return Ok(());
        }
        let whole = payload.len() >= header.len as usize;
        payload.truncate(header.len as usize);
        match (op, token.and_then(|token| self.connection(token))) {
            (Some(op), Some(connection)) if whole => connection.packet(op, header, payload),
            // An unknown operation, or data that is not there.
            (_, Some(connection)) => connection.abandon(),
            (Some(Op::Request), None) => self.connect_host(header),
            (_, None) => self.refuse(header),
        }
        if let Some(token) = token {
            self.settle(token);
        }
        self.make_room()
    }

    /// The next packet for the guest, data received into `room`; `None` if there is none.
    pub fn next_packet(&mut self, room: &mut Buffers<'_>) -> Option<Header> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(reset);
        }
        while let Some(token) = self.ready.pop_front() {
            let Some(entry) = self.entries.get_mut(&token) else {
                continue;
            };
            entry.queued = false;
            let Kind::Connection(connection) = &mut entry.kind else {
                continue;
            };
            let packet = connection.next_packet(room);
            self.settle(token);
            if let Some(header) = packet {
                return Some(Header {
                    src_cid: HOST_CID,
                    dst_cid: self.guest_cid,
                    ..header
                });
            }
        }
        None
    }

    /// True if [`Muxer::next_packet`] may have something.
    pub fn has_packets(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    fn connection(&mut self, token: u64) -> Option<&mut Connection> {
        match &mut self.entries.get_mut(&token)?.kind {
            Kind::Connection(connection) => Some(connection),
            Kind::Handshake(_) => None,
        }
    }

    // Connects to the socket that stands for the port the guest asks for.
    fn connect_host(&mut self, request: &Header) {
        let stream = match self.entries.len() < MAX_CONNECTIONS {
            true => self.dial(request.dst_port).ok(),
            false => None,
        };
        let Some(stream) = stream else {
            return self.refuse(request);
        };
        let connection = Connection::from_guest(request, stream);
        let ports = connection.ports();
        let token = self.insert(Kind::Connection(Box::new(connection)));
        self.by_ports.insert(ports, token);
        self.settle(token);
    }

    fn dial(&self, port: u32) -> io::Result<UnixStream> {
        let address = SocketAddrUnix::new(self.sockets_dir.join(port.to_string()))?;
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // At once or not at all: a full backlog is `EAGAIN`, and the guest's caller may try again.
        rustix::net::connect(&socket, &address)?;
        Ok(UnixStream::from(socket))
    }

    fn refuse(&mut self, header: &Header) {
        if header.op != Op::Reset as u16 {
            self.push_reset(header.reset_reply());
        }
    }

    fn push_reset(&mut self, reset: Header) {
        if self.resets.len() < MAX_RESETS {
            self.resets.push_back(reset);
        }
    }

    fn insert(&mut self, kind: Kind) -> u64 {
        let token = self.next_token;
        // 2^64 connections are out of reach.
        self.next_token = self.next_token.wrapping_add(1);
        let mut entry = Entry {
            kind,
            watched: None,
            queued: false,
            half_open: false,
        };
        if entry.is_half_open() {
            entry.half_open = true;
            self.half_open = self.half_open.saturating_add(1);
            self.start_ticking();
        }
        self.entries.insert(token, entry);
        token
    }

    // Acts on what has become of an entry: tells the guest, forgets it, queues it, watches it.
    fn settle(&mut self, token: u64) {
        let Some(entry) = self.entries.get_mut(&token) else {
            return;
        };
        if entry.half_open && !entry.is_half_open() {
            entry.half_open = false;
            self.half_open = self.half_open.saturating_sub(1);
        }
        if let Kind::Connection(connection) = &mut entry.kind {
            let ports = connection.ports();
            let (phase, starved) = (connection.phase(), connection.starved());
            let reset = connection.take_reset();
            if connection.wants_to_send() && !entry.queued {
                entry.queued = true;
                self.ready.push_back(token);
            }
            if reset {
                self.push_reset(self.reset_of(ports));
            }
            if starved {
                self.start_ticking();
            }
            match phase {
                Phase::Closed => return self.remove(token),
                Phase::Draining => self.forget_ports(token, ports),
                Phase::Connecting | Phase::Open => {}
            }
        }
        self.watch(token);
    }

    // Watches an entry's socket for what it waits for.
    fn watch(&mut self, token: u64) {
        let (Some(entry), Some(watcher)) = (self.entries.get_mut(&token), &self.watcher) else {
            return;
        };
        let interest = entry.interest();
        if interest == entry.watched {
            return;
        }
        let done = match interest {
            Some(readiness) => watcher.watch(entry.fd(), token, readiness),
            None => watcher.unwatch(entry.fd()),
        };
        if done.is_ok() {
            entry.watched = interest;
            return;
        }
        // Nobody would ever look at it again.
        if let Kind::Connection(connection) = &mut entry.kind {
            connection.abandon();
            if connection.take_reset() {
                let ports = connection.ports();
                self.push_reset(self.reset_of(ports));
            }
        }
        self.remove(token);
    }

    fn remove(&mut self, token: u64) {
        let Some(entry) = self.entries.remove(&token) else {
            return;
        };
        if entry.half_open {
            self.half_open = self.half_open.saturating_sub(1);
        }
        if let (Some(_), Some(watcher)) = (entry.watched, &self.watcher) {
            // Closing the descriptor ends the watch in any case.
            let _ = watcher.unwatch(entry.fd());
        }
        if let Kind::Connection(connection) = &entry.kind {
            self.forget_ports(token, connection.ports());
        }
    }

    // The guest may use the ports anew.
    fn forget_ports(&mut self, token: u64, ports: Ports) {
        if self.by_ports.get(&ports) == Some(&token) {
            self.by_ports.remove(&ports);
        }
    }

    fn reset_of(&self, ports: Ports) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: ports.host,
            dst_port: ports.guest,
            kind: TYPE_STREAM,
            op: Op::Reset as u16,
            ..Header::default()
        }
    }
}
