//! What comes in on one interface goes out on another: tc's ingress hook, a filter that matches all (u32, which
//! every kernel with tc has), and a mirred redirect, as tc-mirred(8) has it.

use std::io;

use super::netlink::{Message, Netlink, nest, u32_at};

/// Size of `struct tcmsg`.
const TC: usize = 20;

/// Major number of the ingress qdisc's handle, its parent, and the parent of its filters (`linux/pkt_sched.h`;
/// `TC_H_CLSACT` and `TC_H_MIN_INGRESS` serve the ingress and the clsact qdisc alike).
const INGRESS_HANDLE: u32 = 0xffff_0000;
const INGRESS: u32 = 0xffff_fff1;
const FILTERS: u32 = 0xffff_fff2;

/// Where our filters stand among others on the interface, by the index of the interface that they redirect to: so
/// that the filter of one sandbox is not taken for that of the next. tc(8) gives numbers from 0xc000 downwards.
const PRIORITIES: std::ops::RangeInclusive<u32> = 0xd000..=0xdfff;

/// Attributes of `linux/rtnetlink.h` and `linux/pkt_cls.h`.
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_U32_SEL: u16 = 5;
const TCA_U32_ACT: u16 = 7;
const TC_U32_TERMINAL: u8 = 1;
const TCA_ACT_KIND: u16 = 1;
const TCA_ACT_OPTIONS: u16 = 2;
const TCA_MIRRED_PARMS: u16 = 2;
const TCA_EGRESS_REDIR: u32 = 1;
const TC_ACT_STOLEN: u32 = 4;

/// `NLA_F_NESTED`.
const NESTED: u16 = 0x8000;

/// Sends what comes in on interface `from` out on interface `to`. Own filters that redirect elsewhere are of sandboxes
/// that are dead, and go.
pub(super) fn add(netlink: &mut Netlink, from: u32, to: u32) -> io::Result<()> {
    let made = netlink.ask(
        Message::new(
            libc::RTM_NEWQDISC,
            libc::NLM_F_CREATE | libc::NLM_F_EXCL,
            &header(from, INGRESS_HANDLE, INGRESS, 0),
        )
        .with(TCA_KIND, b"ingress\0"),
    );
    match made {
        // Somebody else's (ingress or clsact) does as well.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            for priority in priorities(netlink, from)? {
                if PRIORITIES.contains(&priority) {
                    remove_filter(netlink, from, priority)?;
                }
            }
        }
        other => other?,
    }
    let message = Message::new(
        libc::RTM_NEWTFILTER,
        libc::NLM_F_CREATE | libc::NLM_F_EXCL,
        &header(from, 0, FILTERS, info(priority(to))),
    )
    .with(TCA_KIND, b"u32\0")
    .with(TCA_OPTIONS | NESTED, &redirect_all(to));
    netlink.ask(message)
}

/// Undoes [`add`], if it is still in place; the qdisc goes if nothing else uses it.
pub(super) fn remove(netlink: &mut Netlink, from: u32, to: u32) -> io::Result<()> {
    remove_filter(netlink, from, priority(to))?;
    match priorities(netlink, from) {
        Ok(left) if left.is_empty() => {}
        // The filters of others, or no qdisc any more.
        _ => return Ok(()),
    }
    let qdisc = Message::new(
        libc::RTM_DELQDISC,
        0,
        &header(from, INGRESS_HANDLE, INGRESS, 0),
    );
    absent(netlink.ask(qdisc.with(TCA_KIND, b"ingress\0")))
}

/// The priorities of the filters on what comes in on interface `from`.
fn priorities(netlink: &mut Netlink, from: u32) -> io::Result<Vec<u32>> {
    let filters = netlink.dump(libc::RTM_GETTFILTER, &header(from, 0, FILTERS, 0))?;
    let info = filters.iter().filter_map(|filter| u32_at(filter, 16));
    Ok(info.map(|info| info >> 16).collect())
}

/// Removes every filter of a priority.
fn remove_filter(netlink: &mut Netlink, from: u32, priority: u32) -> io::Result<()> {
    let header = header(from, 0, FILTERS, info(priority));
    absent(netlink.ask(Message::new(libc::RTM_DELTFILTER, 0, &header)))
}

fn priority(to: u32) -> u32 {
    PRIORITIES.start() + to % (PRIORITIES.end() - PRIORITIES.start() + 1)
}

/// What is not there needs no removal; the kernel says so in several ways.
fn absent(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ENOENT | libc::EINVAL | libc::ENODEV | libc::EOPNOTSUPP)
            ) =>
        {
            Ok(())
        }
        other => other,
    }
}

/// A filter's priority and protocol: every one.
fn info(priority: u32) -> u32 {
    priority << 16 | u32::from((libc::ETH_P_ALL as u16).to_be())
}

/// `struct tcmsg`.
fn header(index: u32, handle: u32, parent: u32, info: u32) -> [u8; TC] {
    let mut header = [0; TC];
    for (place, number) in header
        .chunks_exact_mut(4)
        .zip([0, index, handle, parent, info])
    {
        place.copy_from_slice(&number.to_ne_bytes());
    }
    header
}

/// `struct tc_u32_sel` with one key that every packet has, and one action: `struct tc_mirred`.
fn redirect_all(to: u32) -> Vec<u8> {
    let mut selector = [0; 32];
    selector[0] = TC_U32_TERMINAL;
    selector[2] = 1;
    let parameters: Vec<u8> = [0, 0, TC_ACT_STOLEN, 0, 0, TCA_EGRESS_REDIR, to]
        .iter()
        .flat_map(|number| number.to_ne_bytes())
        .collect();
    let options = nest(&[(TCA_MIRRED_PARMS, &parameters)]);
    let action = nest(&[
        (TCA_ACT_KIND, b"mirred\0"),
        (TCA_ACT_OPTIONS | NESTED, &options),
    ]);
    let actions = nest(&[(1 | NESTED, &action)]);
    nest(&[(TCA_U32_SEL, &selector), (TCA_U32_ACT | NESTED, &actions)])
}

/// The index of the interface `name`, if there is one.
pub(super) fn index_of(netlink: &mut Netlink, name: &str) -> io::Result<Option<u32>> {
    let links = netlink.dump(libc::RTM_GETLINK, &[0; 16])?;
    Ok(links.iter().find_map(|link| {
        let found = super::netlink::attribute(link.get(16..)?, libc::IFLA_IFNAME)?;
        (found.strip_suffix(b"\0")? == name.as_bytes()).then(|| u32_at(link, 4))?
    }))
}
