//! As much of rtnetlink(7) as the guest's network takes: messages with attributes, acknowledgements, and dumps.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use rustix::net::RecvFlags;

use super::Error;
use super::address::{Mac, Prefix};

/// Size of struct nlmsghdr.
const HEADER: usize = 16;
/// Size of struct ifinfomsg.
const LINK_HEADER: usize = 16;
/// Size of struct ifaddrmsg.
const ADDRESS_HEADER: usize = 8;
/// Size of struct rtattr.
const ATTRIBUTE: usize = 4;
/// Bytes of one answer at most; the kernel sends dumps in pieces of 32 KiB at most.
const ANSWER: usize = 32 << 10;

/// One request to the kernel.
pub(super) struct Message(Vec<u8>);

/// A device as a dump describes it.
#[derive(Default)]
pub(super) struct FoundLink {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) address: Vec<u8>,
    pub(super) stats: Option<LinkStats>,
}

/// The first members of struct rtnl_link_stats64, as far as they are reported.
#[derive(Clone, Copy, Default)]
pub(super) struct LinkStats {
    pub(super) rx_packets: u64,
    pub(super) tx_packets: u64,
    pub(super) rx_bytes: u64,
    pub(super) tx_bytes: u64,
    pub(super) rx_errors: u64,
    pub(super) tx_errors: u64,
    pub(super) rx_dropped: u64,
    pub(super) tx_dropped: u64,
}

/// What a route is made of.
pub(super) struct RouteFields {
    pub(super) ipv6: bool,
    pub(super) destination: Option<Prefix>,
    pub(super) gateway: Option<IpAddr>,
    pub(super) source: Option<IpAddr>,
    pub(super) link: u32,
    pub(super) scope: u8,
    pub(super) flags: u32,
    pub(super) mtu: u32,
}

impl Message {
    /// A change of device `index`; attributes follow.
    pub(super) fn link(index: u32) -> Self {
        let mut message = Self::new(libc::RTM_NEWLINK, 0);
        message.0.extend_from_slice(&[0; 4]); // family, padding, type
        message.0.extend_from_slice(&index.to_ne_bytes());
        message.0.extend_from_slice(&[0; 8]); // flags and their mask
        message
    }

    /// Brings the device up, after [`Message::link`].
    pub(super) fn up(self) -> Self {
        self.flags(libc::IFF_UP as u32)
    }

    /// Takes the device down, after [`Message::link`].
    pub(super) fn down(self) -> Self {
        self.flags(0)
    }

    /// The flag `IFF_UP` as in `flags`, and no other one changed.
    fn flags(mut self, flags: u32) -> Self {
        for (offset, word) in [(HEADER + 8, flags), (HEADER + 12, libc::IFF_UP as u32)] {
            if let Some(place) = self.0.get_mut(offset..offset + 4) {
                place.copy_from_slice(&word.to_ne_bytes());
            }
        }
        self
    }

    /// Gives the device a hardware address, after [`Message::link`].
    pub(super) fn hardware_address(self, mac: &Mac) -> Self {
        self.bytes(libc::IFLA_ADDRESS, mac.bytes())
    }

    /// A new address of device `index`.
    pub(super) fn address(index: u32, prefix: &Prefix) -> Self {
        let mut message = Self::new(libc::RTM_NEWADDR, libc::NLM_F_CREATE | libc::NLM_F_REPLACE);
        let mut flags = 0;
        if prefix.address.is_ipv6() {
            // The host has given the address away: nobody else can have it, and waiting for that costs a second.
            flags = libc::IFA_F_NODAD as u8;
        }
        message
            .0
            .extend_from_slice(&[family(prefix.address), prefix.length, flags, 0]);
        message.0.extend_from_slice(&index.to_ne_bytes());
        message = message
            .ip(libc::IFA_LOCAL, prefix.address)
            .ip(libc::IFA_ADDRESS, prefix.address);
        match prefix.broadcast() {
            Some(broadcast) => message.ip(libc::IFA_BROADCAST, broadcast),
            None => message,
        }
    }

    /// Takes an address, of which `found` is how the kernel describes it, the body of an RTM_NEWADDR.
    fn no_address(found: &[u8]) -> Self {
        let mut message = Self::new(libc::RTM_DELADDR, 0);
        message.0.extend_from_slice(found);
        message
    }

    /// A neighbour's hardware address.
    pub(super) fn neighbor(index: u32, state: u16, address: IpAddr, mac: &[u8]) -> Self {
        let mut message = Self::new(libc::RTM_NEWNEIGH, libc::NLM_F_CREATE | libc::NLM_F_REPLACE);
        message.0.extend_from_slice(&[family(address), 0, 0, 0]);
        message.0.extend_from_slice(&index.to_ne_bytes());
        message.0.extend_from_slice(&state.to_ne_bytes());
        message.0.extend_from_slice(&[0, libc::RTN_UNICAST]);
        message
            .ip(libc::NDA_DST, address)
            .bytes(libc::NDA_LLADDR, mac)
    }

    /// A new route in the main table.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] when its addresses are of different families.
    pub(super) fn route(fields: &RouteFields) -> Result<Self, Error> {
        let destination = fields.destination.map(|prefix| prefix.network());
        let addresses = [
            destination.map(|prefix| prefix.address),
            fields.gateway,
            fields.source,
        ];
        let mut families = addresses
            .into_iter()
            .flatten()
            .map(|address| address.is_ipv6());
        let ipv6 = families.next().unwrap_or(fields.ipv6);
        if families.any(|other| other != ipv6) {
            return Err(Error::Invalid {
                what: "route with the addresses",
                value: format!("{addresses:?}"),
                why: "IPv4 and IPv6 in one route",
            });
        }
        let family = if ipv6 { libc::AF_INET6 } else { libc::AF_INET } as u8;
        let mut message = Self::new(libc::RTM_NEWROUTE, libc::NLM_F_CREATE | libc::NLM_F_REPLACE);
        message.0.extend_from_slice(&[
            family,
            destination.map_or(0, |prefix| prefix.length),
            0, // length of a source prefix, which is for policy routing
            0, // type of service
            libc::RT_TABLE_MAIN,
            libc::RTPROT_BOOT,
            fields.scope,
            libc::RTN_UNICAST,
        ]);
        message.0.extend_from_slice(&fields.flags.to_ne_bytes());
        message = message.number(libc::RTA_OIF, fields.link);
        if let Some(destination) = destination {
            message = message.ip(libc::RTA_DST, destination.address);
        }
        if let Some(gateway) = fields.gateway {
            message = message.ip(libc::RTA_GATEWAY, gateway);
        }
        if let Some(source) = fields.source {
            message = message.ip(libc::RTA_PREFSRC, source);
        }
        if fields.mtu != 0 {
            let metric = Self(Vec::new()).number(RTAX_MTU, fields.mtu);
            message = message.bytes(libc::RTA_METRICS, &metric.0);
        }
        Ok(message)
    }

    /// A string attribute.
    pub(super) fn text(self, kind: u16, text: &str) -> Self {
        let mut bytes = text.as_bytes().to_vec();
        bytes.push(0);
        self.bytes(kind, &bytes)
    }

    /// A number attribute.
    pub(super) fn number(self, kind: u16, number: u32) -> Self {
        self.bytes(kind, &number.to_ne_bytes())
    }

    fn ip(self, kind: u16, address: IpAddr) -> Self {
        match address {
            IpAddr::V4(address) => self.bytes(kind, &address.octets()),
            IpAddr::V6(address) => self.bytes(kind, &address.octets()),
        }
    }

    fn bytes(mut self, kind: u16, value: &[u8]) -> Self {
        // No attribute of ours comes near the 64 KiB that its length could say.
        let length = u16::try_from(value.len().saturating_add(ATTRIBUTE)).unwrap_or(u16::MAX);
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    fn new(kind: u16, flags: libc::c_int) -> Self {
        let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK | flags) as u16;
        let mut bytes = Vec::with_capacity(128);
        bytes.extend_from_slice(&0u32.to_ne_bytes()); // the length, when it is known
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&flags.to_ne_bytes());
        bytes.extend_from_slice(&[0; 8]); // sequence number and port
        Self(bytes)
    }

    fn finished(mut self) -> Vec<u8> {
        let length = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        if let Some(place) = self.0.get_mut(..4) {
            place.copy_from_slice(&length.to_ne_bytes());
        }
        self.0
    }
}

/// Index of the MTU among a route's metrics (include/uapi/linux/rtnetlink.h).
const RTAX_MTU: u16 = 2;

fn family(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => libc::AF_INET as u8,
        IpAddr::V6(_) => libc::AF_INET6 as u8,
    }
}

/// A socket to the kernel's routing.
pub(super) struct Netlink {
    socket: OwnedFd,
    answer: Vec<u8>,
}

impl Netlink {
    pub(super) fn open() -> io::Result<Self> {
        // SAFETY: socket(2) takes no memory of ours.
        let socket = unsafe {
            libc::socket(
                libc::AF_NETLINK,
                libc::SOCK_RAW | libc::SOCK_CLOEXEC,
                libc::NETLINK_ROUTE,
            )
        };
        if socket < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            // SAFETY: socket(2) has just made this descriptor and nobody else owns it.
            socket: unsafe { OwnedFd::from_raw_fd(socket) },
            answer: Vec::new(),
        })
    }

    /// Sends `message` and takes the kernel's acknowledgement.
    pub(super) fn ask(&mut self, message: Message) -> io::Result<()> {
        self.send(&message.finished())?;
        loop {
            let length = self.receive()?;
            for part in parts(self.answer.get(..length).unwrap_or_default()) {
                if part.kind == libc::NLMSG_ERROR as u16 {
                    return acknowledged(part.body);
                }
            }
        }
    }

    /// Every device of the network namespace.
    pub(super) fn links(&mut self) -> io::Result<Vec<FoundLink>> {
        let all = (libc::RTM_GETLINK, LINK_HEADER);
        self.dump(all, libc::RTM_NEWLINK, found_link)
    }

    /// Takes every address of device `index`.
    pub(super) fn remove_addresses(&mut self, index: u32) -> io::Result<()> {
        let all = (libc::RTM_GETADDR, ADDRESS_HEADER);
        let found = self.dump(all, libc::RTM_NEWADDR, |body| {
            (u32_at(body, 4)? == index).then(|| body.to_vec())
        })?;
        for address in found {
            match self.ask(Message::no_address(&address)) {
                // A secondary one goes with the first of its network.
                Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => {}
                other => other?,
            }
        }
        Ok(())
    }

    /// What `found` makes of each message of kind `one` that answers a request of kind `all`, with a header so long.
    fn dump<T>(
        &mut self,
        (all, header): (u16, usize),
        one: u16,
        found: impl Fn(&[u8]) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        let mut message = Message::new(all, libc::NLM_F_DUMP);
        message.0.resize(HEADER.saturating_add(header), 0);
        self.send(&message.finished())?;
        let mut dumped = Vec::new();
        loop {
            let length = self.receive()?;
            for part in parts(self.answer.get(..length).unwrap_or_default()) {
                match part.kind {
                    kind if kind == libc::NLMSG_DONE as u16 => return Ok(dumped),
                    kind if kind == libc::NLMSG_ERROR as u16 => acknowledged(part.body)?,
                    kind if kind == one => dumped.extend(found(part.body)),
                    _ => {}
                }
            }
        }
    }

    fn send(&self, message: &[u8]) -> io::Result<()> {
        // A netlink socket that is not connected sends to the kernel.
        // SAFETY: the pointer and the length are the slice's.
        let sent = unsafe {
            libc::send(
                self.socket.as_raw_fd(),
                message.as_ptr().cast(),
                message.len(),
                0,
            )
        };
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    fn receive(&mut self) -> io::Result<usize> {
        self.answer.resize(ANSWER, 0);
        let (length, _) =
            rustix::net::recv(&self.socket, self.answer.as_mut_slice(), RecvFlags::empty())?;
        Ok(length)
    }
}

/// One message of an answer.
struct Part<'a> {
    kind: u16,
    body: &'a [u8],
}

/// The messages of an answer, up to the first that does not fit into it.
fn parts(mut answer: &[u8]) -> impl Iterator<Item = Part<'_>> {
    std::iter::from_fn(move || {
        let length = usize::try_from(u32_at(answer, 0)?).ok()?;
        let kind = u16_at(answer, 4)?;
        let body = answer.get(HEADER..length)?;
        answer = answer.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Part { kind, body })
    })
}

/// The attributes after a message's fixed part.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)?;
        let value = bytes.get(ATTRIBUTE..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// What the kernel answers: 0, or a negated error number.
fn acknowledged(body: &[u8]) -> io::Result<()> {
    match u32_at(body, 0).map(u32::cast_signed) {
        Some(0) => Ok(()),
        Some(error) => Err(io::Error::from_raw_os_error(error.saturating_neg())),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

fn found_link(body: &[u8]) -> Option<FoundLink> {
    let mut link = FoundLink {
        index: u32_at(body, 4)?,
        ..Default::default()
    };
    for (kind, value) in attributes(body.get(LINK_HEADER..)?) {
        match kind {
            libc::IFLA_IFNAME => {
                let name = value.strip_suffix(&[0]).unwrap_or(value);
                link.name = String::from_utf8_lossy(name).into_owned();
            }
            libc::IFLA_ADDRESS => link.address = value.to_vec(),
            libc::IFLA_STATS64 => link.stats = link_stats(value),
            _ => {}
        }
    }
    Some(link)
}

fn link_stats(value: &[u8]) -> Option<LinkStats> {
    let counter = |index: usize| {
        let start = index.checked_mul(8)?;
        let bytes = value.get(start..start.checked_add(8)?)?;
        bytes.try_into().ok().map(u64::from_ne_bytes)
    };
    Some(LinkStats {
        rx_packets: counter(0)?,
        tx_packets: counter(1)?,
        rx_bytes: counter(2)?,
        tx_bytes: counter(3)?,
        rx_errors: counter(4)?,
        tx_errors: counter(5)?,
        rx_dropped: counter(6)?,
        tx_dropped: counter(7)?,
    })
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    let bytes = bytes.get(offset..offset.checked_add(4)?)?;
    bytes.try_into().ok().map(u32::from_ne_bytes)
}

fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    let bytes = bytes.get(offset..offset.checked_add(2)?)?;
    bytes.try_into().ok().map(u16::from_ne_bytes)
}
