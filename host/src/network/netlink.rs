//! As much of netlink(7) as joining a network namespace takes: requests with attributes, acknowledgements, dumps.
//!
//! Attributes that are not looked for are skipped unread, so a newer kernel's additions do no harm.

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with,
};

/// Sizes of `struct nlmsghdr` and `struct nlattr`.
const HEADER: usize = 16;
const ATTRIBUTE: usize = 4;

/// Bytes of one answer: the kernel's dumps come in pieces of 32 KiB at most.
const ANSWER: usize = 64 << 10;

/// How often a dump is asked for again because what it lists has changed meanwhile.
const ATTEMPTS: usize = 8;

/// One request.
pub(super) struct Message(Vec<u8>);

impl Message {
    /// A request of type `kind` with `flags` (`NLM_F_*`) and the family's own header.
    pub(super) fn new(kind: u16, flags: libc::c_int, header: &[u8]) -> Self {
        let flags = (flags | libc::NLM_F_REQUEST) as u16;
        let mut bytes = vec![0; 4];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend([0; 8]); // sequence number and port
        bytes.extend(header);
        Self(bytes)
    }

    /// Adds an attribute.
    pub(super) fn with(mut self, kind: u16, value: &[u8]) -> Self {
        push(&mut self.0, kind, value);
        self
    }

    fn finish(mut self, sequence: u32) -> Vec<u8> {
        let len = (self.0.len() as u32).to_ne_bytes();
        for (at, bytes) in [(0, len), (8, sequence.to_ne_bytes())] {
            if let Some(place) = self.0.get_mut(at..at + 4) {
                place.copy_from_slice(&bytes);
            }
        }
        self.0
    }
}

/// Attributes by themselves, to nest in one.
pub(super) fn nest(attributes: &[(u16, &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (kind, value) in attributes {
        push(&mut bytes, *kind, value);
    }
    bytes
}

fn push(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let len = (ATTRIBUTE + value.len()) as u16;
    bytes.extend(len.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// The attributes in `bytes`, each with its type and value. Ends where they make no sense.
pub(super) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::from(u16_at(bytes, 0)?);
        // The highest two bits are flags (NLA_F_NESTED, NLA_F_NET_BYTEORDER).
        let kind = u16_at(bytes, 2)? & 0x3fff;
        let value = bytes.get(ATTRIBUTE..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The value of the attribute of type `kind`.
pub(super) fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes)
        .find(|(found, _)| *found == kind)
        .map(|(_, value)| value)
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// A netlink socket in the network namespace of the thread that opened it.
pub(super) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Netlink {
    pub(super) fn open() -> io::Result<Self> {
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            // Protocol 0 is NETLINK_ROUTE.
            None,
        )?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Has the kernel do something.
    pub(super) fn ask(&mut self, mut message: Message) -> io::Result<()> {
        if let Some(flags) = message.0.get_mut(6) {
            *flags |= libc::NLM_F_ACK as u8;
        }
        self.exchange(message, |_| ()).map(drop)
    }

    /// Every object of a kind: its own header and attributes.
    pub(super) fn dump(&mut self, kind: u16, header: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        for _ in 0..ATTEMPTS {
            let mut found = Vec::new();
            let message = Message::new(kind, libc::NLM_F_DUMP, header);
            let whole = self.exchange(message, |object| found.push(object.to_vec()))?;
            if whole {
                return Ok(found);
            }
        }
        Err(io::Error::other("what is listed changes all the time"))
    }

    /// Sends `message` and hands every object of the answer to `found`; false if the answer is inconsistent.
    fn exchange(&mut self, message: Message, mut found: impl FnMut(&[u8])) -> io::Result<bool> {
        self.sequence = self.sequence.wrapping_add(1);
        send(
            &self.socket,
            &message.finish(self.sequence),
            SendFlags::empty(),
        )?;
        let mut whole = true;
        let mut buffer = vec![0; ANSWER];
        loop {
            let (_, len) = recv(&self.socket, &mut buffer[..], RecvFlags::TRUNC)?;
            let mut rest = buffer.get(..len).ok_or(io::ErrorKind::InvalidData)?;
            while let Some(len) = u32_at(rest, 0) {
                let len = len as usize;
                let answer = rest.get(..len).ok_or(io::ErrorKind::InvalidData)?;
                let body = answer.get(HEADER..).ok_or(io::ErrorKind::InvalidData)?;
                rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
                if u32_at(answer, 8) != Some(self.sequence) {
                    continue;
                }
                let flags = libc::c_int::from(u16_at(answer, 6).unwrap_or_default());
                whole &= flags & libc::NLM_F_DUMP_INTR == 0;
                match libc::c_int::from(u16_at(answer, 4).unwrap_or_default()) {
                    libc::NLMSG_DONE | libc::NLMSG_ERROR => {
                        return match u32_at(body, 0).unwrap_or_default() as i32 {
                            0 => Ok(whole),
                            error => Err(io::Error::from_raw_os_error(error.wrapping_neg())),
                        };
                    }
                    libc::NLMSG_NOOP => {}
                    _ => found(body),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn attributes_are_what_was_put_there() {
        let inner = nest(&[(1, b"x"), (2, b"four")]);
        let message = Message::new(7, 0, &[9; 4]).with(3, &inner).finish(5);
        assert_eq!(message.len() % 4, 0);
        assert_eq!(u32_at(&message, 0), Some(message.len() as u32));
        assert_eq!(u32_at(&message, 8), Some(5));
        let body = attribute(&message[HEADER + 4..], 3).unwrap();
        let found: Vec<_> = attributes(body).collect();
        assert_eq!(found, [(1, &b"x"[..]), (2, &b"four"[..])]);
        assert_eq!(attribute(body, 9), None);
    }

    #[test]
    fn nested_flags_are_no_part_of_the_type() {
        let bytes = nest(&[(5 | 0x8000, b"abcd")]);
        assert_eq!(attribute(&bytes, 5), Some(&b"abcd"[..]));
    }

    #[test]
    fn a_refusal_is_the_kernels_error() {
        let mut netlink = Netlink::open().unwrap();
        let mut header = [0; 16];
        header[4..8].copy_from_slice(&i32::MAX.to_ne_bytes());
        let gone = netlink.ask(Message::new(libc::RTM_DELLINK, 0, &header));
        let error = gone.unwrap_err().raw_os_error();
        assert!(
            matches!(error, Some(libc::ENODEV | libc::EPERM)),
            "{error:?}"
        );
        // The socket is in step: the loopback device is the first of every namespace.
        let links = netlink.dump(libc::RTM_GETLINK, &[0; 16]).unwrap();
        assert!(links.iter().any(|link| u32_at(link, 4) == Some(1)));
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let total: usize = attributes(&bytes).map(|(_, value)| value.len()).sum();
            prop_assert!(total <= bytes.len());
        }
    }
}
