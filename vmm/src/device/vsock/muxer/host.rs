//! The host's side of a [`Muxer`]: the listener, the readiness of sockets, the timer.

use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use super::{
    Connection, FIRST_HOST_PORT, Handshake, Kind, LISTENER, MAX_CONNECTIONS, MAX_HALF_OPEN, Muxer,
    Ports, READ, Readiness, TIMER,
};
use crate::device::vsock::handshake::Progress;

/// Deadlines and starved connections are looked after this often while there are any.
const TICK: Duration = Duration::from_secs(1);

impl Muxer {
    /// Takes the readiness of a descriptor watched under `token`; unknown tokens belong to connections that ended
    /// in the meantime.
    ///
    /// # Errors
    /// The watcher's, for the listener. A connection that cannot be watched is closed.
    pub fn event(&mut self, token: u64, readiness: Readiness) -> io::Result<()> {
        match token {
            LISTENER => return self.accept(),
            TIMER => return self.tick(),
            _ => {}
        }
        let Some(entry) = self.entries.get_mut(&token) else {
            return Ok(());
        };
        match &mut entry.kind {
            Kind::Connection(connection) => connection.event(readiness),
            Kind::Handshake(handshake) => match handshake.read() {
                Progress::More => {}
                Progress::Refused => self.remove(token),
                Progress::Connect(port) => self.connect_guest(token, port),
            },
        }
        self.settle(token);
        self.make_room()
    }

    pub(super) fn listen(&mut self, listening: bool) -> io::Result<()> {
        if let Some(watcher) = &self.watcher
            && listening != self.listening
        {
            let fd = self.listener.as_raw_fd();
            match listening {
                true => watcher.watch(fd, LISTENER, READ)?,
                false => watcher.unwatch(fd)?,
            }
            self.listening = listening;
        }
        Ok(())
    }

    // Accepts until there is nothing to accept or no room.
    fn accept(&mut self) -> io::Result<()> {
        while self.has_room() {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(()),
                    io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => continue,
                    // Out of descriptors or memory: the timer tries again.
                    _ => break,
                },
            };
            if stream.set_nonblocking(true).is_ok() {
                let token = self.insert(Kind::Handshake(Handshake::new(stream)));
                self.settle(token);
            }
        }
        self.listen(false)?;
        self.start_ticking();
        Ok(())
    }

    fn has_room(&self) -> bool {
        self.entries.len() < MAX_CONNECTIONS && self.half_open < MAX_HALF_OPEN
    }

    pub(super) fn make_room(&mut self) -> io::Result<()> {
        match self.has_room() {
            true => self.listen(true),
            false => Ok(()),
        }
    }

    // Turns a handshake into a connection to `port` of the guest, under the same token and watch.
    fn connect_guest(&mut self, token: u64, port: u32) {
        let ports = Ports {
            host: self.free_host_port(port),
            guest: port,
        };
        let Some(mut entry) = self.entries.remove(&token) else {
            return;
        };
        entry.kind = match entry.kind {
            Kind::Handshake(handshake) => {
                self.by_ports.insert(ports, token);
                let stream = handshake.into_stream();
                Kind::Connection(Box::new(Connection::from_host(ports, stream)))
            }
            connection => connection,
        };
        self.entries.insert(token, entry);
    }

    // At most MAX_CONNECTIONS ports are taken, so that the search ends.
    fn free_host_port(&mut self, guest: u32) -> u32 {
        loop {
            let host = self.next_port;
            self.next_port = FIRST_HOST_PORT | (host.wrapping_add(1) & (FIRST_HOST_PORT - 1));
            if !self.by_ports.contains_key(&Ports { host, guest }) {
                return host;
            }
        }
    }

    pub(super) fn start_ticking(&mut self) {
        if !self.ticking {
            // Without the timer deadlines are not held, but all else goes on.
            self.ticking = self.timer.reset(TICK, Some(TICK)).is_ok();
        }
    }

    fn tick(&mut self) -> io::Result<()> {
        // Only after an event, so that it does not block.
        let _ = self.timer.wait();
        self.look_after(Instant::now())
    }

    // Closes what is late at `now` and asks for the credit that starved connections wait for.
    pub(in crate::device::vsock) fn look_after(&mut self, now: Instant) -> io::Result<()> {
        let tokens: Vec<u64> = self.entries.keys().copied().collect();
        for token in tokens {
            let Some(entry) = self.entries.get_mut(&token) else {
                continue;
            };
            let late = entry.is_late(now);
            match &mut entry.kind {
                Kind::Handshake(_) if late => self.remove(token),
                Kind::Connection(connection) if late => connection.abandon(),
                Kind::Connection(connection) if connection.starved() => {
                    connection.ask_for_credit();
                }
                _ => continue,
            }
            self.settle(token);
        }
        self.make_room()?;
        if self.half_open == 0 && self.listening {
            self.ticking = self.timer.clear().is_err();
        }
        Ok(())
    }
}
