//! Everything that the process gives up before the first guest instruction.
//!
//! [`enter`] is for the whole process, at the start of `main`: descriptors, environment, limits, namespaces, a
//! private root, ids and capabilities, and the first Landlock domain. [`confine`] is for one thread: its last
//! capabilities, a second Landlock domain and its system calls. `docs/jail.md` says why each is as it is and what
//! remains.
//!
//! | module | what lives there |
//! | --- | --- |
//! | [`companion`] | a hypervisor that is not ours, in a room beside |
//! | [`copies`] | what the companion reads once |
//! | `process` | descriptors, environment, limits, the namespaces and the fork into them |
//! | `root` | the private root: `/share`, `/vsock`, `/proc/self/fd`, and nothing else |
//! | `identity` | user and group ids, capabilities |
//! | `landlock` | what may still be opened |
//! | `seccomp` | the system calls of each kind of thread |

pub mod companion;
pub mod copies;
mod error;
mod identity;
mod landlock;
mod process;
mod root;
pub mod seccomp;

use std::fs::File;
use std::os::fd::RawFd;
use std::path::PathBuf;

pub use companion::{Companion, Program};
pub use copies::Copies;
pub use error::JailError;
pub use landlock::Landlock;

/// Where the jail shows the shared directory.
pub const SHARE: &str = "/share";
/// Where the jail shows the directory of the sockets that the guest's connections go to.
pub const SOCKETS: &str = "/vsock";

/// What a thread of the VMM does, which decides what it may still ask of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadKind {
    /// The main thread: the control socket, and the event loop of vsock and rng.
    Main,
    /// One for each vCPU: `KVM_RUN` and the accesses that it returns with.
    Vcpu,
    /// One for each block device: reads, writes and flushes of its file.
    Block,
    /// One for each network device: frames between guest memory and its tap.
    Net,
    /// The file server: acts as the guest's users inside the shared directory.
    Fs,
    /// As `Main`, where a companion runs the machine: it serves vsock to it, pauses it and hears of its end.
    VhostUserMain,
    /// As `Fs`, where the companion asks for what the guest's driver does.
    VhostUserFs,
}

/// What the jailed process may still see, and who it becomes.
#[derive(Clone, Debug, Default)]
pub struct Jail {
    /// The directory that appears as `/share`, for the file server. Mounts that the host makes beneath it later
    /// arrive if it lies on a shared mount; nothing propagates back.
    pub share: Option<PathBuf>,
    /// The directory of unix sockets that appears as `/vsock`.
    pub sockets: Option<PathBuf>,
    /// The unprivileged user that every thread but the file server runs as. Not 0.
    pub uid: u32,
    /// The unprivileged group. Not 0.
    pub gid: u32,
    /// The descriptors that stay open. Those of 0, 1 and 2 that are not listed become `/dev/null`, so that nothing
    /// else is ever opened under those numbers.
    pub keep_fds: Vec<RawFd>,
    /// The hypervisor that runs beside this process, in the same namespaces but a root of its own.
    pub companion: Option<Program>,
    /// Where the process id that the host sees is written, as a decimal line; closed afterwards.
    pub pid_fd: Option<RawFd>,
}

/// What the jailed process has, and could not have got any more.
#[derive(Debug)]
pub struct Entered {
    /// How much of Landlock this host's kernel has.
    pub landlock: Landlock,
    /// `/proc/self/smaps`, for statistics; read it from its start.
    pub smaps: File,
    /// The companion, if one was asked for.
    pub companion: Option<Companion>,
}

/// Closes the jail around the whole process. Call it first in `main`, from the only thread, as root; it returns in
/// another process: process 1 of a new pid namespace. The calling process ends itself: with status 0 once the jail
/// is closed, with the other's status if that ends before.
///
/// # Errors
/// See [`JailError`]. What was given up until then is not restored: report the error and exit.
pub fn enter(jail: &Jail) -> Result<Entered, JailError> {
    process::check(jail)?;
    process::close_other_descriptors(jail)?;
    seccomp::prepare_report()?;
    process::clear_environment();
    process::spare_memory();
    process::limit(jail.share.is_some())?;
    let parent = process::fork_into_namespaces(jail.pid_fd)?;
    let companion = match &jail.companion {
        Some(program) => Some(companion::spawn(program, jail.uid, jail.gid)?),
        None => None,
    };
    let smaps = root::build(jail)?;
    identity::forbid_new_privileges()?;
    let landlock = landlock::restrict_process(jail)?;
    identity::become_unprivileged(jail.uid, jail.gid, jail.share.is_some())?;
    parent.entered();
    Ok(Entered {
        landlock,
        smaps,
        companion,
    })
}

/// Closes the jail around the calling thread, for good. Each thread of kind `Vcpu`, `Block`, `Net` and `Fs` calls it before
/// anything else; `main` calls it when every other thread has been created, before the first `KVM_RUN`.
///
/// # Errors
/// See [`JailError`]. The thread must not go on to serve a guest.
pub fn confine(kind: ThreadKind) -> Result<(), JailError> {
    match kind {
        ThreadKind::Fs | ThreadKind::VhostUserFs => identity::become_file_server()?,
        ThreadKind::Main
        | ThreadKind::VhostUserMain
        | ThreadKind::Vcpu
        | ThreadKind::Block
        | ThreadKind::Net => {
            identity::drop_capabilities()?;
            landlock::restrict_thread(kind)?;
        }
    }
    seccomp::install(kind)
}
