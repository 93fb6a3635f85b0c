//! Watch, Info, SetUpSandbox, and clients that come and go.

use std::path::Path;
use std::process::Command;

use cella_proto::agent as proto;
use ttrpc::Code;

use crate::harness::{Sandbox, soon, status};

#[tokio::test]
async fn it_says_that_it_is_ready_to_whoever_watches() {
    let Some(sandbox) = Sandbox::start().await else {
        return;
    };
    for client in [sandbox.client.clone(), sandbox.attach().await] {
        let request = proto::WatchRequest::new();
        let mut events = client.watch(soon(), &request).await.unwrap();
        let event = events.recv().await.unwrap().unwrap();
        let ready = event.ready();
        assert_eq!(ready.agent_version, env!("CARGO_PKG_VERSION"));
        assert!(!ready.kernel_release.is_empty());
        assert!(ready.agent_entry_ns > 0 && ready.agent_entry_ns <= ready.agent_dial_ns);
    }
}

#[tokio::test]
async fn it_goes_on_when_the_client_that_it_dialled_is_gone() {
    let Some(mut sandbox) = Sandbox::start().await else {
        return;
    };
    sandbox.client = sandbox.attach().await;
    let info = sandbox
        .client
        .info(soon(), &proto::Empty::new())
        .await
        .unwrap();
    assert!(info.agent_rss_kib > 0);
    assert!(info.memory_total_kib >= info.memory_available_kib);
    assert!(info.memory_available_kib > 0);
    assert!(info.cpus_online >= 1);
}

#[tokio::test]
async fn more_watchers_than_it_keeps_do_no_harm() {
    let Some(sandbox) = Sandbox::start().await else {
        return;
    };
    let mut oldest = sandbox.watch().await;
    for _ in 0..40 {
        drop(sandbox.watch().await);
    }
    sandbox.run("a", &["true"]).await;
    assert_eq!(sandbox.watch().await.exit().await.container_id, "a");
    // The first was told that it is no longer one of them.
    assert!(oldest.end().await);
}

#[tokio::test]
async fn a_sandbox_is_set_up_in_one_call_and_once() {
    let device = "ip link add cella-t0 address 02:00:00:00:00:07 type veth peer name cella-t1 && \
                  ip link set cella-t1 up";
    let Some(sandbox) = Sandbox::start_after(device).await else {
        return;
    };
    let tmpfs = sandbox.dir.path().join("volume");
    let request = whole_request(&tmpfs);
    sandbox
        .client
        .set_up_sandbox(soon(), &request)
        .await
        .unwrap();
    let inside = |command: &str| in_guest(&sandbox, command);
    assert_eq!(inside("hostname"), "pod-of-the-test\n");
    assert_eq!(
        inside("cat /run/cella/resolv.conf"),
        "nameserver 10.9.8.1\n"
    );
    assert_eq!(inside("cat /proc/sys/net/ipv4/ip_forward"), "1\n");
    let mounts = inside("cat /proc/mounts");
    assert!(
        mounts.contains(&format!("volume {} tmpfs ro", tmpfs.display())),
        "{mounts}"
    );
    assert!(mounts.contains("shm /dev/shm tmpfs"), "{mounts}");
    assert!(mounts.contains("size=1024k"), "{mounts}");
    let link = inside("ip address show");
    for expected in [
        "lo: <LOOPBACK,UP",
        "eth0",
        "mtu 1400",
        "inet 10.9.8.7/24 brd 10.9.8.255",
        "inet6 fd00:9::7/64",
    ] {
        assert!(link.contains(expected), "{expected}: {link}");
    }
    let routes = inside("ip route show");
    assert!(routes.contains("default via 10.9.8.1 dev eth0"), "{routes}");
    assert!(routes.contains("mtu 1300"), "{routes}");
    let neighbors = inside("ip neighbour show");
    assert!(
        neighbors.contains("10.9.8.1 dev eth0 lladdr 02:00:00:00:00:01 PERMANENT"),
        "{neighbors}"
    );

    let again = sandbox.client.set_up_sandbox(soon(), &request).await;
    assert_eq!(status(again).0, Code::FAILED_PRECONDITION);
}

#[tokio::test]
async fn a_request_that_cannot_be_met_is_refused_by_its_kind() {
    let Some(sandbox) = Sandbox::start().await else {
        return;
    };
    let refused = async |request: proto::SetUpSandboxRequest| {
        status(sandbox.client.set_up_sandbox(soon(), &request).await)
    };
    let (code, message) = refused(proto::SetUpSandboxRequest {
        interfaces: vec![proto::Interface {
            hardware_address: "02:00:00:00:00:99".to_owned(),
            ..Default::default()
        }],
        ..Default::default()
    })
    .await;
    assert_eq!(code, Code::NOT_FOUND);
    assert!(message.contains("02:00:00:00:00:99"), "{message}");
    let (code, _) = refused(proto::SetUpSandboxRequest {
        sysctls: [("../../etc/passwd".to_owned(), "1".to_owned())].into(),
        ..Default::default()
    })
    .await;
    assert_eq!(code, Code::INVALID_ARGUMENT);
    let (code, message) = refused(proto::SetUpSandboxRequest {
        mounts: vec![proto::Mount {
            source: "tag".to_owned(),
            destination: "/run/x".to_owned(),
            fstype: "no-such-fs".to_owned(),
            ..Default::default()
        }],
        ..Default::default()
    })
    .await;
    assert_eq!(code, Code::NOT_FOUND);
    assert!(
        message.contains("mounting tag (no-such-fs) on /run/x"),
        "{message}"
    );
    // None of these has set it up.
    let request = proto::SetUpSandboxRequest::new();
    sandbox
        .client
        .set_up_sandbox(soon(), &request)
        .await
        .unwrap();
}

/// Output of a shell command in the agent's namespaces.
fn in_guest(sandbox: &Sandbox, command: &str) -> String {
    let output = Command::new("nsenter")
        .args([
            "-t",
            &sandbox.agent_pid().to_string(),
            "-m",
            "-u",
            "-n",
            "-p",
        ])
        .args(["sh", "-c", command])
        .output()
        .unwrap();
    assert!(output.status.success(), "{command}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// A request for everything that there is.
fn whole_request(tmpfs: &Path) -> proto::SetUpSandboxRequest {
    proto::SetUpSandboxRequest {
        hostname: "pod-of-the-test".to_owned(),
        mounts: vec![proto::Mount {
            source: "volume".to_owned(),
            destination: tmpfs.to_string_lossy().into_owned(),
            fstype: "tmpfs".to_owned(),
            options: vec!["ro".to_owned(), "size=1m".to_owned()],
            ..Default::default()
        }],
        interfaces: vec![proto::Interface {
            name: "eth0".to_owned(),
            hardware_address: "02:00:00:00:00:07".to_owned(),
            mtu: 1400,
            addresses: vec!["10.9.8.7/24".to_owned(), "fd00:9::7/64".to_owned()],
            ..Default::default()
        }],
        routes: vec![proto::Route {
            gateway: "10.9.8.1".to_owned(),
            interface: "eth0".to_owned(),
            mtu: 1300,
            ..Default::default()
        }],
        neighbors: vec![proto::Neighbor {
            address: "10.9.8.1".to_owned(),
            hardware_address: "02:00:00:00:00:01".to_owned(),
            interface: "eth0".to_owned(),
            ..Default::default()
        }],
        resolv_conf: "nameserver 10.9.8.1\n".to_owned(),
        sysctls: [("net.ipv4.ip_forward".to_owned(), "1".to_owned())].into(),
        entropy: vec![7; 32],
        shm_bytes: 1 << 20,
        ..Default::default()
    }
}
