//! Data from the guest to the socket: at once, or from the backlog when the socket takes it.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::num::Wrapping;
use std::os::fd::AsFd;

use super::{BUFFER_SIZE, Buffers, Connection, Phase};

impl Connection {
    // Takes data of the guest's, which must be within the credit it was given.
    pub(super) fn data(&mut self, mut payload: Buffers<'_>) {
        let room = (BUFFER_SIZE as usize).saturating_sub(self.backlog.len());
        if self.guest_finished || payload.len() > room {
            return self.violation();
        }
        if self.socket_deaf {
            return self.forward(payload.len());
        }
        while self.backlog.is_empty() && !payload.is_empty() {
            match payload.send(self.stream.as_fd()) {
                Ok(sent) => self.forward(sent),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => {
                    self.forward(payload.len());
                    return self.become_deaf();
                }
            }
        }
        payload.drain_to(&mut self.backlog);
    }

    // The socket takes nothing more: what waits for it is dropped.
    pub(super) fn become_deaf(&mut self) {
        self.forward(self.backlog.len());
        self.backlog = VecDeque::new();
        self.socket_deaf = true;
        if self.phase == Phase::Draining {
            self.phase = Phase::Closed;
        }
    }

    // Counts bytes of the guest's as gone, and owes it the news before it runs out of credit.
    pub(super) fn forward(&mut self, bytes: usize) {
        // At most BUFFER_SIZE and MAX_PAYLOAD, which a u32 holds.
        self.forwarded += Wrapping(bytes as u32);
        if (self.forwarded - self.announced).0 >= BUFFER_SIZE / 2 {
            self.credit_update = true;
        }
    }

    // Writes backlogged data to the socket until it takes no more.
    pub(super) fn flush(&mut self) {
        while !self.backlog.is_empty() {
            let chunk = self.backlog.make_contiguous();
            match Buffers::from(chunk).send(self.stream.as_fd()) {
                Ok(sent) => {
                    self.backlog.drain(..sent);
                    self.forward(sent);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => return self.become_deaf(),
            }
        }
        // Idle connections hold no buffer.
        self.backlog = VecDeque::new();
        self.finish_writing();
    }

    // Passes the guest's end of data on, once the socket has all of it.
    pub(super) fn finish_writing(&mut self) {
        if self.backlog.is_empty() && self.guest_finished && !self.socket_deaf {
            // Fails only if the peer has gone, which the socket tells by itself.
            let _ = self.stream.shutdown(Shutdown::Write);
            self.socket_deaf = true;
            if self.phase == Phase::Draining {
                self.phase = Phase::Closed;
            }
        }
    }
}
