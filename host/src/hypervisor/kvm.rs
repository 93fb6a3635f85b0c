//! Our own VMM on /dev/kvm: spawns the jailed `cella-vmm`, hands it opened files, and speaks `vmm.proto` with it.

use std::fs::{File, OpenOptions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use async_trait::async_trait;
use cella_proto::vmm::{Configure, Device, Fs, Net, Rng, Stats, Vsock, device};
use cella_proto::vmm::{Start, reply, request};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};

use super::channel::Channel;
use super::{Ended, Error, Hypervisor, Nic, Vm, VmSpec};

/// The guest's vsock address. Every guest has the same: no two share a host socket.
const GUEST_CID: u64 = 3;
/// File descriptors of the VMM at its start: the control socket, and the pipe on which it says its process id.
const CONTROL_FD: RawFd = 3;
const PID_FD: RawFd = 4;
/// VMMs run as users of this range, which no real account should be in; an id's hash chooses.
const FIRST_UID: u32 = 0x7000_0000;
const UIDS: u32 = 0x0800_0000;
/// How long a VMM may take to end after it was told to.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// The hypervisor of this module.
pub struct Kvm;

/// One running cella-vmm.
struct KvmVm {
    channel: Channel,
    pid: u32,
    pidfd: OwnedFd,
}

#[async_trait]
impl Hypervisor for Kvm {
    fn name(&self) -> &'static str {
        "kvm"
    }

    async fn boot(&self, spec: VmSpec) -> Result<Box<dyn Vm>, Error> {
        let files = Files::open(&spec)?;
        let (vm, console) = spawn(&spec)?;
        let configure = configure(&spec);
        vm.channel
            .call(
                request::Call::Configure(configure),
                &files.descriptors(console.as_ref(), &spec.nics),
            )
            .await?;
        vm.channel
            .call(request::Call::Start(Start::default()), &[])
            .await?;
        Ok(Box::new(vm))
    }
}

#[async_trait]
impl Vm for KvmVm {
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

impl Drop for KvmVm {
    fn drop(&mut self) {
        kill(self.pidfd.as_fd());
        reap(self.pidfd.as_fd());
    }
}

/// Files that the VMM gets opened, because its jail can open none.
struct Files {
    kvm: File,
    memory: OwnedFd,
    kernel: File,
    initrd: File,
    listener: UnixListener,
}

impl Files {
    fn open(spec: &VmSpec) -> Result<Self, Error> {
        let kvm = open_kvm()?;
        let kernel = open("opening the guest kernel", &spec.kernel)?;
        let initrd = open("opening the guest image", &spec.initrd)?;
        let memory = guest_memory(spec)?;
        let listener = UnixListener::bind(&spec.vsock)
            .map_err(|e| Error::host(format!("binding {}", spec.vsock.display()), e))?;
        Ok(Self {
            kvm,
            memory,
            kernel,
            initrd,
            listener,
        })
    }

    /// In the order of the indexes that [`configure`] gives.
    fn descriptors<'a>(
        &'a self,
        console: Option<&'a File>,
        nics: &'a [Nic],
    ) -> Vec<BorrowedFd<'a>> {
        let mut fds = vec![
            self.kvm.as_fd(),
            self.memory.as_fd(),
            self.kernel.as_fd(),
            self.initrd.as_fd(),
            self.listener.as_fd(),
        ];
        fds.extend(console.map(AsFd::as_fd));
        fds.extend(nics.iter().map(|nic| nic.tap.as_fd()));
        fds
    }
}

/// Opens /dev/kvm for a virtual machine.
///
/// # Errors
/// [`Error::Missing`] with the system's reason: there is none, or no right to it.
pub fn open_kvm() -> Result<File, Error> {
    let path = Path::new("/dev/kvm");
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map_err(|source| Error::Missing {
            what: "opening",
            path: path.into(),
            source,
        })
}

fn open(what: &'static str, path: &Path) -> Result<File, Error> {
    File::open(path).map_err(|source| Error::Missing {
        what,
        path: path.into(),
        source,
    })
}

/// Guest RAM: a memfd, so that it can be shared and saved; of a fixed size, so that nobody can shrink it under
/// a mapping.
fn guest_memory(spec: &VmSpec) -> Result<OwnedFd, Error> {
    let action = || format!("making {} bytes of guest memory", spec.memory_bytes);
    let memfd = rustix::fs::memfd_create(
        "cella-guest-memory",
        MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
    )
    .map_err(|e| Error::host(action(), e))?;
    rustix::fs::ftruncate(&memfd, spec.memory_bytes).map_err(|e| Error::host(action(), e))?;
    rustix::fs::fcntl_add_seals(
        &memfd,
        SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL,
    )
    .map_err(|e| Error::host(action(), e))?;
    Ok(memfd)
}

/// The indexes are those of [`Files::descriptors`].
fn configure(spec: &VmSpec) -> Configure {
    let device = |device| Device {
        device: Some(device),
        ..Default::default()
    };
    let console_fd = spec.console.as_ref().map(|_| 5);
    let first_nic = 5 + u32::from(console_fd.is_some());
    let nics = (first_nic..).zip(&spec.nics).map(|(tap_fd, nic)| {
        device(device::Device::Net(Net {
            tap_fd,
            mac: nic.mac.to_vec(),
            mtu: nic.mtu.into(),
            ..Default::default()
        }))
    });
    Configure {
        kvm_fd: 0,
        memory_fd: 1,
        memory_bytes: spec.memory_bytes,
        vcpus: spec.vcpus,
        kernel_fd: 2,
        initrd_fd: Some(3),
        cmdline: spec.cmdline.clone(),
        devices: [
            device(device::Device::Vsock(Vsock {
                guest_cid: GUEST_CID,
                listener_fd: 4,
                ..Default::default()
            })),
            device(device::Device::Fs(Fs {
                tag: "share".into(),
                ..Default::default()
            })),
            device(device::Device::Rng(Rng::default())),
        ]
        .into_iter()
        .chain(nics)
        .collect(),
        console_fd,
        ..Default::default()
    }
}

/// Starts the VMM, which jails itself before it reads its first request.
fn spawn(spec: &VmSpec) -> Result<(KvmVm, Option<File>), Error> {
    let action = || format!("starting {}", spec.vmm.display());
    let console = match &spec.console {
        Some(file) => Some(file.try_clone().map_err(|e| Error::host(action(), e))?),
        None => None,
    };
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
    let mut first = command(spec, theirs.as_raw_fd(), pid_write.as_raw_fd())
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
    Ok((
        KvmVm {
            channel,
            pid,
            pidfd,
        },
        console,
    ))
}

fn command(spec: &VmSpec, control: RawFd, pid: RawFd) -> Command {
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
    // SAFETY: between fork and exec only async-signal-safe calls are made: fcntl and dup2 on descriptors that
    // the parent keeps open until the spawn has returned.
    unsafe {
        command.pre_exec(move || inherit(&[(control, CONTROL_FD), (pid, PID_FD)]));
    }
    command
}

/// Puts each descriptor at its number, inheritable; also when one stands on another's number.
fn inherit(moves: &[(RawFd, RawFd)]) -> io::Result<()> {
    const CLEAR: RawFd = 16;
    let mut safe = [-1; 2];
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
