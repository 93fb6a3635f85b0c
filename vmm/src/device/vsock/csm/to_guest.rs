//! Data from the socket to the guest: within the guest's credit.

use std::io;
use std::num::Wrapping;
use std::os::fd::AsFd;

use super::{Buffers, Connection, Header, MAX_PAYLOAD, Phase};

impl Connection {
    /// True if data waits for credit that has not been asked for again. A guest announces new credit unasked; the
    /// owner asks all the same when that takes long.
    pub fn starved(&self) -> bool {
        self.reads() && self.readable && self.credit() == 0 && !self.credit_requested
    }

    /// Asks the guest for its credit.
    pub fn ask_for_credit(&mut self) {
        self.credit_request = true;
        self.credit_requested = true;
    }

    // Data may still come from the socket.
    pub(super) fn reads(&self) -> bool {
        self.phase == Phase::Open && !self.socket_finished && !self.guest_deaf
    }

    // Bytes that the guest has room for. A guest that claims to have taken more than it was sent gets nothing.
    pub(super) fn credit(&self) -> u32 {
        let in_flight = self.sent - self.guest_forwarded;
        self.guest_alloc.saturating_sub(in_flight.0)
    }

    pub(super) fn take_credit(&mut self, header: &Header) {
        self.guest_alloc = header.buf_alloc;
        self.guest_forwarded = Wrapping(header.fwd_cnt);
        if self.credit() > 0 {
            self.credit_requested = false;
        }
    }

    // Receives data that the guest has room for; `None` if there is none now.
    pub(super) fn receive(&mut self, room: &mut Buffers<'_>) -> Option<u32> {
        let most = self.credit().min(MAX_PAYLOAD);
        if !self.reads() || !self.readable || most == 0 || room.is_empty() {
            return None;
        }
        room.truncate(most as usize);
        loop {
            match room.receive(self.stream.as_fd()) {
                Ok(0) => self.socket_finished = true,
                Ok(len) => {
                    let len = len as u32;
                    self.sent += Wrapping(len);
                    return Some(len);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // The peer closed without reading everything (`ECONNRESET`): nothing comes, nothing goes.
                Err(_) => {
                    self.socket_finished = true;
                    self.become_deaf();
                }
            }
            self.readable = false;
            return None;
        }
    }

    // Closing a socket with unread data would end the peer's reading with `ECONNRESET` instead of an end of
    // file. After the shutdown no more can come: what there is fits the socket's buffer.
    pub(super) fn discard_unread(&mut self) {
        let mut chunk = [0; 4096];
        loop {
            match Buffers::from(chunk.as_mut_slice()).receive(self.stream.as_fd()) {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }
}
