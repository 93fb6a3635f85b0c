//! Namespaces that are none, and those that are: these need root.

use std::process::Command;

use super::*;

/// A network namespace that is gone when this is dropped: a process keeps it.
struct Netns(std::process::Child);

impl Netns {
    /// One with an interface as CNI's bridge plugin makes it; `None` without root.
    fn new() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: root");
            return None;
        }
        let script = "ip link add eth0 mtu 1400 address 02:00:00:00:00:07 type veth peer name far && \
            ip address add 10.99.0.2/24 dev eth0 && ip link set lo up && \
            ip link set far up && ip link set eth0 up && \
            ip address add fd99::2/64 dev eth0 nodad && \
            ip route add default via 10.99.0.1 && ip route add 10.98.0.0/16 via 10.99.0.9 mtu 1300 && \
            ip -6 route add default via fd99::1 && \
            ip neighbour add 10.99.0.1 lladdr 02:00:00:00:00:01 dev eth0 nud permanent && \
            ip link add down0 type veth peer name down1 && echo ready && exec sleep 1000";
        let mut child = Command::new("unshare")
            .args(["--net", "sh", "-ec", script])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let out = child.stdout.take().unwrap();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(out), &mut line).unwrap();
        let netns = Self(child);
        assert_eq!(line, "ready\n");
        Some(netns)
    }

    fn path(&self) -> PathBuf {
        format!("/proc/{}/ns/net", self.0.id()).into()
    }

    /// What a command says in the namespace.
    fn run(&self, command: &str) -> String {
        let target = self.0.id().to_string();
        let said = Command::new("nsenter")
            .args(["--net", "--target", &target, "sh", "-c", command])
            .output()
            .unwrap();
        assert!(said.status.success(), "{command}: {said:?}");
        String::from_utf8(said.stdout).unwrap()
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

fn open_now(netns: &Path) -> Result<Network, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    runtime.unwrap().block_on(Network::open(netns))
}

fn join_now(network: &Network) -> Result<Option<Entrance>, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    runtime.unwrap().block_on(network.join())
}

#[test]
fn what_is_no_namespace_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let none = open_now(&dir.path().join("none")).unwrap_err();
    assert!(matches!(none, Error::NoNamespace { .. }), "{none}");
    let fifo = dir.path().join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RWXU,
        0,
    )
    .unwrap();
    let others = [
        fifo,
        dir.path().to_owned(),
        "/etc/passwd".into(),
        "/dev/null".into(),
        "/proc/self/ns/mnt".into(),
    ];
    for path in others {
        let error = open_now(&path).unwrap_err();
        assert!(matches!(error, Error::NotANamespace { .. }), "{error}");
        assert!(error.to_string().contains(path.to_str().unwrap()));
    }
}

#[test]
fn the_hosts_own_is_refused() {
    let error = open_now(Path::new("/proc/self/ns/net")).unwrap_err();
    assert!(matches!(error, Error::Host { .. }), "{error}");
}

#[test]
fn a_namespace_without_interfaces_is_ready_at_once() {
    let Some(netns) = Netns::new() else { return };
    netns.run("ip link del eth0");
    let network = open_now(&netns.path()).unwrap();
    assert!(network.nics.is_empty() && network.interfaces.is_empty());
    assert!(network.routes.is_empty(), "{:?}", network.routes);
    join_now(&network).unwrap();
    network.joints.undo().unwrap();
}

#[test]
fn the_guest_gets_what_the_namespace_has() {
    let Some(netns) = Netns::new() else { return };
    let network = open_now(&netns.path()).unwrap();
    // Both ends of the pair are there and up; the other pair is down.
    let names: Vec<_> = network.interfaces.iter().map(|i| i.name.as_str()).collect();
    assert_eq!(names.len(), 2, "{names:?}");
    let at = names.iter().position(|name| *name == "eth0").unwrap();
    let eth0 = &network.interfaces[at];
    assert_eq!(eth0.hardware_address, "02:00:00:00:00:07");
    assert_eq!(eth0.mtu, 1400);
    assert!(
        eth0.addresses.contains(&"10.99.0.2/24".to_owned())
            && eth0.addresses.contains(&"fd99::2/64".to_owned()),
        "{eth0:?}"
    );
    assert_eq!(network.nics[at].mac, [2, 0, 0, 0, 0, 7]);
    assert_eq!(network.nics[at].mtu, 1400);

    let routes: Vec<_> = network
        .routes
        .iter()
        .map(|r| (r.destination.as_str(), r.gateway.as_str(), r.mtu, r.ipv6))
        .collect();
    assert_eq!(
        routes.len(),
        3,
        "no route that the kernel makes: {routes:?}"
    );
    assert!(routes.contains(&("", "10.99.0.1", 0, false)));
    assert!(routes.contains(&("10.98.0.0/16", "10.99.0.9", 1300, false)));
    assert!(routes.contains(&("", "fd99::1", 0, true)));
    let [neighbor] = &network.neighbors[..] else {
        panic!("{:?}", network.neighbors);
    };
    assert_eq!(
        (
            neighbor.address.as_str(),
            neighbor.hardware_address.as_str()
        ),
        ("10.99.0.1", "02:00:00:00:00:01")
    );
}

#[test]
fn a_namespace_serves_one_at_a_time_and_is_left_as_it_was() {
    let Some(netns) = Netns::new() else { return };
    let before = netns.run("ip -o link; tc qdisc");
    let network = open_now(&netns.path()).unwrap();
    join_now(&network).unwrap();
    let filter = netns.run("tc filter show dev eth0 ingress");
    assert!(
        filter.contains("Egress Redirect to device cella"),
        "{filter}"
    );
    assert!(netns.run("ip link show cella0").contains(",UP,"));

    let second = open_now(&netns.path()).unwrap_err();
    assert!(matches!(second, Error::InUse { .. }), "{second}");

    let joints = network.joints.clone();
    drop(network);
    joints.undo().unwrap();
    assert_eq!(netns.run("ip -o link; tc qdisc"), before);
    joints.undo().unwrap();
}

#[test]
fn who_connects_inside_is_caught_whatever_the_port() {
    let Some(netns) = Netns::new() else { return };
    let network = open_now(&netns.path()).unwrap();
    let Some(entrance) = join_now(&network).unwrap() else {
        println!("SKIPPED: sk_lookup programs of BPF");
        return;
    };
    let listener = entrance.listener();
    listener.set_nonblocking(false).unwrap();
    for (address, port) in [("127.0.0.1", 80), ("[::1]", 8080), ("10.99.0.2", 5432)] {
        let address = format!("{address}:{port}");
        let dialled = inside(&netns.path(), |netns, _| {
            std::net::TcpStream::connect(&address).map_err(|e| system(netns, "connecting", e))
        });
        let dialled = dialled.unwrap();
        let (caught, from) = listener.accept().unwrap();
        assert_eq!(caught.local_addr().unwrap().port(), port);
        assert_eq!(from.port(), dialled.local_addr().unwrap().port());
    }
    drop(entrance);
    let refused = inside(&netns.path(), |netns, _| {
        std::net::TcpStream::connect("127.0.0.1:80").map_err(|e| system(netns, "connecting", e))
    });
    assert!(refused.is_err(), "it is closed with its owner");
    network.joints.undo().unwrap();
}

#[test]
fn what_the_dead_left_is_replaced_and_not_undone_twice() {
    let Some(netns) = Netns::new() else { return };
    let dead = open_now(&netns.path()).unwrap();
    join_now(&dead).unwrap();
    let left = dead.joints.clone();
    drop(dead);
    assert!(
        !netns.run("ip -o link").contains("cella0"),
        "it goes with its descriptor"
    );

    let living = open_now(&netns.path()).unwrap();
    join_now(&living).unwrap();
    left.undo().unwrap();
    let filter = netns.run("tc filter show dev eth0 ingress");
    assert!(
        filter.contains("Egress Redirect to device cella"),
        "{filter}"
    );
    living.joints.undo().unwrap();
    assert_eq!(netns.run("tc filter show dev eth0 ingress"), "");
}

#[test]
fn filters_of_others_stay() {
    let Some(netns) = Netns::new() else { return };
    netns.run(
        "tc qdisc add dev eth0 clsact && tc filter add dev eth0 ingress pref 7 protocol all u32 match u8 0 0 action mirred egress mirror dev far",
    );
    let network = open_now(&netns.path()).unwrap();
    join_now(&network).unwrap();
    network.joints.undo().unwrap();
    let filter = netns.run("tc filter show dev eth0 ingress");
    assert!(
        filter.contains("pref 7") && !filter.contains("Redirect"),
        "{filter}"
    );
    assert!(netns.run("tc qdisc show dev eth0").contains("clsact"));
}

#[test]
fn a_namespace_that_is_gone_needs_no_undoing() {
    let joints = |netns: &str| Joints {
        netns: netns.into(),
        interfaces: vec![("eth0".into(), 7)],
    };
    joints("/nowhere/at/all").undo().unwrap();
    joints("/etc/passwd").undo().unwrap();
    joints("/proc/self/ns/net").undo().unwrap();
}
