//! `start`: finds the pod's shim or makes one, and prints its address.
//!
//! The socket is made here and inherited by the shim, so that whoever reads the address can connect at once, and no two
//! shims can be made for one pod. The shim inherits nothing else: containerd waits for the end of both standard output
//! and standard error.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use super::args::Args;
use super::bundle::{self, Role};
use super::error::refuse;
use super::{bootstrap, settings};
use crate::error::ErrorKind;
use crate::paths::Paths;
use crate::sandbox::Error;

/// The listening socket's number in the shim.
pub const SOCKET_FD: RawFd = 3;
/// This process's place in the kernel's choice of what to kill for memory.
const SCORE: &str = "/proc/self/oom_score_adj";

/// Prints the address of the shim of container `args.id`, whose bundle is the current directory.
///
/// # Errors
/// The bundle or the configuration is wrong, or the shim cannot be started.
pub fn main(paths: &Paths, args: &Args) -> Result<(), Error> {
    let input = bootstrap::read_input();
    let modern = bootstrap::is_modern(&input, args);
    let role = match bundle::read_spec(Path::new(".")) {
        Ok(spec) => Role::of(&spec),
        // A sandbox of the Sandbox API need not have a specification.
        Err(error) if error.kind() == ErrorKind::NotFound => Role::Alone,
        Err(error) => return Err(error),
    };
    // What is wrong with it is better said here than in the shim's log.
    settings::load(paths)?;
    let group = role.group(&args.id);
    let socket = bundle::socket(&args.address, &args.namespace, group);
    match bind(&socket)? {
        Some(listener) if matches!(role, Role::Member(_)) => {
            drop(listener);
            let _ = fs::remove_file(&socket);
            return Err(refuse(
                ErrorKind::Unavailable,
                format!("the shim of pod sandbox {group} is gone"),
            ));
        }
        Some(listener) => {
            if let Err(error) = spawn(args, &listener) {
                let _ = fs::remove_file(&socket);
                return Err(error);
            }
        }
        // There is a living one.
        None => {}
    }
    let address = format!("unix://{}", socket.display());
    fs::write("address", &address).map_err(|e| Error::host("writing the bundle's address", e))?;
    bootstrap::answer(&address, modern)
        .and_then(|answer| bootstrap::print(&answer))
        .map_err(|e| Error::host("printing the shim's address", e))
}

/// Binds the socket; `None` if somebody listens on it already. A dead shim's is replaced.
fn bind(path: &Path) -> Result<Option<UnixListener>, Error> {
    let action = || format!("binding the shim's socket {}", path.display());
    if let Some(dir) = path.parent() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(dir)
            .map_err(|e| Error::host(action(), e))?;
    }
    for _ in 0..2 {
        match UnixListener::bind(path) {
            Ok(listener) => {
                fs::set_permissions(path, fs::Permissions::from_mode(0o600))
                    .map_err(|e| Error::host(action(), e))?;
                return Ok(Some(listener));
            }
            Err(e) if e.kind() != io::ErrorKind::AddrInUse => {
                return Err(Error::host(action(), e));
            }
            Err(_) if UnixStream::connect(path).is_ok() => return Ok(None),
            Err(_) => fs::remove_file(path).map_err(|e| Error::host(action(), e))?,
        }
    }
    Err(refuse(
        ErrorKind::Unavailable,
        format!("{}: another process keeps making it", action()),
    ))
}

/// Runs this program again as the shim.
fn spawn(args: &Args, listener: &UnixListener) -> Result<(), Error> {
    let action = "starting the shim in the background";
    let mut command = Command::new("/proc/self/exe");
    command.arg0(super::PROGRAM);
    command
        .arg("-namespace")
        .arg(&args.namespace)
        .arg("-address")
        .arg(&args.address)
        .arg("-publish-binary")
        .arg(&args.publish_binary)
        .arg("-id")
        .arg(&args.id)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    if args.debug {
        command.arg("-debug");
    }
    let inherited = listener.as_raw_fd();
    // SAFETY: setsid, dup2 and fcntl are async-signal-safe, and touch no memory of the parent's.
    unsafe {
        command.pre_exec(move || {
            rustix::process::setsid()?;
            let made = match inherited {
                // dup2 onto itself would leave it close-on-exec.
                SOCKET_FD => libc::fcntl(SOCKET_FD, libc::F_SETFD, 0),
                other => libc::dup2(other, SOCKET_FD),
            };
            match made {
                -1 => Err(io::Error::last_os_error()),
                _ => Ok(()),
            }
        });
    }
    // Not waited for: it lives on, and is init's when this process has ended.
    let child = command.spawn().map_err(|e| Error::host(action, e))?;
    adjust_oom_score(child.id());
    Ok(())
}

/// The kernel shall rather end a pod than containerd.
fn adjust_oom_score(pid: u32) {
    let own = fs::read_to_string(SCORE).ok();
    if let Some(own) = own.and_then(|text| text.trim().parse::<i32>().ok()) {
        let score = own.saturating_add(1).min(1000);
        // Without the right to it the default does.
        let _ = fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string());
    }
}
