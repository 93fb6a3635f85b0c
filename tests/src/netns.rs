//! A network namespace as CNI's bridge plugin makes one: a veth pair, a bridge on the host, addresses of both families.

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::missing_for;

/// Of the interface.
pub const MTU: &str = "1400";

/// A named network namespace with `eth0`, whose other end is on a bridge of the host. Names and addresses have the
/// process id in them, so that suites can run side by side.
pub struct Netns {
    /// Its name for ip(8).
    pub name: String,
    bridge: String,
    /// The first three bytes of its IPv4 network: `.1` is the bridge, `.2` `eth0`.
    pub net: String,
    /// The same of its IPv6 network, with a colon.
    pub net6: String,
    /// `eth0`'s hardware address.
    pub mac: String,
}

impl Netns {
    /// A new one.
    #[expect(
        clippy::new_without_default,
        reason = "it makes something of the host's"
    )]
    pub fn new() -> Self {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let id = std::process::id() % 100_000 * 10 + MADE.fetch_add(1, Ordering::Relaxed);
        let netns = Self {
            name: format!("cella-test-{id}"),
            bridge: format!("cb{id}"),
            net: format!("10.213.{}", id % 256),
            net6: format!("fd13:{:x}:", id & 0xffff),
            mac: format!("02:00:0a:d5:{:02x}:{:02x}", id >> 8 & 0xff, id & 0xff),
        };
        let Self {
            name,
            bridge,
            net,
            net6,
            mac,
        } = &netns;
        ip(&format!(
            "netns add {name}\n\
             link add {bridge} type bridge\n\
             link add cv{id} mtu {MTU} type veth peer name eth0 mtu {MTU} address {mac} netns {name}\n\
             link set cv{id} master {bridge} up\n\
             link set {bridge} mtu {MTU} up\n\
             address add {net}.1/24 dev {bridge}\n\
             address add {net6}:1/64 dev {bridge} nodad\n\
             -n {name} link set lo up\n\
             -n {name} link set eth0 up\n\
             -n {name} address add {net}.2/24 dev eth0\n\
             -n {name} address add {net6}:2/64 dev eth0 nodad\n\
             -n {name} route add default via {net}.1\n\
             -n {name} -6 route add default via {net6}:1\n"
        ));
        netns
    }

    /// Gives it another interface, without addresses.
    pub fn add_interface(&self, interface: &str) {
        let (name, other) = (&self.name, self.bridge.replace("cb", "cw"));
        ip(&format!(
            "link add {other} type veth peer name {interface} netns {name}\n\
             -n {name} link set {interface} up"
        ));
    }

    /// Its path.
    pub fn path(&self) -> String {
        format!("/run/netns/{}", self.name)
    }

    /// Its interfaces and what filters are on them.
    pub fn state(&self) -> String {
        let script = "ip -o link | cut -d' ' -f1-3; tc qdisc; tc filter show dev eth0 ingress";
        let said = Command::new("ip")
            .args(["netns", "exec", &self.name, "sh", "-c", script])
            .output()
            .unwrap();
        assert!(said.status.success(), "{said:?}");
        String::from_utf8(said.stdout).unwrap()
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        // The pair goes with either end.
        let _ = Command::new("ip")
            .args(["netns", "del", &self.name])
            .status();
        let _ = Command::new("ip")
            .args(["link", "del", &self.bridge])
            .status();
    }
}

/// Runs lines of ip(8) commands.
#[track_caller]
pub fn ip(lines: &str) {
    for line in lines.lines() {
        let status = Command::new("ip").args(line.split_whitespace()).status();
        assert!(status.unwrap().success(), "ip {line}");
    }
}

/// What a sandbox on `hypervisor` with such a namespace lacks on this machine, if anything.
pub fn missing_for_networks_on(hypervisor: &str) -> Option<String> {
    match Command::new("ip").arg("-V").output() {
        Err(_) => Some("ip (iproute2)".to_owned()),
        Ok(_) => missing_for(hypervisor),
    }
}
