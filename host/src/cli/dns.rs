//! The name servers of a container with a network.

use std::ffi::OsStr;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Mount, Spec};

/// Where the agent keeps the pod's file.
const IN_GUEST: &str = "/run/cella/resolv.conf";
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// The resolv.conf for a sandbox in `netns`: that of ip-netns(8) for a namespace with a name, or else the host's
/// without the name servers that only the host itself reaches.
pub fn resolv_conf(netns: &Path) -> String {
    let named = match (netns.parent(), netns.file_name()) {
        (Some(parent), Some(name)) if is_named(parent) => {
            let path: PathBuf = [OsStr::new("/etc/netns"), name, OsStr::new("resolv.conf")]
                .iter()
                .collect();
            std::fs::read_to_string(path).ok()
        }
        _ => None,
    };
    named.unwrap_or_else(|| reachable(&std::fs::read_to_string(RESOLV_CONF).unwrap_or_default()))
}

fn is_named(directory: &Path) -> bool {
    [Path::new("/run/netns"), Path::new("/var/run/netns")].contains(&directory)
}

/// A resolv.conf without the name servers on loopback addresses.
fn reachable(text: &str) -> String {
    let is_loopback = |line: &str| {
        let mut words = line.split_whitespace();
        words.next() == Some("nameserver")
            && words
                .next()
                .and_then(|word| word.parse::<IpAddr>().ok())
                .is_some_and(|address| address.is_loopback())
    };
    let lines = text.lines().filter(|line| !is_loopback(line));
    lines.flat_map(|line| [line, "\n"]).collect()
}

/// Shows the pod's file to a container, unless it brings its own.
pub fn mount(spec: &mut Spec) {
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    if mounts
        .iter()
        .any(|mount| mount.destination() == Path::new(RESOLV_CONF))
    {
        return;
    }
    let mut mount = Mount::default();
    mount.set_source(Some(IN_GUEST.into()));
    mount.set_destination(RESOLV_CONF.into());
    mount.set_typ(Some("bind".into()));
    mount.set_options(Some(vec!["rbind".into(), "rprivate".into()]));
    mounts.push(mount);
    spec.set_mounts(Some(mounts));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_servers_of_the_host_alone_are_left_out() {
        let text = "search a b\nnameserver 127.0.0.53\n nameserver ::1\nnameserver 192.0.2.1\n";
        assert_eq!(reachable(text), "search a b\nnameserver 192.0.2.1\n");
        assert_eq!(reachable("nameserver"), "nameserver\n");
        assert_eq!(reachable(""), "");
    }

    #[test]
    fn a_containers_own_file_is_kept() {
        let mut spec = Spec::default();
        mount(&mut spec);
        mount(&mut spec);
        let ours = |mount: &&Mount| mount.destination() == Path::new(RESOLV_CONF);
        let mounts = spec.mounts().clone().unwrap();
        assert_eq!(mounts.iter().filter(ours).count(), 1);
    }
}
