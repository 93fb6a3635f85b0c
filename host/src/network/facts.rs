//! What a network namespace has: its interfaces, addresses, routes and permanent neighbours, in the agent's words.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use cella_proto::agent::{Interface, Neighbor, Route};

use super::netlink::{Netlink, attribute, u16_at, u32_at};

/// Sizes of `struct ifinfomsg`, `ifaddrmsg`, `rtmsg` and `ndmsg`, which precede the attributes.
const LINK: usize = 16;
const ADDRESS: usize = 8;
const ROUTE: usize = 12;
const NEIGHBOR: usize = 12;

/// `NUD_PERMANENT` and `NDA_DST`, `NDA_LLADDR` (`linux/neighbour.h`), `RTPROT_RA` and `RTNH_F_ONLINK`
/// (`linux/rtnetlink.h`).
const NUD_PERMANENT: u16 = 0x80;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const RTPROT_RA: u8 = 9;
const RTNH_F_ONLINK: u32 = 4;
const RTAX_MTU: u16 = 2;

/// An interface of the namespace that the guest gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) mac: [u8; 6],
    pub(super) mtu: u32,
}

/// Everything of a namespace that the guest gets.
#[derive(Debug, Default)]
pub(super) struct Facts {
    pub(super) links: Vec<Link>,
    pub(super) interfaces: Vec<Interface>,
    pub(super) routes: Vec<Route>,
    pub(super) neighbors: Vec<Neighbor>,
}

impl Facts {
    /// Reads the namespace of `netlink` as it is now; nothing is waited for.
    pub(super) fn read(netlink: &mut Netlink) -> io::Result<Self> {
        let dump = netlink.dump(libc::RTM_GETLINK, &[0; LINK])?;
        let links: Vec<Link> = dump.iter().filter_map(|link| parse_link(link)).collect();
        let mut interfaces: Vec<Interface> = links.iter().map(interface).collect();
        for address in netlink.dump(libc::RTM_GETADDR, &[0; ADDRESS])? {
            if let Some((index, text)) = parse_address(&address)
                && let Some(at) = links.iter().position(|link| link.index == index)
                && let Some(interface) = interfaces.get_mut(at)
            {
                interface.addresses.push(text);
            }
        }
        let routes = netlink.dump(libc::RTM_GETROUTE, &[0; ROUTE])?;
        let neighbors = netlink.dump(libc::RTM_GETNEIGH, &[0; NEIGHBOR])?;
        Ok(Self {
            routes: routes
                .iter()
                .filter_map(|route| parse_route(route, &links))
                .collect(),
            neighbors: neighbors
                .iter()
                .filter_map(|neighbor| parse_neighbor(neighbor, &links))
                .collect(),
            links,
            interfaces,
        })
    }
}

/// An Ethernet interface that is up. What the kernel itself puts into every namespace (loopback, tunnels' fallback
/// devices) is not Ethernet or is down.
fn parse_link(bytes: &[u8]) -> Option<Link> {
    let up = u32_at(bytes, 8)? & libc::IFF_UP as u32 != 0;
    if u16_at(bytes, 2)? != libc::ARPHRD_ETHER || !up {
        return None;
    }
    let attributes = bytes.get(LINK..)?;
    let name = attribute(attributes, libc::IFLA_IFNAME)?;
    Some(Link {
        index: u32_at(bytes, 4)?,
        name: std::ffi::CStr::from_bytes_until_nul(name)
            .ok()?
            .to_str()
            .ok()?
            .to_owned(),
        mac: attribute(attributes, libc::IFLA_ADDRESS)?.try_into().ok()?,
        mtu: u32_at(attribute(attributes, libc::IFLA_MTU)?, 0)?,
    })
}

fn interface(link: &Link) -> Interface {
    Interface {
        name: link.name.clone(),
        hardware_address: mac_text(&link.mac),
        mtu: link.mtu,
        ..Default::default()
    }
}

pub(super) fn mac_text(mac: &[u8]) -> String {
    let bytes: Vec<String> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
    bytes.join(":")
}

/// The interface and the address in CIDR notation.
fn parse_address(bytes: &[u8]) -> Option<(u32, String)> {
    let attributes = bytes.get(ADDRESS..)?;
    // On a link with a peer, IFA_ADDRESS is the peer's.
    let value = attribute(attributes, libc::IFA_LOCAL)
        .or_else(|| attribute(attributes, libc::IFA_ADDRESS))?;
    let address = ip(value)?;
    Some((u32_at(bytes, 4)?, format!("{address}/{}", bytes.get(1)?)))
}

/// A unicast route of the main table by one of `links`. Those that the kernel makes of addresses, the guest's
/// kernel makes too; those of router advertisements, it will hear of.
fn parse_route(bytes: &[u8], links: &[Link]) -> Option<Route> {
    let &[family, prefix, _, _, table, protocol, scope, kind, ..] = bytes else {
        return None;
    };
    let attributes = bytes.get(ROUTE..)?;
    let table = match attribute(attributes, libc::RTA_TABLE) {
        Some(value) => u32_at(value, 0)?,
        None => table.into(),
    };
    let flags = u32_at(bytes, 8)?;
    let automatic = [libc::RTPROT_KERNEL, RTPROT_RA].contains(&protocol);
    if kind != libc::RTN_UNICAST
        || automatic
        || table != u32::from(libc::RT_TABLE_MAIN)
        || flags & libc::RTM_F_CLONED != 0
    {
        return None;
    }
    let text = |kind| match attribute(attributes, kind) {
        Some(value) => ip(value).map(|address| address.to_string()),
        None => Some(String::new()),
    };
    let destination = match text(libc::RTA_DST)?.as_str() {
        "" => String::new(),
        address => format!("{address}/{prefix}"),
    };
    let Some(index) = attribute(attributes, libc::RTA_OIF) else {
        tracing::warn!("the route to {destination:?} has several next hops: the guest lacks it");
        return None;
    };
    let index = u32_at(index, 0)?;
    let link = links.iter().find(|link| link.index == index)?;
    let metrics = attribute(attributes, libc::RTA_METRICS).unwrap_or_default();
    Some(Route {
        destination,
        gateway: text(libc::RTA_GATEWAY)?,
        interface: link.name.clone(),
        source: text(libc::RTA_PREFSRC)?,
        scope: scope.into(),
        // The others are the host's findings (dead, link down).
        flags: flags & RTNH_F_ONLINK,
        mtu: attribute(metrics, RTAX_MTU)
            .and_then(|mtu| u32_at(mtu, 0))
            .unwrap_or_default(),
        ipv6: family == libc::AF_INET6 as u8,
        ..Default::default()
    })
}

/// An entry that somebody made on purpose.
fn parse_neighbor(bytes: &[u8], links: &[Link]) -> Option<Neighbor> {
    let index = u32_at(bytes, 4)?;
    let state = u16_at(bytes, 8)?;
    let family = libc::c_int::from(*bytes.first()?);
    if state & NUD_PERMANENT == 0 || ![libc::AF_INET, libc::AF_INET6].contains(&family) {
        return None;
    }
    let link = links.iter().find(|link| link.index == index)?;
    let attributes = bytes.get(NEIGHBOR..)?;
    let mac = attribute(attributes, NDA_LLADDR).filter(|mac| mac.len() == 6)?;
    Some(Neighbor {
        address: ip(attribute(attributes, NDA_DST)?)?.to_string(),
        hardware_address: mac_text(mac),
        interface: link.name.clone(),
        state: state.into(),
        ..Default::default()
    })
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    <[u8; 4]>::try_from(bytes)
        .map(|four| Ipv4Addr::from(four).into())
        .or_else(|_| <[u8; 16]>::try_from(bytes).map(|all| Ipv6Addr::from(all).into()))
        .ok()
}
