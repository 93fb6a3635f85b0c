//! A `cella-vmm` process, driven as a door does it.

use std::fs::{File, Permissions};
use std::io::{Read, Seek};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cella_proto::vmm::{Reply, Request, Stopped, reply, request};
use protobuf::Message;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use rustix::process::{Pid, Signal, WaitOptions};

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_cella-vmm");

/// What a test waits for an answer or an end.
const PATIENCE: Duration = Duration::from_secs(30);

/// A user and group that nobody else on the machine has.
const ID: &str = "61234";

/// One process at a time: whatever is left over is this test's.
pub fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

pub struct Vmm {
    pub control: OwnedFd,
    pub pid: Pid,
    pub sockets: tempfile::TempDir,
    _share: tempfile::TempDir,
    log: File,
    next_id: u64,
    gone: bool,
}

impl Vmm {
    /// Starts one and waits until its jail is closed; nothing, and a word why, where that cannot be.
    pub fn start() -> Option<Self> {
        Self::start_with(&[])
    }

    /// As [`Self::start`], with more arguments.
    pub fn start_with(arguments: &[&str]) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: not root");
            return None;
        }
        // The process started ends once the jail is closed; the one inside becomes ours.
        rustix::process::set_child_subreaper(Some(rustix::process::getpid())).unwrap();
        let (control, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        let (pid_read, pid_write) =
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let (sockets, share) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let open = Permissions::from_mode(0o711);
        std::fs::set_permissions(sockets.path(), open).unwrap();
        let log = tempfile::tempfile().unwrap();
        let mut command = Command::new(PROGRAM);
        command
            .args(["--control", "3", "--pid-fd", "4", "--uid", ID, "--gid", ID])
            .args(["--name", "test", "--share"])
            .arg(share.path())
            .arg("--sockets")
            .arg(sockets.path())
            .args(arguments)
            .env_clear()
            .env("CELLA_SECCOMP_REPORT", "1")
            .stderr(log.try_clone().unwrap());
        let inherited = [theirs.as_raw_fd(), pid_write.as_raw_fd()];
        // SAFETY: only async-signal-safe calls between fork and exec.
        unsafe { command.pre_exec(move || inherit(inherited)) };
        let mut first = command.spawn().unwrap();
        drop((theirs, pid_write));
        let mut text = String::new();
        File::from(pid_read).read_to_string(&mut text).unwrap();
        assert!(first.wait().unwrap().success(), "{}", read(&log));
        let pid = Pid::from_raw(text.trim().parse().unwrap()).unwrap();
        Some(Self {
            control,
            pid,
            sockets,
            _share: share,
            log,
            next_id: 1,
            gone: false,
        })
    }

    /// Sends a packet as it is.
    pub fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let parts = [std::io::IoSlice::new(bytes)];
        rustix::net::sendmsg(&self.control, &parts, &mut ancillary, SendFlags::NOSIGNAL).unwrap();
    }

    /// The next packet: a reply or an event. Nothing at the end of the connection.
    #[track_caller]
    pub fn receive(&self) -> Option<Reply> {
        let mut fds = [PollFd::new(&self.control, PollFlags::IN)];
        let ready = poll(&mut fds, Some(&PATIENCE.try_into().unwrap())).unwrap();
        assert_eq!(ready, 1, "no answer; log: {}", self.log());
        let mut bytes = vec![0; 1 << 16];
        let flags = rustix::net::RecvFlags::empty();
        match rustix::net::recv(&self.control, &mut bytes[..], flags) {
            Ok((0, _)) | Err(rustix::io::Errno::CONNRESET) => None,
            Ok((len, _)) => Some(Reply::parse_from_bytes(&bytes[..len]).unwrap()),
            Err(error) => panic!("receiving: {error}"),
        }
    }

    /// Makes a request and returns the answer to it; events before it are left out.
    #[track_caller]
    pub fn call(&mut self, call: request::Call, fds: &[BorrowedFd<'_>]) -> reply::Body {
        let id = self.next_id;
        self.next_id += 1;
        let request = Request {
            id,
            call: Some(call),
            ..Request::default()
        };
        self.send(&request.write_to_bytes().unwrap(), fds);
        loop {
            let Some(reply) = self.receive() else {
                panic!("the VMM is gone; log: {}", self.log());
            };
            if reply.id == id {
                return reply.body.unwrap();
            }
            assert_eq!(reply.id, 0, "an answer to something else");
        }
    }

    #[track_caller]
    pub fn done(&mut self, call: request::Call, fds: &[BorrowedFd<'_>]) {
        match self.call(call, fds) {
            reply::Body::Done(_) => {}
            other => panic!("{other:?}; log: {}", self.log()),
        }
    }

    /// The event that the machine has stopped.
    #[track_caller]
    pub fn stopped(&self) -> Stopped {
        loop {
            match self.receive().and_then(|reply| reply.body) {
                Some(reply::Body::Stopped(stopped)) => return stopped,
                Some(_) => {}
                None => panic!("it went without a word; log: {}", self.log()),
            }
        }
    }

    /// Waits for the end of the process: its exit status, and the signal that ended it.
    #[track_caller]
    pub fn ended(&mut self) -> (Option<i32>, Option<i32>) {
        let end = Instant::now() + Duration::from_secs(2);
        loop {
            let waited = rustix::process::waitpid(Some(self.pid), WaitOptions::NOHANG).unwrap();
            if let Some((_, status)) = waited {
                self.gone = true;
                return (status.exit_status(), status.terminating_signal());
            }
            assert!(Instant::now() < end, "it does not end; {}", self.log());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub fn is_alive(&self) -> bool {
        rustix::process::test_kill_process(self.pid).is_ok()
    }

    /// What it wrote to its standard error.
    pub fn log(&self) -> String {
        read(&self.log)
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        if !self.gone {
            let _ = rustix::process::kill_process(self.pid, Signal::KILL);
            let _ = rustix::process::waitpid(Some(self.pid), WaitOptions::empty());
        }
        if !std::thread::panicking() {
            let left = rustix::process::waitpid(None, WaitOptions::NOHANG);
            assert_eq!(left.err(), Some(rustix::io::Errno::CHILD), "left behind");
            assert!(!self.log().contains("seccomp:"), "{}", self.log());
        }
    }
}

/// Puts the two descriptors at 3 and 4, to be inherited.
fn inherit(fds: [i32; 2]) -> std::io::Result<()> {
    // First out of the way of each other.
    let high = fds.map(|fd| {
        // SAFETY: no memory operands.
        unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 100) }
    });
    for (from, to) in high.into_iter().zip(3..) {
        // SAFETY: no memory operands.
        if from < 0 || unsafe { libc::dup2(from, to) } < 0 {
            return Err(std::io::Error::last_os_error());
        }
    }
    Ok(())
}

fn read(log: &File) -> String {
    let mut log = log.try_clone().unwrap();
    log.rewind().unwrap();
    let mut text = String::new();
    log.read_to_string(&mut text).unwrap();
    text
}

/// Borrows each of `files`.
pub fn fds<'a>(files: impl IntoIterator<Item = &'a OwnedFd>) -> Vec<BorrowedFd<'a>> {
    files.into_iter().map(AsFd::as_fd).collect()
}
