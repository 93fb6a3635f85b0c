//! A VMM whose machine a companion runs: the companion's life, as the door sees it. What stands in for the hypervisor
//! here speaks no vhost-user.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use cella_proto::vmm::{
    Configure, Device, ErrorKind, Fs, GetStats, Pause, Resume, Start, Stop, StopReason, Vsock,
    device, reply,
};
use rustix::process::Signal;

use crate::Call;
use crate::refused;
use crate::vmm::{Vmm, alone, fds};

/// A VMM with `/bin/busybox` or the like for its companion, started with the ends of two devices' sockets.
struct Beside {
    vmm: Vmm,
    /// What a hypervisor would hold.
    peers: Vec<UnixStream>,
}

impl Beside {
    fn start(companion: &[&str]) -> Option<Self> {
        Self::start_with(&[], companion)
    }

    fn start_with(options: &[&str], companion: &[&str]) -> Option<Self> {
        let (program, arguments) = companion.split_first().unwrap();
        let mut words = vec!["--companion", program];
        words.extend(options);
        words.push("--");
        words.extend(arguments);
        let mut vmm = Vmm::start_with(&words)?;
        let (ours, peers): (Vec<_>, Vec<_>) = (0..2).map(|_| UnixStream::pair().unwrap()).unzip();
        let listener = UnixListener::bind(vmm.sockets.path().join("listener")).unwrap();
        let mut files: Vec<OwnedFd> = vec![listener.into()];
        files.extend(ours.into_iter().map(OwnedFd::from));
        let device = |device, socket| Device {
            device: Some(device),
            vhost_user_fd: Some(socket),
            ..Device::default()
        };
        let vsock = device::Device::Vsock(Vsock {
            guest_cid: 3,
            listener_fd: 0,
            ..Vsock::default()
        });
        let share = device::Device::Fs(Fs {
            tag: "share".into(),
            ..Fs::default()
        });
        let configure = Configure {
            devices: vec![device(vsock, 1), device(share, 2)],
            ..Configure::default()
        };
        vmm.done(Call::Configure(configure), &fds(&files));
        Some(Self { vmm, peers })
    }

    fn companion(&self) -> u32 {
        let pid = self.vmm.pid.as_raw_nonzero();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        children.trim().parse().unwrap()
    }

    #[track_caller]
    fn failed(&self, word: &str) {
        let stopped = self.vmm.stopped();
        assert_eq!(stopped.reason, StopReason::STOP_REASON_FAILURE.into());
        assert!(stopped.message.contains(word), "{}", stopped.message);
    }
}

/// The state of a process as proc(5) has it.
fn state(pid: u32) -> char {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let (_, rest) = stat.rsplit_once(')').unwrap();
    rest.trim_start().chars().next().unwrap()
}

#[track_caller]
fn gone(pid: u32) {
    let end = Instant::now() + Duration::from_secs(5);
    while Path::new(&format!("/proc/{pid}")).exists() {
        assert!(Instant::now() < end, "{pid} is still there");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_companion_is_paused_continued_and_ended() {
    let _alone = alone();
    let Some(mut beside) = Beside::start(&["/bin/sleep", "1000"]) else {
        return;
    };
    let companion = beside.companion();
    let vmm = &mut beside.vmm;
    let wrong = ErrorKind::ERROR_KIND_FAILED_PRECONDITION;
    assert_eq!(refused(vmm.call(Call::Pause(Pause::default()), &[])), wrong);
    vmm.done(Call::Start(Start::default()), &[]);
    assert_eq!(refused(vmm.call(Call::Start(Start::default()), &[])), wrong);
    assert_eq!(
        refused(vmm.call(Call::Resume(Resume::default()), &[])),
        wrong
    );
    for _ in 0..3 {
        vmm.done(Call::Pause(Pause::default()), &[]);
        assert_eq!(state(companion), 'T');
        assert_eq!(refused(vmm.call(Call::Pause(Pause::default()), &[])), wrong);
        vmm.done(Call::Resume(Resume::default()), &[]);
        assert_ne!(state(companion), 'T');
    }
    match vmm.call(Call::GetStats(GetStats::default()), &[]) {
        reply::Body::Stats(stats) => assert!(stats.rss_kib > 100 && stats.started_us > 0),
        other => panic!("{other:?}"),
    }
    vmm.done(Call::Pause(Pause::default()), &[]);
    vmm.done(Call::Stop(Stop::default()), &[]);
    let stopped = vmm.stopped();
    assert_eq!(stopped.reason, StopReason::STOP_REASON_REQUESTED.into());
    assert_eq!(vmm.ended(), (Some(0), None), "{}", vmm.log());
    gone(companion);
}

#[test]
fn its_death_is_told_with_its_last_words() {
    let _alone = alone();
    let said = "echo first; echo the last >&2; exit 3";
    for (companion, words) in [
        (&["/bin/true"][..], "before the guest had used a device"),
        (&["/bin/sh", "-c", said], "status 3: the last"),
        (&["/bin/sh", "-c", "kill -SEGV $$"], "signal 11"),
        (&["/bin/no-such-program"], "/bin/no-such-program"),
        (&["/etc/ld.so.cache"], "/etc/ld.so.cache: Permission denied"),
    ] {
        let Some(mut beside) = Beside::start(companion) else {
            return;
        };
        beside.failed(words);
        assert_eq!(beside.vmm.ended(), (Some(0), None), "{}", beside.vmm.log());
    }
}

#[test]
fn its_files_are_copies_that_it_cannot_change() {
    let _alone = alone();
    let mut file = tempfile::NamedTempFile::new().unwrap();
    std::io::Write::write_all(&mut file, b"the content").unwrap();
    let path = file.path().to_str().unwrap();
    let script = "echo x > /boot/kernel || echo x > /boot/new || rm -f /boot/initrd || \
        { cat /boot/kernel >&2; exit 3; }";
    let options = ["--companion-kernel", path, "--companion-initrd", path];
    let Some(beside) = Beside::start_with(&options, &["/bin/sh", "-c", script]) else {
        return;
    };
    beside.failed("status 3: the content");
    assert_eq!(fs::read(file.path()).unwrap(), b"the content");
}

#[test]
fn a_companion_that_hangs_up_is_ended() {
    let _alone = alone();
    for device in ["vsock", "fs"] {
        let Some(mut beside) = Beside::start(&["/bin/sleep", "1000"]) else {
            return;
        };
        let companion = beside.companion();
        let which = usize::from(device == "fs");
        drop(beside.peers.remove(which));
        beside.failed(&format!("closed the connection of device {device}"));
        assert_eq!(beside.vmm.ended(), (Some(0), None), "{}", beside.vmm.log());
        gone(companion);
    }
}

#[test]
fn nothing_outlives_the_vmm() {
    let _alone = alone();
    let Some(mut beside) = Beside::start(&["/bin/sh", "-c", "sleep 1000 & sleep 1000"]) else {
        return;
    };
    let companion = beside.companion();
    rustix::process::kill_process(beside.vmm.pid, Signal::KILL).unwrap();
    assert_eq!(beside.vmm.ended(), (None, Some(9)));
    gone(companion);
}

#[test]
fn a_device_without_a_socket_is_refused() {
    let _alone = alone();
    let Some(mut vmm) = Vmm::start_with(&["--companion", "/bin/sleep", "--", "1000"]) else {
        return;
    };
    let socket = UnixStream::pair().unwrap().0;
    let configure = Configure {
        devices: vec![Device {
            device: Some(device::Device::Fs(Fs {
                tag: "share".into(),
                ..Fs::default()
            })),
            ..Device::default()
        }],
        ..Configure::default()
    };
    let kind = refused(vmm.call(Call::Configure(configure), &[socket.as_fd()]));
    assert_eq!(kind, ErrorKind::ERROR_KIND_INVALID_ARGUMENT);
}
