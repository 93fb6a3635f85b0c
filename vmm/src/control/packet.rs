//! Packets of the control socket: a message, and the file descriptors that came with it.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use cella_proto::vmm::{Reply, Request};
use protobuf::Message;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, recvmsg, send,
};

/// Most bytes of a packet.
pub const MAX_PACKET: usize = 64 << 10;

/// Most file descriptors that come with a packet.
pub const MAX_FDS: usize = 32;

/// What was received.
#[derive(Debug)]
pub enum Packet {
    /// A request and its file descriptors.
    Request(Request, Fds),
    /// Something that is no request, and why. What came with it is closed.
    Malformed(String),
    /// The end of the connection.
    End,
    /// Nothing was there.
    Nothing,
}

/// The file descriptors of a packet, each to be taken once.
#[derive(Debug, Default)]
pub struct Fds(Vec<Option<OwnedFd>>);

impl Fds {
    /// Takes the descriptor of this index; `None` if there is none or it has been taken.
    pub fn take(&mut self, index: u32) -> Option<OwnedFd> {
        self.0.get_mut(usize::try_from(index).ok()?)?.take()
    }
}

impl FromIterator<OwnedFd> for Fds {
    fn from_iter<I: IntoIterator<Item = OwnedFd>>(fds: I) -> Self {
        Self(fds.into_iter().map(Some).collect())
    }
}

/// Receives one packet, without waiting for it.
///
/// # Errors
/// `recvmsg` failed.
pub fn receive(socket: BorrowedFd<'_>) -> std::io::Result<Packet> {
    let mut bytes = vec![0; MAX_PACKET];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let received = match recvmsg(socket, &mut parts, &mut ancillary, flags) {
        Ok(received) => received,
        Err(Errno::AGAIN | Errno::INTR) => return Ok(Packet::Nothing),
        // The door is gone and left packets of ours unread.
        Err(Errno::CONNRESET) => return Ok(Packet::End),
        Err(error) => return Err(error.into()),
    };
    let fds: Fds = ancillary
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    if received.bytes == 0 && fds.0.is_empty() {
        // An empty packet looks the same; no request is empty.
        return Ok(Packet::End);
    }
    if received.flags.contains(ReturnFlags::TRUNC) {
        return Ok(Packet::Malformed(format!(
            "a packet is longer than {MAX_PACKET} bytes"
        )));
    }
    // The space for them is rounded up: one more may fit.
    if received.flags.contains(ReturnFlags::CTRUNC) || fds.0.len() > MAX_FDS {
        return Ok(Packet::Malformed(format!(
            "a packet has more than {MAX_FDS} file descriptors"
        )));
    }
    bytes.truncate(received.bytes);
    Ok(match Request::parse_from_bytes(&bytes) {
        Ok(request) if request.id == 0 => Packet::Malformed("a request has no id".to_owned()),
        Ok(request) => Packet::Request(request, fds),
        Err(error) => Packet::Malformed(format!("a packet is no request: {error}")),
    })
}

/// Sends a reply; false if the door is gone.
///
/// # Errors
/// The reply is too long, or `send` failed.
pub fn reply(socket: BorrowedFd<'_>, reply: &Reply) -> std::io::Result<bool> {
    let bytes = reply.write_to_bytes()?;
    loop {
        match send(socket.as_fd(), &bytes, SendFlags::NOSIGNAL) {
            Ok(_) => return Ok(true),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                let mut fds = [PollFd::from_borrowed_fd(socket, PollFlags::OUT)];
                match rustix::event::poll(&mut fds, None) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            Err(Errno::PIPE | Errno::CONNRESET) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
    }
}
