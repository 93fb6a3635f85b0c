//! The line with which a host program asks for a port of the guest: `CONNECT <port>\n`.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::net::RecvFlags;

/// The longest line accepted, its end included; `CONNECT 4294967295\n` has 19 bytes.
const MAX_LINE: usize = 32;

/// A host connection that has not said yet what it wants.
pub struct Handshake {
    stream: UnixStream,
    line: Vec<u8>,
    created: Instant,
}

/// What has become of a [`Handshake`].
#[derive(Debug, PartialEq, Eq)]
pub enum Progress {
    /// The line is not complete.
    More,
    /// This port of the guest is asked for.
    Connect(u32),
    /// The line is wrong or its sender has gone: close the connection.
    Refused,
}

impl Handshake {
    /// Begins with a new, nonblocking connection.
    pub fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            line: Vec::new(),
            created: Instant::now(),
        }
    }

    /// The connection.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// The connection, for good.
    pub fn into_stream(self) -> UnixStream {
        self.stream
    }

    /// When it began.
    pub fn created(&self) -> Instant {
        self.created
    }

    /// Reads what has come, but never past the line's end: what follows is the guest's.
    pub fn read(&mut self) -> Progress {
        let mut peeked = [0; MAX_LINE];
        loop {
            let left = MAX_LINE.saturating_sub(self.line.len());
            let room = peeked.get_mut(..left).unwrap_or_default();
            if room.is_empty() {
                return Progress::Refused;
            }
            let seen = match rustix::net::recv(&self.stream, &mut *room, RecvFlags::PEEK) {
                Ok((_, 0)) => return Progress::Refused,
                Ok((_, seen)) => seen,
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Progress::More,
                    io::ErrorKind::Interrupted => continue,
                    _ => return Progress::Refused,
                },
            };
            let news = room.get(..seen).unwrap_or_default();
            let end = news.iter().position(|&byte| byte == b'\n');
            let take = end.map_or(seen, |at| at.saturating_add(1));
            self.line.extend(news.iter().take(take));
            // Taken off the queue; nobody else reads it, so that the peeked bytes are there.
            let consumed = room.get_mut(..take).unwrap_or_default();
            if rustix::net::recv(&self.stream, consumed, RecvFlags::empty()).is_err() {
                return Progress::Refused;
            }
            if end.is_some() {
                return parse(&self.line).map_or(Progress::Refused, Progress::Connect);
            }
        }
    }
}

fn parse(line: &[u8]) -> Option<u32> {
    let digits = line.strip_prefix(b"CONNECT ")?.strip_suffix(b"\n")?;
    // `parse` alone would allow a plus sign.
    if !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn pair() -> (UnixStream, Handshake) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (theirs, Handshake::new(ours))
    }

    #[test]
    fn a_line_may_come_byte_by_byte() {
        let (mut client, mut handshake) = pair();
        assert_eq!(handshake.read(), Progress::More);
        let line = b"CONNECT 1024\n";
        for byte in &line[..line.len() - 1] {
            client.write_all(&[*byte]).unwrap();
            assert_eq!(handshake.read(), Progress::More);
        }
        client.write_all(b"\n").unwrap();
        assert_eq!(handshake.read(), Progress::Connect(1024));
    }

    #[test]
    fn what_follows_the_line_is_left_for_the_guest() {
        let (mut client, mut handshake) = pair();
        client.write_all(b"CONNECT 4294967295\nhello").unwrap();
        assert_eq!(handshake.read(), Progress::Connect(u32::MAX));
        drop(client);
        let mut rest = String::new();
        handshake.into_stream().read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "hello");
    }

    #[test]
    fn wrong_lines_are_refused() {
        for line in [
            "\n",
            "CONNECT\n",
            "CONNECT \n",
            "CONNECT +1\n",
            "CONNECT -1\n",
            "CONNECT 4294967296\n",
            "CONNECT 1 2\n",
            "CONNECT 1\r\n",
            "connect 1\n",
            "GET / HTTP/1.1\n",
            "CONNECT \u{e9}\n",
        ] {
            let (mut client, mut handshake) = pair();
            client.write_all(line.as_bytes()).unwrap();
            assert_eq!(handshake.read(), Progress::Refused, "{line:?}");
        }
    }

    #[test]
    fn an_endless_line_and_an_early_end_are_refused() {
        let (mut client, mut handshake) = pair();
        client.write_all(b"CONNECT 1").unwrap();
        assert_eq!(handshake.read(), Progress::More);
        client.write_all(&[b'1'; MAX_LINE - 9]).unwrap();
        assert_eq!(handshake.read(), Progress::Refused);

        let (mut client, mut handshake) = pair();
        client.write_all(b"CONNECT 1").unwrap();
        drop(client);
        assert_eq!(handshake.read(), Progress::Refused);
    }
}
