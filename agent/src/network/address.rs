//! Addresses as the request writes them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::Error;

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mac([u8; 6]);

impl Mac {
    /// Of the form aa:bb:cc:dd:ee:ff.
    pub(super) fn parse(what: &'static str, text: &str) -> Result<Self, Error> {
        let invalid = || Error::Invalid {
            what,
            value: text.to_owned(),
            why: "not of the form aa:bb:cc:dd:ee:ff",
        };
        let mut bytes = [0u8; 6];
        let mut digits = text.split(':');
        for byte in &mut bytes {
            let pair = digits.next().filter(|pair| {
                pair.len() == 2 && pair.bytes().all(|digit| digit.is_ascii_hexdigit())
            });
            *byte = pair
                .and_then(|pair| u8::from_str_radix(pair, 16).ok())
                .ok_or_else(invalid)?;
        }
        match digits.next() {
            None => Ok(Self(bytes)),
            Some(_) => Err(invalid()),
        }
    }

    /// From a device's address; nothing if it is not an Ethernet device's.
    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// An address with the length of its network's prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Prefix {
    pub(super) address: IpAddr,
    pub(super) length: u8,
}

impl Prefix {
    /// Of the form 10.1.2.3/24; without a length, it is a single address.
    pub(super) fn parse(what: &'static str, text: &str) -> Result<Self, Error> {
        let (address, length) = match text.split_once('/') {
            Some((address, length)) => (address, Some(length)),
            None => (text, None),
        };
        let address = ip(what, address)?;
        let bits = if address.is_ipv4() { 32 } else { 128 };
        let length = match length {
            None => bits,
            Some(length) => length
                .parse()
                .ok()
                .filter(|length| *length <= bits)
                .ok_or_else(|| Error::Invalid {
                    what,
                    value: text.to_owned(),
                    why: "the prefix is not a number of the address's bits",
                })?,
        };
        Ok(Self { address, length })
    }

    /// The address that all of an IPv4 network's hosts listen to; none for networks too small to have one.
    pub(super) fn broadcast(&self) -> Option<IpAddr> {
        match self.address {
            IpAddr::V4(address) if self.length < 31 => {
                let hosts = u32::MAX.checked_shr(u32::from(self.length)).unwrap_or(0);
                Some(IpAddr::V4(Ipv4Addr::from_bits(address.to_bits() | hosts)))
            }
            _ => None,
        }
    }

    /// The network alone, without the host's part: the kernel takes no other as a route's destination.
    pub(super) fn network(&self) -> Self {
        let length = u32::from(self.length);
        let address = match self.address {
            IpAddr::V4(address) => {
                let hosts = u32::MAX.checked_shr(length).unwrap_or(0);
                IpAddr::V4(Ipv4Addr::from_bits(address.to_bits() & !hosts))
            }
            IpAddr::V6(address) => {
                let hosts = u128::MAX.checked_shr(length).unwrap_or(0);
                IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !hosts))
            }
        };
        Self { address, ..*self }
    }
}

/// An IPv4 or IPv6 address.
pub(super) fn ip(what: &'static str, text: &str) -> Result<IpAddr, Error> {
    text.parse().map_err(|_| Error::Invalid {
        what,
        value: text.to_owned(),
        why: "not an IP address",
    })
}
