//! A pod in a network namespace, as CNI's bridge plugin makes one: a veth pair, a bridge on the host, addresses of both
//! families. On /dev/kvm a boot may take long, so one sandbox goes through all of it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use cella_tests::netns::{MTU, Netns, ip, missing_for_networks_on};
use cella_tests::{Host, skip};

const BYTES: usize = 1 << 20;

const HYPERVISORS: [&str; 2] = ["kvm", "qemu"];

/// A host whose sandboxes run on `hypervisor`, unless the machine lacks something.
fn host(hypervisor: &str) -> Option<Host> {
    match missing_for_networks_on(hypervisor) {
        Some(missing) => {
            skip(&missing);
            None
        }
        None => Some(Host::on(hypervisor)),
    }
}

#[test]
fn what_cannot_be_joined_is_refused() {
    for host in HYPERVISORS.iter().filter_map(|name| host(name)) {
        let image = host.busybox();
        let run = |path: &str| host.cella(&["run", "--netns", path, &image, "true"]);
        run("/run/netns/none").expect_failure(&["/run/netns/none", "No such file"]);
        run("/etc/passwd").expect_failure(&["/etc/passwd", "no network namespace"]);
        run("/proc/self/ns/net").expect_failure(&["the host's own"]);
        run("/proc/self/ns/mnt").expect_failure(&["no network namespace"]);
        host.assert_clean();
    }
}

#[test]
fn a_boot_that_fails_leaves_the_namespace_as_it_was() {
    for host in HYPERVISORS.iter().filter_map(|name| host(name)) {
        let netns = Netns::new();
        let before = netns.state();
        let image = host.busybox();
        let mut command = host.command(&["run", "--netns", &netns.path(), &image, "true"]);
        let nothing = host.path("nothing");
        fs::create_dir(&nothing).unwrap();
        command.env("CELLA_LIBEXEC_DIR", &nothing);
        let said = cella_tests::finish(command.spawn().unwrap(), &[]);
        said.expect_failure(&["nothing"]);
        assert_eq!(netns.state(), before);
        host.assert_clean();
    }
}

/// On a clone: its interfaces are plugged into a machine that was saved without any.
#[test]
fn a_pod_has_the_network_of_its_namespace_on_kvm() {
    if host("kvm").is_none() {
        return;
    }
    let host = Host::with_templates("kvm");
    host.cella(&["template", "build"]).expect_status(0);
    a_pod_has_the_network_of_its_namespace(&host, &Netns::new());
    // One that did not serve would have been removed.
    let listed = host.cella(&["template", "list", "--json"]);
    assert!(listed.stdout.contains("\"key\""), "{listed:?}");
}

#[test]
fn a_pod_has_the_network_of_its_namespace_on_qemu() {
    let Some(host) = host("qemu") else { return };
    let netns = Netns::new();
    a_pod_has_the_network_of_its_namespace(&host, &netns);

    // And again in the same namespace; then in one without interfaces.
    let image = host.busybox();
    let run = |script: &str| {
        let args = ["run", "--netns", &netns.path(), &image, "sh", "-c", script];
        host.cella(&args).expect_status(0).stdout
    };
    run(&format!("ping -c 1 -W 20 {}.1", netns.net));
    ip(&format!("-n {} link del eth0", netns.name));
    assert_eq!(run("ls /sys/class/net").trim(), "lo");
    host.assert_clean();
}

fn a_pod_has_the_network_of_its_namespace(host: &Host, netns: &Netns) {
    let before = netns.state();
    let image = host.busybox();
    let data = host.path("data");
    fs::create_dir(&data).unwrap();
    let volume = format!("{}:/data", data.display());
    let options = ["--pod", "pod", "-d", "--name", "c", "-v", &volume];
    let start = |path: &str| {
        let args = [
            &["run", "--netns", path],
            &options[..],
            &[&image, "sleep", "1000"],
        ];
        host.cella(&args.concat())
    };
    start(&netns.path()).expect_status(0);
    let sh = |script: &str| {
        let said = host.cella(&["exec", "c", "sh", "-c", script]);
        said.expect_status(0).stdout
    };

    the_interface_is_the_same(netns, &sh);
    let (net, net6) = (&netns.net, &netns.net6);
    sh(&format!(
        "ping -c 1 -W 20 {net}.1 && ping -c 1 -W 20 {net6}:1"
    ));
    a_mebibyte_goes_each_way(host, netns, &data);

    a_port_is_forwarded(host, netns);

    // One sandbox a namespace.
    let path = netns.path();
    let second = host.cella(&["run", "--netns", &path, &image, "true"]);
    second.expect_failure(&[&path, "another sandbox uses it"]);

    // The owner is killed: the VMM goes with it, and `cella gc` clears the namespace.
    let state = fs::read_to_string(host.path("run/pod/sandbox.json")).unwrap();
    let owner = state.split("\"owner\"").nth(1).unwrap();
    let pid = owner.split("\"pid\": ").nth(1).unwrap();
    let pid: String = pid.chars().take_while(char::is_ascii_digit).collect();
    let killed = Command::new("kill").args(["-9", &pid]).status().unwrap();
    assert!(killed.success());
    until(|| !netns.state().contains("cella0")).expect("the tap goes with its descriptors");
    host.cella(&["gc"]).expect_status(0);
    assert_eq!(netns.state(), before);
    // Its runner has removed the record, unless `cella gc` was faster and kept it.
    host.cella(&["rm", "c"]);
    host.assert_clean();
}

fn the_interface_is_the_same(netns: &Netns, sh: &dyn Fn(&str) -> String) {
    let (net, net6) = (&netns.net, &netns.net6);
    let said = sh(
        "cat /sys/class/net/eth0/mtu /sys/class/net/eth0/address; ip -o addr show dev eth0; ip route; ip -6 route; cat /etc/resolv.conf",
    );
    for part in [
        format!("{MTU}\n{}\n", netns.mac),
        format!("{net}.2/24"),
        format!("{net6}:2/64"),
        format!("default via {net}.1 dev eth0"),
        format!("default via {net6}:1 dev eth0"),
    ] {
        assert!(said.contains(&part), "no {part:?} in {said}");
    }
    let servers = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    for line in servers.lines().filter(|line| !line.contains(" 127.")) {
        assert!(said.contains(line), "no {line:?} in {said}");
    }
}

/// Each side listens once. What is sent and what arrives are files of a volume, so that the guest need not compute.
fn a_mebibyte_goes_each_way(host: &Host, netns: &Netns, data: &std::path::Path) {
    let mut random = vec![0; BYTES];
    let urandom = fs::File::open("/dev/urandom");
    urandom.unwrap().read_exact(&mut random).unwrap();
    fs::write(data.join("out"), &random).unwrap();

    let listener = TcpListener::bind(format!("{}.1:0", netns.net)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let receiving = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        listener
            .accept()
            .unwrap()
            .0
            .read_to_end(&mut bytes)
            .unwrap();
        bytes
    });
    let send = format!("nc {}.1 {port} < /data/out", netns.net);
    host.cella(&["exec", "c", "sh", "-c", &send])
        .expect_status(0);
    assert!(receiving.join().unwrap() == random, "guest to host");

    let listen = ["exec", "c", "sh", "-c", "nc -l -p 5000 > /data/in"];
    let child = host.command(&listen).spawn().unwrap();
    let mut stream = None;
    until(|| {
        stream = TcpStream::connect(format!("{}.2:5000", netns.net)).ok();
        stream.is_some()
    })
    .expect("the guest listens");
    let mut stream = stream.unwrap();
    stream.write_all(&random).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    cella_tests::finish(child, &[]).expect_status(0);
    assert!(
        fs::read(data.join("in")).unwrap() == random,
        "host to guest"
    );
}

/// As containerd does it: `localhost` is dialled inside of the namespace, and the pod listens.
fn a_port_is_forwarded(host: &Host, netns: &Netns) {
    let listen = ["exec", "c", "sh", "-c", "echo answer | nc -l -p 6000"];
    let child = host.command(&listen).spawn().unwrap();
    let dial = |port: &str| {
        let script = format!("exec 3<>/dev/tcp/127.0.0.1/{port} && echo question >&3 && cat <&3");
        let command = ["netns", "exec", &netns.name, "bash", "-c", &script];
        let said = Command::new("ip").args(command).output().unwrap();
        String::from_utf8(said.stdout).unwrap()
    };
    let mut answer = String::new();
    until(|| {
        answer = dial("6000");
        !answer.is_empty()
    });
    assert_eq!(answer, "answer\n");
    let said = cella_tests::finish(child, &[]).expect_status(0);
    assert_eq!(said.stdout, "question\n");
    assert_eq!(dial("6001"), "", "nobody listens there");
}

/// Waits for something that comes in its own time.
fn until(mut is_so: impl FnMut() -> bool) -> Option<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        if Instant::now() > deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Some(())
}
