//! Descriptors, environment, limits, the namespaces and the fork into them.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::fs::{FileType, Mode, OFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::thread::UnshareFlags;

use super::error::{Doing, check as check_call};
use super::{Jail, JailError};

/// Descriptors of a VMM that serves files: one for each inode that the guest's kernel remembers.
const FILES_WITH_SHARE: u64 = 1_048_576;
/// Descriptors of one that does not: the devices' and a vsock connection each.
const FILES: u64 = 8_192;
/// Threads: 32 vCPUs, main, the file server, block devices, and those that KVM makes in our name.
const THREADS: u64 = 256;

/// Refuses what would leave a way out.
pub(super) fn check(jail: &Jail) -> Result<(), JailError> {
    if jail.uid == 0 || jail.gid == 0 {
        return Err(JailError::Invalid(format!(
            "user {} and group {} must not be root's",
            jail.uid, jail.gid
        )));
    }
    for fd in jail.keep_fds.iter().copied().chain(jail.pid_fd) {
        if fd < 0 {
            return Err(JailError::Invalid(format!("{fd} is no descriptor")));
        }
        // SAFETY: used for one fstat(2), which fails of a closed descriptor.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
        let stat =
            rustix::fs::fstat(borrowed).doing(format!("looking at the descriptor {fd} to keep"))?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            return Err(JailError::Invalid(format!(
                "descriptor {fd} is a directory: a way out of the private root"
            )));
        }
    }
    Ok(())
}

/// Closes every descriptor that is not to be kept, and puts `/dev/null` in the place of standard streams that are not.
pub(super) fn close_other_descriptors(jail: &Jail) -> Result<(), JailError> {
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .doing("opening /dev/null")?;
    for stream in 0..=2 {
        if !jail.keep_fds.contains(&stream) && jail.pid_fd != Some(stream) {
            // SAFETY: dup2 has no memory operands; nothing here owns descriptors 0 to 2.
            check_call(unsafe { libc::dup2(null.as_raw_fd(), stream) })
                .doing(format!("putting /dev/null in the place of stream {stream}"))?;
        }
    }
    drop(null);
    keep_descriptors(jail.keep_fds.iter().copied().chain(jail.pid_fd))
}

/// Closes every descriptor but 0 to 2 and those of `kept`.
pub(super) fn keep_descriptors(kept: impl Iterator<Item = RawFd>) -> Result<(), JailError> {
    let mut kept: Vec<u32> = kept
        .chain(0..=2)
        .filter_map(|fd| u32::try_from(fd).ok())
        .collect();
    kept.sort_unstable();
    let mut first = 0;
    for fd in kept {
        if first < fd {
            close_range(first, fd.saturating_sub(1))?;
        }
        first = fd.saturating_add(1);
    }
    close_range(first, u32::MAX)
}

fn close_range(first: u32, last: u32) -> Result<(), JailError> {
    // SAFETY: no memory operands. The caller is at the start of `main` and owns no other descriptor.
    check_call(unsafe { libc::close_range(first, last, 0) })
        .map(drop)
        .doing(format!("closing descriptors {first} to {last}"))
}

/// Empties the environment, and overwrites what it was: it may hold the caller's secrets.
pub(super) fn clear_environment() {
    unsafe extern "C" {
        static environ: *const *mut libc::c_char;
    }
    // SAFETY: the only thread walks its own environment: a null-terminated array of writable, terminated strings.
    unsafe {
        let mut entry = environ;
        while !entry.is_null() && !(*entry).is_null() {
            let text = *entry;
            text.write_bytes(0, libc::strlen(text));
            entry = entry.add(1);
        }
        libc::clearenv();
    }
}

/// One heap for all threads: an arena a thread would cost memory, and system calls to size.
pub(super) fn spare_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: sets a number in the allocator before a second thread exists. It cannot fail in a way that matters.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Limits that no thread can raise again.
pub(super) fn limit(serves_files: bool) -> Result<(), JailError> {
    rustix::process::umask(Mode::empty());
    let files = if serves_files {
        FILES_WITH_SHARE
    } else {
        FILES
    };
    for (resource, limit) in [
        (Resource::Core, 0),
        (Resource::Nofile, files),
        (Resource::Msgqueue, 0),
    ] {
        set_limit(resource, limit)?;
    }
    Ok(())
}

/// Sets both limits to `limit`, or to the hard limit where that is lower.
fn set_limit(resource: Resource, limit: u64) -> Result<(), JailError> {
    let hard = rustix::process::getrlimit(resource).maximum;
    let limit = Some(hard.map_or(limit, |hard| hard.min(limit)));
    let limit = Rlimit {
        current: limit,
        maximum: limit,
    };
    setrlimit(resource, limit).doing(format!("limiting {resource:?}"))
}

/// The process that started the jail, which waits to hear how it went.
pub(super) struct Parent(OwnedFd);

impl Parent {
    /// Tells the parent to exit with success. Where somebody has killed it, the machine was meant: this process ends, and
    /// says nothing, as one that is killed.
    pub(super) fn entered(self) {
        if rustix::io::write(&self.0, b".").is_err() {
            std::process::exit(1);
        }
    }
}

/// Makes the namespaces and returns in a new process inside of them; the calling process exits when that one is
/// jailed or dead. `pid_fd` is told the new process's id as the caller's pid namespace has it.
pub(super) fn fork_into_namespaces(pid_fd: Option<RawFd>) -> Result<Parent, JailError> {
    // SAFETY: the caller gave this descriptor to us for that; nothing else owns it.
    let pid_file = pid_fd.map(|fd| unsafe { File::from_raw_fd(fd) });
    unshare_with_identity_maps()?;
    let (from_child, to_parent) = pipe_with(PipeFlags::CLOEXEC).doing("making a pipe")?;
    // SAFETY: this is the only thread, so the child may do all that the parent may.
    let child = check_call(unsafe { libc::fork() }).doing("forking into the pid namespace")?;
    if child > 0 {
        drop(to_parent);
        let status = report(child, pid_file, File::from(from_child));
        // SAFETY: ends this process without running exit handlers, which belong to the child now.
        unsafe { libc::_exit(status) };
    }
    drop((pid_file, from_child));
    rustix::process::setsid().doing("leaving the session")?;
    set_limit(Resource::Nproc, THREADS)?;
    rustix::system::sethostname(b"cella").doing("setting the host name")?;
    Ok(Parent(to_parent))
}

/// What the process that stays outside does: says who the child is, waits until it is jailed, and returns the status
/// to exit with.
fn report(child: libc::pid_t, pid_file: Option<File>, mut from_child: File) -> i32 {
    if let Some(mut file) = pid_file {
        // The reader may be gone; the child's end of the control socket tells the child that.
        let _ = writeln!(file, "{child}");
    }
    if matches!(from_child.read(&mut [0]), Ok(1)) {
        return 0;
    }
    wait_status(child)
}

/// The exit status of a child as a shell has it: 128 and the number for a signal.
fn wait_status(child: libc::pid_t) -> i32 {
    let mut status = 0;
    loop {
        // SAFETY: `status` is a valid place for the result.
        match check_call(unsafe { libc::waitpid(child, &raw mut status, 0) }) {
            Ok(_) if libc::WIFSIGNALED(status) => return 128 + libc::WTERMSIG(status),
            Ok(_) => return libc::WEXITSTATUS(status),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return 1,
        }
    }
}

/// Makes the namespaces. Only a process that has stayed in the parent user namespace may map more than one id, so a
/// helper is forked before, writes the maps and exits.
fn unshare_with_identity_maps() -> Result<(), JailError> {
    let uids = identity_map("/proc/self/uid_map")?;
    let gids = identity_map("/proc/self/gid_map")?;
    let process = rustix::process::getpid().as_raw_pid();
    let (go, unshared) = pipe_with(PipeFlags::CLOEXEC).doing("making a pipe")?;
    // SAFETY: this is the only thread, so the child may do all that the parent may.
    let helper = check_call(unsafe { libc::fork() }).doing("forking a helper")?;
    if helper == 0 {
        drop(unshared);
        let status = match write_maps(File::from(go), process, &uids, &gids) {
            Ok(()) => 0,
            Err(error) => error.raw_os_error().unwrap_or(libc::EIO),
        };
        // SAFETY: ends the helper without running exit handlers, which are the parent's.
        unsafe { libc::_exit(status) };
    }
    drop(go);
    let result = unshare();
    if result.is_ok() {
        rustix::io::write(unshared.as_fd(), b".").doing("telling the helper to write the maps")?;
    }
    drop(unshared);
    let status = wait_status(helper);
    result?;
    if status != 0 {
        return Err(io::Error::from_raw_os_error(status))
            .doing("mapping the ids of the user namespace");
    }
    Ok(())
}

fn unshare() -> Result<(), JailError> {
    let flags = UnshareFlags::NEWUSER
        | UnshareFlags::NEWNS
        | UnshareFlags::NEWPID
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWCGROUP
        | UnshareFlags::NEWNET;
    // SAFETY: no file descriptor table is unshared. The kernel refuses NEWUSER to a process of several threads.
    unsafe { rustix::thread::unshare_unsafe(flags) }
        .doing("making the namespaces (as root, from a process of one thread)")
}

/// The map that gives every id of the calling process's user namespace to the same id of a new one.
fn identity_map(path: &str) -> Result<String, JailError> {
    let map = fs::read_to_string(path).doing(format!("reading {path}"))?;
    let mut identity = String::new();
    for line in map.lines() {
        let mut words = line.split_whitespace();
        if let (Some(first), Some(_), Some(count)) = (words.next(), words.next(), words.next()) {
            identity.push_str(&format!("{first} {first} {count}\n"));
        }
    }
    Ok(identity)
}

/// Waits until `process` is in its user namespace, and maps its ids. An end of file says that it never will be.
fn write_maps(mut go: File, process: i32, uids: &str, gids: &str) -> io::Result<()> {
    if go.read(&mut [0])? == 0 {
        return Ok(());
    }
    fs::write(format!("/proc/{process}/uid_map"), uids)?;
    fs::write(format!("/proc/{process}/gid_map"), gids)
}
