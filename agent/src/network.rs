//! The guest's network, set up by rtnetlink from the request that describes it: links found by their MAC address,
//! addresses, routes and neighbours.

use std::net::IpAddr;

use cella_proto::agent::{Interface, InterfaceStats, Neighbor, Route};

mod address;
mod netlink;
#[cfg(test)]
mod tests;

use crate::slots;
use address::{Mac, Prefix};
use netlink::{Message, Netlink};

/// Index of the loopback device, the same in every network namespace.
const LOOPBACK: u32 = 1;
/// A neighbour whose entry is not to be asked for again (include/uapi/linux/neighbour.h).
const NUD_PERMANENT: u32 = 0x80;

/// Why the network is not as the request wants it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request does not make sense.
    #[error("{what} {value:?}: {why}")]
    Invalid {
        /// Which part of the request.
        what: &'static str,
        /// What it says.
        value: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// No such device in the guest.
    #[error("no network device {by}")]
    NoDevice {
        /// What it was looked for by.
        by: String,
    },
    /// The kernel refuses.
    #[error("{doing}")]
    Kernel {
        /// What was asked of it.
        doing: String,
        /// What it says.
        source: std::io::Error,
    },
}

/// A network device.
struct Link {
    index: u32,
    name: String,
    mac: Option<Mac>,
    stats: Option<netlink::LinkStats>,
}

impl Link {
    /// Whether it has the hardware address `mac`, if that is one.
    fn is_of(&self, mac: Option<Mac>) -> bool {
        mac.is_some() && self.mac == mac
    }
}

/// Brings the loopback device up and sets up what is asked for, in this order: devices with their addresses,
/// neighbours, routes. Devices with the hardware address `spares`, if it is not empty, are the first ones' that have none of their own.
///
/// # Errors
///
/// The first step that failed; what was set up before it stays.
pub fn set_up(
    interfaces: &[Interface],
    routes: &[Route],
    neighbors: &[Neighbor],
    spares: &str,
) -> Result<(), Error> {
    let mut netlink = open()?;
    let up = link_message(LOOPBACK).up();
    ask(&mut netlink, up, || {
        "setting the loopback device up".to_owned()
    })?;
    if interfaces.is_empty() && routes.is_empty() && neighbors.is_empty() {
        return Ok(());
    }
    let spares = match spares {
        "" => None,
        text => Some(Mac::parse("spare hardware address", text)?),
    };
    let mut links = links(&mut netlink)?;
    let spare = links.iter().filter(|link| link.is_of(spares)).count();
    if missing(&links, interfaces) > spare {
        slots::look_again();
        links = self::links(&mut netlink)?;
    }
    for interface in interfaces {
        set_up_interface(&mut netlink, &mut links, interface, spares)?;
    }
    for neighbor in neighbors {
        set_up_neighbor(&mut netlink, &links, neighbor)?;
    }
    // A gateway must be reachable before a route may name it: the routes without one go first.
    let (direct, indirect): (Vec<&Route>, Vec<&Route>) =
        routes.iter().partition(|route| route.gateway.is_empty());
    for route in direct.into_iter().chain(indirect) {
        set_up_route(&mut netlink, &links, route)?;
    }
    Ok(())
}

/// Gives devices that were set up before, in another network, what they have in this one. They lose every address, route
/// and neighbour; connections go on if the addresses are the same.
///
/// # Errors
///
/// The first step that failed; what was done before it stays done.
pub fn renew(
    interfaces: &[Interface],
    routes: &[Route],
    neighbors: &[Neighbor],
) -> Result<(), Error> {
    let mut netlink = open()?;
    let links = links(&mut netlink)?;
    for interface in interfaces {
        let index = by_name(&links, &interface.name)?;
        let mac = Mac::parse("hardware address", &interface.hardware_address)?;
        // Down, it has no routes and neighbours, and no IPv6 addresses.
        ask(
            &mut netlink,
            link_message(index).down().hardware_address(&mac),
            || format!("setting device {} down", interface.name),
        )?;
        let emptied = netlink.remove_addresses(index);
        emptied.map_err(|source| Error::Kernel {
            doing: format!("taking the addresses of device {}", interface.name),
            source,
        })?;
    }
    set_up(interfaces, routes, neighbors, "")
}

/// The counters of every device but the loopback.
///
/// # Errors
///
/// [`Error::Kernel`].
pub fn statistics() -> Result<Vec<InterfaceStats>, Error> {
    let links = links(&mut open()?)?;
    let others = links.into_iter().filter(|link| link.index != LOOPBACK);
    Ok(others
        .filter_map(|link| {
            let stats = link.stats?;
            Some(InterfaceStats {
                name: link.name,
                rx_bytes: stats.rx_bytes,
                rx_packets: stats.rx_packets,
                rx_errors: stats.rx_errors,
                rx_dropped: stats.rx_dropped,
                tx_bytes: stats.tx_bytes,
                tx_packets: stats.tx_packets,
                tx_errors: stats.tx_errors,
                tx_dropped: stats.tx_dropped,
                ..Default::default()
            })
        })
        .collect())
}

/// How many interfaces have no device with their address. One that has no proper address is another step's to refuse.
fn missing(links: &[Link], interfaces: &[Interface]) -> usize {
    let there = |interface: &&Interface| {
        Mac::parse("hardware address", &interface.hardware_address)
            .is_ok_and(|mac| links.iter().any(|link| link.is_of(Some(mac))))
    };
    interfaces.iter().filter(|one| !there(one)).count()
}

fn open() -> Result<Netlink, Error> {
    Netlink::open().map_err(|source| Error::Kernel {
        doing: "opening a netlink socket".to_owned(),
        source,
    })
}

fn ask(
    netlink: &mut Netlink,
    message: Message,
    doing: impl FnOnce() -> String,
) -> Result<(), Error> {
    netlink.ask(message).map_err(|source| Error::Kernel {
        doing: doing(),
        source,
    })
}

fn links(netlink: &mut Netlink) -> Result<Vec<Link>, Error> {
    let found = netlink.links().map_err(|source| Error::Kernel {
        doing: "listing the network devices".to_owned(),
        source,
    })?;
    Ok(found
        .into_iter()
        .map(|link| Link {
            index: link.index,
            mac: Mac::from_bytes(&link.address),
            name: link.name,
            stats: link.stats,
        })
        .collect())
}

fn set_up_interface(
    netlink: &mut Netlink,
    links: &mut [Link],
    interface: &Interface,
    spares: Option<Mac>,
) -> Result<(), Error> {
    let mac = Mac::parse("hardware address", &interface.hardware_address)?;
    let of = |mac| links.iter().position(|link| link.is_of(mac));
    let link = of(Some(mac))
        .or_else(|| of(spares))
        .and_then(|at| links.get_mut(at))
        .ok_or_else(|| Error::NoDevice {
            by: format!("with the hardware address {}", interface.hardware_address),
        })?;
    // The kernel renames a device only while it is down, which it is in a fresh guest.
    let mut message = link_message(link.index);
    if !link.is_of(Some(mac)) {
        message = message.hardware_address(&mac);
        link.mac = Some(mac);
    }
    if !interface.name.is_empty() && interface.name != link.name {
        message = message.text(libc::IFLA_IFNAME, &interface.name);
    }
    if interface.mtu != 0 {
        message = message.number(libc::IFLA_MTU, interface.mtu);
    }
    ask(netlink, message.up(), || {
        format!(
            "setting device {} up as {:?}",
            interface.hardware_address, interface.name
        )
    })?;
    if !interface.name.is_empty() {
        link.name.clone_from(&interface.name);
    }
    for address in &interface.addresses {
        let prefix = Prefix::parse("address", address)?;
        let message = Message::address(link.index, &prefix);
        ask(netlink, message, || {
            format!("giving device {} the address {address}", link.name)
        })?;
    }
    Ok(())
}

fn set_up_neighbor(
    netlink: &mut Netlink,
    links: &[Link],
    neighbor: &Neighbor,
) -> Result<(), Error> {
    let link = by_name(links, &neighbor.interface)?;
    let address = address::ip("neighbour address", &neighbor.address)?;
    let mac = Mac::parse("neighbour hardware address", &neighbor.hardware_address)?;
    let state = match neighbor.state {
        0 => NUD_PERMANENT,
        state => state,
    };
    let state = u16::try_from(state).map_err(|_| Error::Invalid {
        what: "neighbour state",
        value: state.to_string(),
        why: "has more than 16 bits",
    })?;
    let message = Message::neighbor(link, state, address, mac.bytes());
    ask(netlink, message, || {
        format!(
            "adding neighbour {} on {}",
            neighbor.address, neighbor.interface
        )
    })
}

fn set_up_route(netlink: &mut Netlink, links: &[Link], route: &Route) -> Result<(), Error> {
    let link = by_name(links, &route.interface)?;
    let destination = match route.destination.as_str() {
        "" => None,
        text => Some(Prefix::parse("route destination", text)?),
    };
    let gateway = optional("route gateway", &route.gateway)?;
    let source = optional("route source", &route.source)?;
    let message = Message::route(&netlink::RouteFields {
        ipv6: route.ipv6,
        destination,
        gateway,
        source,
        link,
        scope: u8::try_from(route.scope).map_err(|_| Error::Invalid {
            what: "route scope",
            value: route.scope.to_string(),
            why: "has more than 8 bits",
        })?,
        flags: route.flags,
        mtu: route.mtu,
    })?;
    ask(netlink, message, || {
        let destination = match route.destination.as_str() {
            "" => "default",
            text => text,
        };
        format!(
            "adding the route to {destination} by {:?} on {}",
            route.gateway, route.interface
        )
    })
}

fn link_message(index: u32) -> Message {
    Message::link(index)
}

fn by_name(links: &[Link], name: &str) -> Result<u32, Error> {
    links
        .iter()
        .find(|link| link.name == name)
        .map(|link| link.index)
        .ok_or_else(|| Error::NoDevice {
            by: format!("named {name:?}"),
        })
}

fn optional(what: &'static str, text: &str) -> Result<Option<IpAddr>, Error> {
    match text {
        "" => Ok(None),
        text => address::ip(what, text).map(Some),
    }
}
