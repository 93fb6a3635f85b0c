//! One line of JSON each way on a unix socket; descriptors come with the answer. Both sides are the same user: nobody else
//! reaches the socket.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The longest line.
const MAX_LINE: usize = 4096;
/// The most descriptors that come with one.
const MAX_FDS: usize = 4;
/// How long one side waits for the other: longer than the other's work, shorter than what a claim saves.
const PATIENCE: Duration = Duration::from_millis(200);

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ask {
    /// The template's name.
    pub key: String,
    /// The machine's CPUs.
    pub vcpus: u32,
}

/// What is given: with it come the VMM's control socket, its pidfd, and the sandbox's two locks.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Given {
    /// The sandbox's id.
    pub id: String,
    /// The VMM.
    pub pid: u32,
}

/// Prepares a connected socket.
pub fn prepare(socket: &UnixStream) -> io::Result<()> {
    socket.set_nonblocking(false)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))
}

/// Sends `line` with `fds`.
pub fn send<T: Serialize>(socket: &UnixStream, line: &T, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut text = serde_json::to_vec(line)?;
    text.push(b'\n');
    let mut space = [MaybeUninit::<u8>::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::other("too many descriptors"));
    }
    let sent = rustix::net::sendmsg(
        socket,
        &[IoSlice::new(&text)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    match sent == text.len() {
        true => Ok(()),
        false => Err(io::ErrorKind::WriteZero.into()),
    }
}

/// Receives a line and what comes with it.
pub fn receive<T: DeserializeOwned>(socket: &UnixStream) -> io::Result<(T, Vec<OwnedFd>)> {
    let mut line = Vec::new();
    let mut fds = Vec::new();
    while !line.ends_with(b"\n") {
        let mut bytes = [0; 512];
        let mut space = [MaybeUninit::<u8>::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::net::recvmsg(
            socket,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        let read = bytes.get(..received.bytes).unwrap_or_default();
        if read.is_empty() || line.len() + read.len() > MAX_LINE {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        line.extend_from_slice(read);
    }
    Ok((serde_json::from_slice(&line)?, fds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    #[test]
    fn a_line_and_its_descriptors_arrive() {
        let (one, other) = UnixStream::pair().unwrap();
        prepare(&one).unwrap();
        prepare(&other).unwrap();
        let (reader, writer) = std::io::pipe().unwrap();
        let given = Given {
            id: "pool-1".into(),
            pid: 7,
        };
        send(&one, &given, &[reader.as_fd()]).unwrap();
        let (received, fds) = receive::<Given>(&other).unwrap();
        assert_eq!((received, fds.len()), (given, 1));
        File::from(writer.try_clone().map(OwnedFd::from).unwrap())
            .write_all(b"x")
            .unwrap();
        drop(writer);
        let mut text = String::new();
        let fd = fds.into_iter().next().unwrap();
        File::from(fd).read_to_string(&mut text).unwrap();
        assert_eq!(text, "x");
    }

    #[test]
    fn who_says_nothing_or_too_much_is_not_waited_for() {
        let (one, other) = UnixStream::pair().unwrap();
        prepare(&other).unwrap();
        assert!(receive::<Ask>(&other).is_err(), "it waits 200 ms");
        (&one).write_all(&[b'x'; 2 * MAX_LINE]).unwrap();
        assert!(receive::<Ask>(&other).is_err());
        let (one, other) = UnixStream::pair().unwrap();
        prepare(&other).unwrap();
        (&one).write_all(b"{}\n").unwrap();
        assert!(receive::<Ask>(&other).is_err());
        drop(one);
        assert!(receive::<Ask>(&other).is_err());
    }
}
