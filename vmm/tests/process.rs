//! The built `cella-vmm`, driven over its control socket: what it answers, and how it ends.
//!
//! It enters its jail, so this needs root; without it, or without `/dev/kvm`, the tests say so and return.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test"
)]

#[path = "common/kernel.rs"]
#[macro_use]
mod kernel;
#[path = "process/companion.rs"]
mod companion;
#[path = "process/configure.rs"]
mod configure;
#[path = "process/disk.rs"]
mod disk;
#[path = "process/guest.rs"]
mod guest;
#[path = "process/snapshot.rs"]
mod snapshot;
#[path = "process/vmm.rs"]
mod vmm;

use std::process::Command;

use cella_proto::vmm::{ErrorKind, GetStats, Pause, Request, Resume, Start, reply, request};
use protobuf::Message;
use request::Call;

use vmm::{PROGRAM, Vmm, alone, fds};

/// The kind of a refusal.
#[track_caller]
fn refused(body: reply::Body) -> ErrorKind {
    match body {
        reply::Body::Error(error) => {
            assert!(!error.message.is_empty() && !error.message.contains('\n'));
            error.kind.unwrap()
        }
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn the_command_line_is_explained_and_checked() {
    let _alone = alone();
    let run = |arguments: &[&str]| {
        let output = Command::new(PROGRAM).args(arguments).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8(text).unwrap())
    };
    let (success, text) = run(&["--help"]);
    assert!(success && text.contains("--control FD"), "{text}");
    let (success, text) = run(&["--version"]);
    assert!(success && text.contains(env!("CARGO_PKG_VERSION")));
    let all = "--control 3 --share / --sockets / --uid 1 --gid 1";
    for (arguments, what) in [
        (String::new(), "--control is missing"),
        ("--bogus 1".to_owned(), "--bogus is unknown"),
        ("--control".to_owned(), "lacks its value"),
        (all.replace("--control 3", "--control 2"), "--control 2"),
        (all.replace("--control 3", "--control -1"), "not a number"),
        (all.replace("--uid 1", "--uid x"), "not a number"),
        (all.replace("--gid 1", ""), "--gid is missing"),
        (format!("{all} --pid-fd 0"), "--pid-fd 0"),
        (format!("{all} --companion-fd 5"), "after --companion"),
        (
            format!("{all} --companion x --companion-fd 1"),
            "--companion-fd 1",
        ),
        (format!("{all} -- x"), "after --companion"),
    ] {
        let words: Vec<&str> = arguments.split_whitespace().collect();
        let (success, text) = run(&words);
        assert!(!success && text.contains(what), "{arguments}: {text}");
        assert_eq!(text.lines().count(), 1, "one line: {text}");
    }
}

#[test]
fn a_jail_for_root_is_refused() {
    let _alone = alone();
    let arguments = "--control 3 --share / --sockets / --uid 0 --gid 1";
    let output = Command::new(PROGRAM)
        .args(arguments.split(' '))
        .output()
        .unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && text.contains("must not be root's"));
}

#[test]
fn it_ends_with_its_door() {
    let _alone = alone();
    let Some(mut vmm) = Vmm::start() else { return };
    assert!(vmm.is_alive());
    let (closed, _) = rustix::net::socketpair(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::STREAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    vmm.control = closed;
    assert_eq!(vmm.ended(), (Some(0), None), "{}", vmm.log());
    assert_eq!(vmm.log(), "");
}

#[test]
fn it_can_be_killed() {
    let _alone = alone();
    let Some(mut vmm) = Vmm::start() else { return };
    rustix::process::kill_process(vmm.pid, rustix::process::Signal::KILL).unwrap();
    assert_eq!(vmm.ended(), (None, Some(libc::SIGKILL)));
}

#[test]
fn what_is_no_request_gets_one_answer_and_harms_nothing() {
    let _alone = alone();
    let Some(mut vmm) = Vmm::start() else { return };
    let request = Request {
        id: 7,
        call: Some(Call::GetStats(GetStats::default())),
        ..Request::default()
    };
    let whole = request.write_to_bytes().unwrap();
    let no_id = Request {
        id: 0,
        ..request.clone()
    };
    let null = std::fs::File::open("/dev/null").unwrap();
    let null = rustix::io::dup(&null).unwrap();
    let none = fds([]);
    let many = fds(std::iter::repeat_n(&null, 33));
    for (bytes, fds) in [
        (&b"\xff\xff\xff\xff"[..], &none),
        (&whole[..whole.len() - 1], &none),
        (&no_id.write_to_bytes().unwrap(), &none),
        (&vec![0; (64 << 10) + 1], &none),
        (&whole, &many),
    ] {
        vmm.send(bytes, fds);
        let reply = vmm.receive().unwrap();
        assert_eq!(reply.id, 0);
        let kind = refused(reply.body.unwrap());
        assert_eq!(kind, ErrorKind::ERROR_KIND_INVALID_ARGUMENT);
    }
    // A request for nothing keeps its id.
    let nothing = Request {
        id: 8,
        ..Request::default()
    };
    vmm.send(&nothing.write_to_bytes().unwrap(), &none);
    let reply = vmm.receive().unwrap();
    assert_eq!(reply.id, 8);
    let kind = refused(reply.body.unwrap());
    assert_eq!(kind, ErrorKind::ERROR_KIND_INVALID_ARGUMENT);
    // And after all that it answers.
    match vmm.call(Call::GetStats(GetStats::default()), &none) {
        reply::Body::Stats(stats) => {
            assert!(0 < stats.entered_us && stats.entered_us < stats.jailed_us);
            assert_eq!((stats.started_us, stats.guest_rss_kib), (0, 0));
            assert!(stats.rss_kib > 0);
        }
        other => panic!("{other:?}"),
    }
    drop(many);
}

#[test]
fn nothing_goes_before_configure() {
    let _alone = alone();
    let Some(mut vmm) = Vmm::start() else { return };
    for call in [
        Call::Start(Start::default()),
        Call::Pause(Pause::default()),
        Call::Resume(Resume::default()),
    ] {
        let kind = refused(vmm.call(call, &[]));
        assert_eq!(kind, ErrorKind::ERROR_KIND_FAILED_PRECONDITION);
    }
    vmm.done(Call::Stop(Default::default()), &[]);
    let stopped = vmm.stopped();
    let reason = cella_proto::vmm::StopReason::STOP_REASON_REQUESTED;
    assert_eq!(stopped.reason.unwrap(), reason);
    assert_eq!(vmm.ended(), (Some(0), None));
}
