//! A guest in a jailed process, from `Configure` to the end.

use std::fs::{File, Permissions};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use cella_proto::vmm::{
    ErrorKind, GetStats, Net, Pause, Plug, Resume, Start, Stats, Stop, StopReason, device, reply,
    request::Call,
};

use crate::configure::{Given, device, memfd};
use crate::kernel::elf;
use crate::refused;
use crate::vmm::{Vmm, alone, fds};

fn spinning() -> File {
    elf(guest! { "2: in al, 0x80", "inc rcx", "jmp 2b" }, 0x1000)
}

#[track_caller]
fn stats(vmm: &mut Vmm) -> Stats {
    match vmm.call(Call::GetStats(GetStats::default()), &[]) {
        reply::Body::Stats(stats) => stats,
        other => panic!("{other:?}"),
    }
}

pub fn pause() -> Call {
    Call::Pause(Pause::default())
}

pub fn resume() -> Call {
    Call::Resume(Resume::default())
}

/// Where the guest's agent calls its host.
pub const AGENT_PORT: &str = "1024";

/// A process with a running guest and one of each device, or nothing.
fn running(kernel: File, vcpus: u32) -> Option<Vmm> {
    let mut vmm = Vmm::start()?;
    let mut given = Given::new(kernel)?;
    given.configure.vcpus = vcpus;
    given.add_devices(vmm.sockets.path(), 64);
    vmm.done(Call::Configure(given.configure), &fds(&given.files));
    vmm.done(Call::Start(Start::default()), &[]);
    Some(vmm)
}

#[test]
fn a_machine_lives_through_all_of_its_states() {
    let _alone = alone();
    let Some(mut vmm) = running(spinning(), 3) else {
        return;
    };
    let failed = ErrorKind::ERROR_KIND_FAILED_PRECONDITION;
    assert_eq!(refused(vmm.call(resume(), &[])), failed);
    assert_eq!(
        refused(vmm.call(Call::Start(Start::default()), &[])),
        failed
    );
    for _ in 0..5 {
        vmm.done(pause(), &[]);
        assert_eq!(refused(vmm.call(pause(), &[])), failed);
        let before = stats(&mut vmm);
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(stats(&mut vmm).exits, before.exits, "it runs while paused");
        vmm.done(resume(), &[]);
        std::thread::sleep(Duration::from_millis(20));
        let after = stats(&mut vmm);
        assert!(after.exits["io_in"] > before.exits["io_in"], "{after:?}");
        assert!(after.started_us > after.jailed_us);
        assert!(after.guest_rss_kib > 0 && after.guest_rss_kib < 4096);
    }
    vmm.done(Call::Stop(Stop::default()), &[]);
    let stopped = vmm.stopped();
    assert_eq!(stopped.reason.unwrap(), StopReason::STOP_REASON_REQUESTED);
    assert!(vmm.receive().is_none(), "the last word");
    assert_eq!(vmm.ended(), (Some(0), None), "{}", vmm.log());
    assert_eq!(vmm.log(), "");
}

#[test]
fn a_network_is_plugged_in() {
    let _alone = alone();
    let Some(mut vmm) = running(spinning(), 1) else {
        return;
    };
    let failed = ErrorKind::ERROR_KIND_FAILED_PRECONDITION;
    let invalid = ErrorKind::ERROR_KIND_INVALID_ARGUMENT;
    let plug = || Call::Plug(Plug::default());
    let (one, _far) = UnixDatagram::pair().unwrap();
    let none = refused(vmm.call(plug(), &[one.as_fd()]));
    assert_eq!(none, failed, "it has no network device");
    vmm.done(Call::Stop(Stop::default()), &[]);
    drop(vmm);

    let mut vmm = Vmm::start().unwrap();
    assert_eq!(refused(vmm.call(plug(), &[one.as_fd()])), failed);
    let mut given = Given::new(spinning()).unwrap();
    let tap_fd = given.add(one.try_clone().unwrap());
    given
        .configure
        .devices
        .push(device(device::Device::Net(Net {
            tap_fd,
            mac: vec![2, 0, 0, 0, 0, 7],
            mtu: 1500,
            ..Net::default()
        })));
    vmm.done(Call::Configure(given.configure), &fds(&given.files));
    vmm.done(Call::Start(Start::default()), &[]);
    assert_eq!(refused(vmm.call(plug(), &[])), invalid, "no descriptor");
    for _ in 0..2 {
        vmm.done(plug(), &[one.as_fd()]);
    }
    vmm.done(Call::Stop(Stop::default()), &[]);
    assert_eq!(
        vmm.stopped().reason.unwrap(),
        StopReason::STOP_REASON_REQUESTED
    );
    assert_eq!(vmm.ended(), (Some(0), None), "{}", vmm.log());
}

#[test]
fn a_paused_machine_can_be_stopped() {
    let _alone = alone();
    let Some(mut vmm) = running(spinning(), 1) else {
        return;
    };
    vmm.done(pause(), &[]);
    vmm.done(Call::Stop(Stop::default()), &[]);
    assert_eq!(
        vmm.stopped().reason.unwrap(),
        StopReason::STOP_REASON_REQUESTED
    );
    assert_eq!(vmm.ended(), (Some(0), None), "{}", vmm.log());
}

#[test]
fn the_guests_own_end_is_told() {
    let _alone = alone();
    let reset = guest! { "mov al, 0xfe", "out 0x64, al", "2: hlt", "jmp 2b" };
    let fault = guest! { "mov ecx, 0x70000000", "mov eax, [rcx]", "2: hlt", "jmp 2b" };
    for (code, how) in [(reset, "reset"), (fault, "triple fault")] {
        let Some(mut vmm) = running(elf(code, 0x1000), 1) else {
            return;
        };
        let stopped = vmm.stopped();
        assert_eq!(stopped.reason.unwrap(), StopReason::STOP_REASON_GUEST);
        assert_eq!(stopped.message, how);
        assert_eq!(vmm.ended(), (Some(0), None), "{}", vmm.log());
    }
}

#[test]
fn a_running_machine_ends_with_its_door() {
    let _alone = alone();
    let Some(mut vmm) = running(spinning(), 2) else {
        return;
    };
    vmm.control = memfd(0);
    assert_eq!(vmm.ended(), (Some(0), None), "{}", vmm.log());
}

/// The guest that this repository builds, if it is built.
pub fn built() -> Option<[File; 2]> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..");
    let directory = std::env::var_os("CELLA_LIBEXEC_DIR")
        .map_or_else(|| root.join("target/libexec"), PathBuf::from);
    let files = ["vmlinux", "initrd.cpio"].map(|name| File::open(directory.join(name)).ok());
    match files {
        [Some(kernel), Some(initrd)] => Some([kernel, initrd]),
        _ => {
            println!("SKIPPED: no guest in {}", directory.display());
            None
        }
    }
}

/// Connects to the guest's `port` and returns what the VMM says to it.
pub fn connect(vmm: &Vmm, port: &str) -> Vec<u8> {
    let mut stream = UnixStream::connect(vmm.sockets.path().join("listener")).unwrap();
    let patience = Some(Duration::from_secs(30));
    stream.set_read_timeout(patience).unwrap();
    stream
        .write_all(format!("CONNECT {port}\n").as_bytes())
        .unwrap();
    let mut answer = [0; 64];
    let len = stream.read(&mut answer).unwrap();
    answer[..len].to_vec()
}

#[test]
fn the_real_guest_boots_pauses_goes_on_and_stops() {
    let _alone = alone();
    let Some([kernel, initrd]) = built() else {
        return;
    };
    let Some(mut vmm) = Vmm::start() else { return };
    let Some(mut given) = Given::new(kernel) else {
        return;
    };
    given.configure.memory_bytes = 128 << 20;
    given.files[1] = memfd(128 << 20);
    given.configure.initrd_fd = Some(given.add(initrd));
    given.add_devices(vmm.sockets.path(), 2048);
    let door = UnixListener::bind(vmm.sockets.path().join(AGENT_PORT)).unwrap();
    door.set_nonblocking(true).unwrap();
    let open = Permissions::from_mode(0o666);
    std::fs::set_permissions(vmm.sockets.path().join(AGENT_PORT), open).unwrap();
    vmm.done(Call::Configure(given.configure), &fds(&given.files));
    vmm.done(Call::Start(Start::default()), &[]);
    // Its init calls us over vsock: kernel, drivers, agent and device work. A pause on the way must do no harm.
    let end = Instant::now() + Duration::from_secs(180);
    let call = loop {
        if let Ok((call, _)) = door.accept() {
            break call;
        }
        let stats = stats(&mut vmm);
        assert!(Instant::now() < end, "it does not boot: {stats}");
        std::thread::sleep(Duration::from_millis(200));
        vmm.done(pause(), &[]);
        vmm.done(resume(), &[]);
    };
    assert_eq!(connect(&vmm, AGENT_PORT)[..3], *b"OK ");
    assert_eq!(connect(&vmm, "4000"), b"", "nobody listens there");
    drop(call);
    let stats = stats(&mut vmm);
    assert!(stats.exits["mmio_read"] > 0 && stats.guest_rss_kib > 4096);
    assert!(stats.rss_kib < 32 << 10, "{} KiB", stats.rss_kib);
    vmm.done(Call::Stop(Stop::default()), &[]);
    let stopped = vmm.stopped();
    assert_eq!(stopped.reason.unwrap(), StopReason::STOP_REASON_REQUESTED);
    assert_eq!(vmm.ended(), (Some(0), None), "{}", vmm.log());
}
