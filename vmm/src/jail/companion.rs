//! A hypervisor that is not ours, in a room beside: a child of the jailed process, in its namespaces but under a root of
//! its own, unprivileged from before it is executed.
//!
//! The jailed process is process 1 of the pid namespace that both are in: when it ends, whoever ended it, the kernel
//! ends the companion. Nobody has to look after that.

use std::convert::Infallible;
use std::ffi::{CString, OsString};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::thread::UnshareFlags;

use super::error::{Doing, check};
use super::{Copies, JailError, identity, landlock, process, root};

/// What the companion is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Program {
    /// Its executable, an absolute path on the host. It finds that, its directory and the host's libraries in its
    /// root, read-only.
    pub path: PathBuf,
    /// Its arguments, without its name.
    pub arguments: Vec<OsString>,
    /// Files of the host, of which it finds copies under these names in `/boot`, until it has read them.
    pub files: Vec<(PathBuf, String)>,
    /// The descriptors that it inherits under their numbers, beside 0 to 2. This process closes them.
    pub fds: Vec<RawFd>,
}

/// The running companion.
#[derive(Debug)]
pub struct Companion {
    /// Readable when it has ended.
    pub pidfd: OwnedFd,
    /// What it writes to its standard streams. Nonblocking.
    pub output: OwnedFd,
    /// Its files.
    pub copies: Copies,
}

/// Starts `program` as user `uid` and group `gid`. The caller is process 1 of its namespaces and has one thread.
pub(super) fn spawn(program: &Program, uid: u32, gid: u32) -> Result<Companion, JailError> {
    let action = || format!("starting {}", program.path.display());
    let (output, its_output) = pipe_with(PipeFlags::CLOEXEC).doing("making a pipe")?;
    let (apart, is_apart) = pipe_with(PipeFlags::CLOEXEC).doing("making a pipe")?;
    let (copies, boot) = Copies::make(&program.files)?;
    // SAFETY: this is the only thread, so the child may do all that the parent may.
    let child = check(unsafe { libc::fork() }).doing(action())?;
    if child == 0 {
        let Err(error) = become_program(program, boot, its_output, is_apart, uid, gid);
        eprintln!("{error}");
        // SAFETY: ends this process without running exit handlers, which are the parent's.
        unsafe { libc::_exit(127) };
    }
    drop((its_output, is_apart, boot));
    // A root that this process changes to would become the child's too, as long as they share a mount namespace.
    rustix::io::read(&apart, &mut [0_u8]).doing(action())?;
    for &fd in &program.fds {
        // SAFETY: the descriptors were given for the companion alone; nothing in this process owns them.
        unsafe { libc::close(fd) };
    }
    rustix::io::ioctl_fionbio(&output, true).doing(action())?;
    let pid = Pid::from_raw(child)
        .ok_or(io::ErrorKind::NotFound)
        .doing(action())?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).doing(action())?;
    Ok(Companion {
        pidfd,
        output,
        copies,
    })
}

/// What the child does: it returns only if it cannot become the program.
fn become_program(
    program: &Program,
    boot: OwnedFd,
    output: OwnedFd,
    is_apart: OwnedFd,
    uid: u32,
    gid: u32,
) -> Result<Infallible, JailError> {
    // SAFETY: no file descriptor table is unshared, and this process has one thread.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }
        .doing("making a mount namespace for the companion")?;
    drop(is_apart);
    for stream in [1, 2] {
        // SAFETY: dup2 has no memory operands; nothing here owns descriptors 1 and 2.
        check(unsafe { libc::dup2(output.as_raw_fd(), stream) })
            .doing("giving the companion its standard streams")?;
    }
    drop(output);
    let kept = program.fds.iter().copied();
    process::keep_descriptors(kept.chain([boot.as_raw_fd()]))?;
    for &fd in &program.fds {
        // SAFETY: F_SETFD has no memory operands.
        check(unsafe { libc::fcntl(fd, libc::F_SETFD, 0) })
            .doing(format!("letting the companion inherit descriptor {fd}"))?;
    }
    root::build_for(program, boot)?;
    identity::forbid_new_privileges()?;
    landlock::restrict_companion()?;
    identity::become_unprivileged(uid, gid, false)?;
    let text = |text: &[u8]| {
        CString::new(text).map_err(|_| JailError::Invalid("an argument has a zero byte".into()))
    };
    let path = text(program.path.as_os_str().as_bytes())?;
    let mut arguments = vec![path.clone()];
    for argument in &program.arguments {
        arguments.push(text(argument.as_bytes())?);
    }
    let mut pointers: Vec<_> = arguments.iter().map(|text| text.as_ptr()).collect();
    pointers.push(std::ptr::null());
    let environment = [std::ptr::null()];
    // SAFETY: path and arrays are terminated and outlive the call.
    unsafe { libc::execve(path.as_ptr(), pointers.as_ptr(), environment.as_ptr()) };
    Err(io::Error::last_os_error()).doing(format!("executing {}", program.path.display()))
}
