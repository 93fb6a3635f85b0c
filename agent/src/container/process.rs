//! From an OCI `process` to `execve`: what init and exec processes have in common.

use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::sync::Arc;

use oci_spec::runtime as oci;

use super::capabilities::CapabilityPlan;
use super::command::{StringArray, c_string, candidates, environment};
use super::paths;
use super::report::{At, ChildResult, Failure, Message, Step, wait_for_agent};
use super::seccomp::SeccompPlan;
use super::sys::{self, Errno};
use super::terminal;
use super::validate::rlimit_number;
use super::{Error, Result, Stdio};

/// Where the standard streams come from.
#[derive(Debug)]
pub(super) enum StreamPlan {
    /// Descriptors for 0, 1 and 2; those that were given (not /dev/null) are made the user's.
    Files { fds: [OwnedFd; 3], given: [bool; 3] },
    /// A terminal in the container's own devpts, of this size (rows, columns).
    Terminal { size: Option<(u16, u16)> },
    /// The child has them; the agent's copies are closed, so that a stream ends when the container's end does.
    HandedOver,
}

impl StreamPlan {
    fn new(process: &oci::Process, stdio: Stdio) -> Result<Self> {
        if process.terminal().unwrap_or(false) {
            let size = stdio.size.or_else(|| {
                let size = process.console_size()?;
                Some((
                    u16::try_from(size.height()).ok()?,
                    u16::try_from(size.width()).ok()?,
                ))
            });
            return Ok(Self::Terminal { size });
        }
        let given = [
            stdio.stdin.is_some(),
            stdio.stdout.is_some(),
            stdio.stderr.is_some(),
        ];
        let null = || {
            rustix::fs::open(
                c"/dev/null",
                rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC,
                rustix::fs::Mode::empty(),
            )
            .map_err(|e| Error::Process {
                step: "opening /dev/null".into(),
                source: e.into(),
            })
        };
        let open = |stream: Option<OwnedFd>| stream.map_or_else(null, Ok);
        Ok(Self::Files {
            fds: [open(stdio.stdin)?, open(stdio.stdout)?, open(stdio.stderr)?],
            given,
        })
    }
}

/// Everything a process needs between its namespaces and `execve`, computed before the process exists.
#[derive(Debug)]
pub(super) struct ProcessPlan {
    /// `args[0]`, for errors.
    pub command: String,
    argv: StringArray,
    envp: StringArray,
    /// Where the command may be, in order.
    candidates: Vec<CString>,
    /// The agent's own binary, which no container may execute: device and inode.
    own_binary: (u64, u64),
    cwd: CString,
    pub uid: u32,
    pub gid: u32,
    groups: Vec<u32>,
    umask: u32,
    capabilities: CapabilityPlan,
    no_new_privileges: bool,
    seccomp: Option<Arc<SeccompPlan>>,
    /// Resource, soft, hard.
    rlimits: Vec<(i32, u64, u64)>,
    pub oom_score_adj: Option<CString>,
    io_priority: Option<u64>,
    personality: Option<u64>,
    pub streams: StreamPlan,
}

impl ProcessPlan {
    /// Computes it. `own_binary` is what /proc/self/exe of the agent is.
    pub(super) fn new(
        process: &oci::Process,
        seccomp: Option<Arc<SeccompPlan>>,
        personality: Option<u64>,
        own_binary: (u64, u64),
        stdio: Stdio,
    ) -> Result<Self> {
        let args = process.args().as_deref().unwrap_or_default();
        let command = match args.first() {
            Some(command) if !command.is_empty() => command.clone(),
            _ => return Err(Error::invalid("process.args", "is empty")),
        };
        let env = environment(process.env().as_deref().unwrap_or_default())?;
        let user = process.user();
        let rlimits = process
            .rlimits()
            .iter()
            .flatten()
            .map(|limit| (rlimit_number(limit.typ()), limit.soft(), limit.hard()))
            .collect();
        Ok(Self {
            candidates: candidates(&command, &env)?,
            command,
            argv: StringArray::new("process.args", args)?,
            envp: StringArray::new("process.env", &env)?,
            own_binary,
            cwd: c_string("process.cwd", process.cwd().as_os_str().as_bytes())?,
            uid: user.uid(),
            gid: user.gid(),
            groups: user.additional_gids().clone().unwrap_or_default(),
            umask: user.umask().unwrap_or(0o022) & 0o777,
            capabilities: CapabilityPlan::new(process.capabilities().as_ref()),
            no_new_privileges: process.no_new_privileges().unwrap_or(false),
            seccomp,
            rlimits,
            oom_score_adj: process
                .oom_score_adj()
                .map(|adj| c_string("process.oomScoreAdj", adj.to_string().as_bytes()))
                .transpose()?,
            io_priority: process
                .io_priority()
                .as_ref()
                .map(super::validate::io_priority),
            personality,
            streams: StreamPlan::new(process, stdio)?,
        })
    }

    /// Descriptors that must stay open in the child.
    pub(super) fn keep(&self, keep: &mut Vec<RawFd>) {
        if let StreamPlan::Files { fds, .. } = &self.streams {
            keep.extend(fds.iter().map(AsRawFd::as_raw_fd));
        }
    }

    /// In the agent, once the child has its copy: closes the streams.
    pub(super) fn release(&mut self) {
        self.streams = StreamPlan::HandedOver;
    }

    /// The working directory, for errors.
    pub(super) fn cwd(&self) -> PathBuf {
        PathBuf::from(std::ffi::OsString::from_vec(self.cwd.as_bytes().to_vec()))
    }

    /// Writes the process's own OOM score adjustment; needs the agent's /proc.
    pub(super) fn adjust_oom_score(&self) -> ChildResult {
        match &self.oom_score_adj {
            Some(adj) => {
                sys::write_file(c"/proc/self/oom_score_adj", adj.as_bytes()).at(Step::OomScore)
            }
            None => Ok(()),
        }
    }

    /// In the child, inside the container's namespaces and root, `terminal` being the slave if there is one: becomes
    /// the process. With `wait`, says that it is ready and waits for the start before it executes the command.
    pub(super) fn become_it(&self, socket: RawFd, terminal: Option<RawFd>, wait: bool) -> Failure {
        match self.prepare(socket, terminal) {
            Ok(path) => self.execute(path, socket, wait),
            Err(failure) => failure,
        }
    }

    fn prepare(&self, socket: RawFd, terminal: Option<RawFd>) -> ChildResult<&CStr> {
        self.set_streams(terminal)?;
        for (index, (resource, soft, hard)) in self.rlimits.iter().enumerate() {
            sys::setrlimit(*resource, *soft, *hard).at_index(Step::Rlimit, index)?;
        }
        sys::new_session_keyring().at_index(Step::Attributes, 2)?;
        if let Some(priority) = self.io_priority {
            set_io_priority(priority).at_index(Step::Attributes, 1)?;
        }
        // The socket takes descriptor 3 and everything above goes: no mount, cgroup or stream of the agent's stays
        // with a container.
        if socket != 3 {
            sys::dup_to(socket, 3, true).at(Step::Prepare)?;
        }
        sys::close_range(4, u32::MAX).at(Step::Prepare)?;
        // Without no_new_privs only a privileged process may load a filter, so it must be now.
        if !self.no_new_privileges {
            self.load_seccomp()?;
        }
        let entered = self.enter_cwd();
        self.become_user()?;
        // Some file systems let the user in where root is kept out.
        if entered.is_err() {
            sys::chdir(&self.cwd).at(Step::WorkingDirectory)?;
        }
        if !sys::cwd_is_inside().at(Step::WorkingDirectory)? {
            return Err(Errno(libc::EXDEV)).at(Step::WorkingDirectory);
        }
        if self.no_new_privileges {
            sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0).at(Step::NoNewPrivileges)?;
        }
        self.look_up().at(Step::Lookup)
    }

    fn execute(&self, path: &CStr, original: RawFd, wait: bool) -> Failure {
        let socket = if original == 3 { original } else { 3 };
        if wait {
            if let Err(failure) = Message::Ready.send(socket).at(Step::Prepare) {
                return failure;
            }
            wait_for_agent(socket);
        }
        let last = || -> ChildResult {
            sys::reset_signals().at_index(Step::Attributes, 3)?;
            if let Some(personality) = self.personality {
                set_personality(personality).at_index(Step::Attributes, 0)?;
            }
            if self.no_new_privileges {
                self.load_seccomp()?;
            }
            Ok(())
        };
        if let Err(failure) = last() {
            return failure;
        }
        let errno = sys::execve(path, self.argv.pointers(), self.envp.pointers());
        Failure {
            step: Step::Execute,
            index: 0,
            errno,
        }
    }

    fn set_streams(&self, terminal: Option<RawFd>) -> ChildResult {
        match (&self.streams, terminal) {
            (StreamPlan::Files { fds, given }, _) => {
                for (index, (fd, given)) in fds.iter().zip(given).enumerate() {
                    let target = RawFd::try_from(index).unwrap_or_default();
                    sys::dup_to(fd.as_raw_fd(), target, false).at_index(Step::Stdio, index)?;
                    if *given && self.uid != 0 {
                        // So that the user can open /dev/stdout again; not every file has an owner to change.
                        let _ = sys::chown_at(target, c"", self.uid, self.gid);
                    }
                }
            }
            (StreamPlan::Terminal { .. }, Some(slave)) => {
                terminal::make_controlling(slave, self.uid)?;
                for target in 0..3 {
                    sys::dup_to(slave, target, false)
                        .at_index(Step::Stdio, target.unsigned_abs() as usize)?;
                }
            }
            (StreamPlan::Terminal { .. }, None) | (StreamPlan::HandedOver, _) => {
                return Err(Errno(libc::ENXIO)).at(Step::Stdio);
            }
        }
        Ok(())
    }

    /// Enters the working directory, making it if it is missing, as Docker and runc do.
    fn enter_cwd(&self) -> ChildResult {
        match sys::chdir(&self.cwd) {
            Err(Errno(libc::ENOENT)) => {
                let root = sys::openat(libc::AT_FDCWD, c"/", libc::O_PATH | libc::O_DIRECTORY, 0)
                    .at(Step::WorkingDirectory)?;
                paths::ensure_directory(root, &self.cwd).at(Step::WorkingDirectory)?;
                sys::close(root);
                sys::chdir(&self.cwd).at(Step::WorkingDirectory)
            }
            other => other.at(Step::WorkingDirectory),
        }
    }

    fn become_user(&self) -> ChildResult {
        self.capabilities.drop_bounding()?;
        sys::setgroups(&self.groups).at(Step::Groups)?;
        // The process is root, as the agent is or of its user namespace.
        if self.gid != 0 {
            sys::setgid(self.gid).at(Step::Gid)?;
        }
        if self.uid != 0 {
            sys::prctl(libc::PR_SET_KEEPCAPS, 1, 0).at(Step::Capabilities)?;
            sys::setuid(self.uid).at(Step::Uid)?;
        }
        if self.uid != 0 || self.gid != 0 {
            // The change of ids may have made the process dumpable again.
            sys::prctl(libc::PR_SET_DUMPABLE, 0, 0).at(Step::Prepare)?;
        }
        self.capabilities.apply()?;
        sys::umask(self.umask);
        Ok(())
    }

    fn load_seccomp(&self) -> ChildResult {
        match &self.seccomp {
            Some(seccomp) => sys::load_seccomp(&seccomp.program, seccomp.flags).at(Step::Seccomp),
            None => Ok(()),
        }
    }

    /// Finds the command as a shell does: the first candidate that is a file and may be executed; else "permission
    /// denied" if any is there, else "not found".
    fn look_up(&self) -> Result<&CStr, Errno> {
        let mut verdict = Errno(libc::ENOENT);
        for candidate in &self.candidates {
            match self.may_execute(candidate) {
                Ok(()) => return Ok(candidate),
                Err(Errno(libc::ENOENT | libc::ENOTDIR)) => {}
                Err(errno) => verdict = errno,
            }
        }
        Err(verdict)
    }

    fn may_execute(&self, candidate: &CStr) -> Result<(), Errno> {
        let stat = sys::stat_at(libc::AT_FDCWD, candidate, 0)?;
        if stat.st_mode & libc::S_IFMT != libc::S_IFREG {
            return Err(Errno(libc::EACCES));
        }
        if (stat.st_dev, stat.st_ino) == self.own_binary {
            return Err(Errno(libc::EPERM));
        }
        sys::may_execute(candidate)
    }
}

fn set_io_priority(priority: u64) -> Result<(), Errno> {
    const IOPRIO_WHO_PROCESS: i32 = 1;
    // SAFETY: plain numbers.
    let result = unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, priority) };
    if result < 0 {
        Err(Errno(libc::EINVAL))
    } else {
        Ok(())
    }
}

fn set_personality(personality: u64) -> Result<(), Errno> {
    // SAFETY: a plain number.
    let result = unsafe { libc::syscall(libc::SYS_personality, personality) };
    if result < 0 {
        Err(Errno(libc::EINVAL))
    } else {
        Ok(())
    }
}
