//! A process of ours that goes on in the background: made by running this command again, it says through a pipe
//! when it is ready or why it failed.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Mutex;

use super::Error;

/// The environment variable that names the pipe's descriptor.
const PIPE: &str = "CELLA_BACKGROUND_FD";
/// The descriptor's number in the child.
const PIPE_FD: RawFd = 3;

/// The pipe to the process that waits, if there is one and it has not been told yet.
static WAITING: Mutex<Option<File>> = Mutex::new(None);

/// Runs this program with `arguments` in the background, in a session of its own, and returns when it has called
/// [`report_ready`].
///
/// # Errors
/// [`Error::Background`] with what it failed of.
pub fn spawn(arguments: &[OsString], environment: &[(&str, &str)]) -> Result<(), Error> {
    let action = "starting a process in the background";
    let (ours, theirs) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .map_err(|e| Error::host(action, e))?;
    let inherited = theirs.as_raw_fd();
    let mut command = Command::new("/proc/self/exe");
    command
        .args(arguments)
        .envs(environment.iter().copied())
        .env(PIPE, PIPE_FD.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    // SAFETY: setsid, dup2 and fcntl are async-signal-safe, and touch no memory of the parent's.
    unsafe {
        command.pre_exec(move || {
            rustix::process::setsid()?;
            let made = match inherited {
                // dup2 onto itself would leave it close-on-exec.
                PIPE_FD => libc::fcntl(PIPE_FD, libc::F_SETFD, 0),
                other => libc::dup2(other, PIPE_FD),
            };
            match made {
                -1 => Err(std::io::Error::last_os_error()),
                _ => Ok(()),
            }
        });
    }
    let mut child = command.spawn().map_err(|e| Error::host(action, e))?;
    drop(theirs);
    let mut said = String::new();
    File::from(ours)
        .take(64 * 1024)
        .read_to_string(&mut said)
        .map_err(|e| Error::host(action, e))?;
    if said == "ready\n" {
        return Ok(());
    }
    let (status, message) = said
        .split_once('\n')
        .and_then(|(status, message)| Some((status.parse().ok()?, message.to_owned())))
        .unwrap_or_else(|| {
            let end = child
                .wait()
                .map_or_else(|e| e.to_string(), |s| s.to_string());
            (super::EXIT_FAILURE, format!("{action}: it died: {end}"))
        });
    let _ = child.wait();
    Err(Error::Background { status, message })
}

/// Takes over the pipe that [`spawn`] gave to this process. To be called once, first thing.
pub fn adopt() {
    let fd = std::env::var(PIPE).ok().and_then(|fd| fd.parse().ok());
    if fd == Some(PIPE_FD) {
        // SAFETY: whoever sets the variable has put the pipe there for this process, and nothing else takes it.
        let pipe = unsafe { OwnedFd::from_raw_fd(PIPE_FD) };
        let _ = rustix::io::fcntl_setfd(&pipe, rustix::io::FdFlags::CLOEXEC);
        set(Some(pipe.into()));
    }
}

/// Whether somebody waits for this process in the foreground.
pub fn is_background() -> bool {
    std::env::var_os(PIPE).is_some()
}

/// Tells the process in the foreground that it may go.
pub fn report_ready() {
    if let Some(mut pipe) = set(None) {
        let _ = pipe.write_all(b"ready\n");
    }
}

/// Tells the process in the foreground why this one ends.
pub fn report_failure(status: u8, message: &str) {
    if let Some(mut pipe) = set(None) {
        let _ = write!(pipe, "{status}\n{message}");
    }
}

fn set(pipe: Option<File>) -> Option<File> {
    let mut waiting = WAITING
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    std::mem::replace(&mut waiting, pipe)
}
