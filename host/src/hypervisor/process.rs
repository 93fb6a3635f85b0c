//! A cella-vmm process: spawned with its jail's flags, driven over `vmm.proto`, killed and reaped.

use std::ffi::OsString;
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use async_trait::async_trait;
use cella_proto::vmm::{Configure, Plug, Snapshot, Start, Stats, reply, request};
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};

use super::channel::Channel;
use super::mounts::{self, Mounted};
use super::{Ended, Error, HandedVm, SavedVm, Vm, VmSpec};

/// The guest's vsock address. Every guest has the same: no two share a host socket.
pub(super) const GUEST_CID: u64 = 3;
/// The tag under which the guest mounts its shared directory.
pub(super) const SHARE_TAG: &str = "share";
/// File descriptors of the VMM at its start: the control socket, and the pipe on which it says its process id.
const CONTROL_FD: RawFd = 3;
const PID_FD: RawFd = 4;
/// VMMs run as users of this range, which no real account should be in; an id's hash chooses.
const FIRST_UID: u32 = 0x7000_0000;
const UIDS: u32 = 0x0800_0000;
/// How long a VMM may take to end after it was told to.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// The first of the descriptors that [`spawn`]'s caller adds.
pub(super) const FIRST_FD: RawFd = 5;

/// One running cella-vmm.
pub(super) struct VmmProcess {
    channel: Channel,
    pid: u32,
    pidfd: OwnedFd,
    /// It is another's by now: its end is not this one's.
    handed_over: bool,
}

#[async_trait]
impl Vm for VmmProcess {
    fn pid(&self) -> u32 {
        self.pid
    }

    async fn pause(&self) -> Result<(), Error> {
        let call = request::Call::Pause(Default::default());
        self.channel.call(call, &[]).await.map(drop)
    }

    async fn resume(&self) -> Result<(), Error> {
        let call = request::Call::Resume(Default::default());
        self.channel.call(call, &[]).await.map(drop)
    }

    async fn stop(&self) -> Result<(), Error> {
        let call = request::Call::Stop(Default::default());
        let asked = self.channel.call(call, &[]);
        // A VMM that neither answers nor ends is killed: nothing of the guest is lost by it.
        let ended = async {
            let _ = asked.await;
            self.channel.ended().await
        };
        if tokio::time::timeout(STOP_TIMEOUT, ended).await.is_err() {
            kill(self.pidfd.as_fd());
            self.channel.ended().await;
        }
        reap(self.pidfd.as_fd());
        Ok(())
    }

    async fn wait(&self) -> Ended {
        self.channel.ended().await
    }

    async fn snapshot(&self, files: &SavedVm) -> Result<(), Error> {
        let snapshot = Snapshot {
            state_fd: 0,
            memory_fd: 1,
            ..Default::default()
        };
        let fds = [files.state.as_fd(), files.memory.as_fd()];
        let call = request::Call::Snapshot(snapshot);
        self.channel.call(call, &fds).await.map(drop)
    }

    async fn plug(&self, tap: BorrowedFd<'_>) -> Result<(), Error> {
        let call = request::Call::Plug(Plug::default());
        self.channel.call(call, &[tap]).await.map(drop)
    }

    fn hand_over(mut self: Box<Self>) -> Option<HandedVm> {
        let pidfd = self.pidfd.try_clone().ok()?;
        let control = self.channel.give_away().ok()?;
        self.handed_over = true;
        Some(HandedVm {
            control,
            pidfd,
            pid: self.pid,
        })
    }

    async fn stats(&self) -> Result<Stats, Error> {
        let call = request::Call::GetStats(Default::default());
        match self.channel.call(call, &[]).await? {
            reply::Body::Stats(mut stats) => {
                if let Some(started_us) = self.channel.started_us() {
                    stats.started_us = started_us;
                }
                Ok(stats)
            }
            _ => Err(Error::host(
                "asking the VMM for its statistics",
                io::Error::other("it answered something else"),
            )),
        }
    }
}

impl Drop for VmmProcess {
    fn drop(&mut self) {
        if self.handed_over {
            return;
        }
        kill(self.pidfd.as_fd());
        reap(self.pidfd.as_fd());
    }
}

pub(super) fn open(what: &'static str, path: &Path) -> Result<File, Error> {
    File::open(path).map_err(|source| Error::Missing {
        what,
        path: path.into(),
        source,
    })
}

/// Starts the VMM, which jails itself before it reads its first request. It is given `arguments` beside its own, and
/// `fds` under the numbers from [`FIRST_FD`] on.
pub(super) fn spawn(
    spec: &VmSpec,
    arguments: &[OsString],
    fds: &[BorrowedFd<'_>],
) -> Result<VmmProcess, Error> {
    let action = || format!("starting {}", spec.vmm.display());
    // The VMM's first process ends when the jail is closed; its child must become ours, not init's.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .map_err(|e| Error::host(action(), e))?;
    let (ours, theirs) = rustix::net::socketpair(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::SEQPACKET,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .map_err(|e| Error::host(action(), e))?;
    let (pid_read, pid_write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .map_err(|e| Error::host(action(), e))?;
    let mut moves = vec![
        (theirs.as_raw_fd(), CONTROL_FD),
        (pid_write.as_raw_fd(), PID_FD),
    ];
    moves.extend((FIRST_FD..).zip(fds).map(|(to, fd)| (fd.as_raw_fd(), to)));
    let mut first = command(spec, moves)
        .args(arguments)
        .spawn()
        .map_err(|source| Error::Missing {
            what: "starting the VMM",
            path: spec.vmm.clone(),
            source,
        })?;
    drop((theirs, pid_write));
    let mut text = String::new();
    let read = File::from(pid_read).read_to_string(&mut text);
    let status = first.wait().map_err(|e| Error::host(action(), e))?;
    read.map_err(|e| Error::host(action(), e))?;
    let Some(pid) = text.trim().parse().ok().and_then(Pid::from_raw) else {
        return Err(Error::Refused {
            id: spec.id.clone(),
            kind: crate::error::ErrorKind::FailedPrecondition,
            message: format!(
                "it ended before its jail was closed ({status}); see its message above"
            ),
        });
    };
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())
        .map_err(|e| Error::host(action(), e))?;
    let channel = Channel::new(&spec.id, ours).map_err(|e| Error::host(action(), e))?;
    let pid = pid.as_raw_nonzero().get().unsigned_abs();
    Ok(VmmProcess {
        channel,
        pid,
        pidfd,
        handed_over: false,
    })
}

/// Owns the VMM that another process has handed over. It stays that one's child.
pub(super) fn take_over(id: &str, handed: HandedVm) -> Result<VmmProcess, Error> {
    let channel = Channel::new(id, handed.control)
        .map_err(|e| Error::host(format!("taking the VMM of {id} over"), e))?;
    Ok(VmmProcess {
        channel,
        pid: handed.pid,
        pidfd: handed.pidfd,
        handed_over: false,
    })
}

impl VmmProcess {
    /// Has the VMM make its machine, of `configure` with `fds`, and run it.
    pub(super) async fn boot(
        &self,
        configure: Configure,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), Error> {
        let configure = request::Call::Configure(configure);
        self.channel.call(configure, fds).await?;
        let start = request::Call::Start(Start::default());
        self.channel.call(start, &[]).await.map(drop)
    }

    /// Mounts what the VMM alone sees.
    pub(super) fn mount(&self, mounts: &[Mounted]) -> Result<(), Error> {
        mounts::attach(self.pidfd.as_fd(), mounts)
            .map_err(|e| Error::host(format!("mounting for the VMM, process {}", self.pid), e))
    }
}

fn command(spec: &VmSpec, moves: Vec<(RawFd, RawFd)>) -> Command {
    let mut hasher = DefaultHasher::new();
    spec.id.hash(&mut hasher);
    let uid = FIRST_UID + (hasher.finish() % u64::from(UIDS)) as u32;
    let mut command = Command::new(&spec.vmm);
    command
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .current_dir("/")
        .arg("--control")
        .arg(CONTROL_FD.to_string())
        .arg("--pid-fd")
        .arg(PID_FD.to_string())
        .arg("--share")
        .arg(&spec.share)
        .arg("--sockets")
        .arg(&spec.sockets)
        .args(["--uid", &uid.to_string(), "--gid", &uid.to_string()])
        .args(["--name", &spec.id]);
    let mut safe = vec![-1; moves.len()];
    // SAFETY: between fork and exec only async-signal-safe calls are made: fcntl and dup2 on descriptors that
    // the parent keeps open until the spawn has returned.
    unsafe {
        command.pre_exec(move || inherit(&moves, &mut safe));
    }
    command
}

/// Puts each descriptor at its number, inheritable; also when one stands on another's number. `safe` has room for as
/// many.
fn inherit(moves: &[(RawFd, RawFd)], safe: &mut [RawFd]) -> io::Result<()> {
    const CLEAR: RawFd = 64;
    for (slot, (from, _)) in safe.iter_mut().zip(moves) {
        // SAFETY: F_DUPFD makes a new descriptor and touches no memory.
        *slot = unsafe { libc::fcntl(*from, libc::F_DUPFD_CLOEXEC, CLEAR) };
        if *slot < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    for (from, (_, to)) in safe.iter().zip(moves) {
        // SAFETY: dup2 replaces `to`, which nothing in this child uses before exec.
        let made = unsafe { libc::dup2(*from, *to) };
        if made < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

fn kill(pidfd: BorrowedFd<'_>) {
    // ESRCH: it has ended already.
    let _ = rustix::process::pidfd_send_signal(pidfd, Signal::KILL);
}

/// Takes the exit status, so that no zombie stays. A VMM that was told to end does so within milliseconds.
fn reap(pidfd: BorrowedFd<'_>) {
    let _ = rustix::process::waitid(WaitId::PidFd(pidfd), WaitIdOptions::EXITED);
}
