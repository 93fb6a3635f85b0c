//! A logging program (`binary://PATH?KEY=VALUE`): it reads standard output from descriptor 3 and standard error from 4, and
//! closes 5 when it is ready.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::pipe::PipeFlags;
use tokio::process::{Child, Command};

use super::error::refuse;
use crate::error::ErrorKind;
use crate::sandbox::Error;

/// How long a logger may take to be ready.
const READY: Duration = Duration::from_secs(10);
/// How long it may take to end after the end of its input.
const END: Duration = Duration::from_secs(10);
/// Descriptors below are the logger's own.
const CLEAR: RawFd = 16;

/// A running logger.
#[derive(Debug)]
pub struct Logger(Child);

impl Logger {
    /// Starts a logger for a container, and returns when it is ready: with the pipes to it.
    ///
    /// # Errors
    /// It cannot be started or is never ready.
    pub async fn start(
        url: &str,
        container: &str,
        namespace: &str,
    ) -> Result<(Self, OwnedFd, OwnedFd), Error> {
        let (path, query) = url.split_once('?').unwrap_or((url, ""));
        let action = || format!("starting logger {path}");
        let host = |e: io::Error| Error::host(action(), e);
        let pipe = || rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(|e| host(e.into()));
        let (stdout_read, stdout) = pipe()?;
        let (stderr_read, stderr) = pipe()?;
        let (ready, ready_write) = pipe()?;
        let mut command = Command::new(path);
        command
            .args(arguments(query))
            .env("CONTAINER_ID", container)
            .env("CONTAINER_NAMESPACE", namespace)
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null());
        let inherited = [
            stdout_read.as_raw_fd(),
            stderr_read.as_raw_fd(),
            ready_write.as_raw_fd(),
        ];
        // SAFETY: between fork and exec only async-signal-safe calls are made: fcntl and dup2 on descriptors that the
        // parent keeps open until the spawn has returned.
        unsafe {
            command.pre_exec(move || inherit(inherited));
        }
        let mut child = command.spawn().map_err(host)?;
        drop((stdout_read, stderr_read, ready_write));
        let mut receiver = tokio::net::unix::pipe::Receiver::from_owned_fd(ready).map_err(host)?;
        // It says so by a byte or by closing its end.
        let said = tokio::io::AsyncReadExt::read_u8(&mut receiver);
        if tokio::time::timeout(READY, said).await.is_err() {
            let _ = child.kill().await;
            return Err(refuse(
                ErrorKind::DeadlineExceeded,
                format!(
                    "{}: it was not ready within {} s",
                    action(),
                    READY.as_secs()
                ),
            ));
        }
        Ok((Self(child), stdout, stderr))
    }

    /// Waits for the end of the logger, whose input has ended, without keeping the caller.
    pub fn finish(mut self) {
        tokio::spawn(async move {
            if tokio::time::timeout(END, self.0.wait()).await.is_err() {
                let _ = self.0.kill().await;
            }
        });
    }
}

/// The query's keys and values, one after another.
fn arguments(query: &str) -> Vec<String> {
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    pairs
        .flat_map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            [decode(key), decode(value)]
        })
        .filter(|argument| !argument.is_empty())
        .collect()
}

/// Undoes a URL's `%41` and `+`.
fn decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let hex = after.get(..2).and_then(|hex| std::str::from_utf8(hex).ok());
        let byte = hex.and_then(|hex| u8::from_str_radix(hex, 16).ok());
        rest = after;
        match (first, byte) {
            (b'%', Some(byte)) => {
                bytes.push(byte);
                rest = after.get(2..).unwrap_or_default();
            }
            (b'+', _) => bytes.push(b' '),
            (other, _) => bytes.push(*other),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Puts the descriptors at 3, 4 and 5, also where one stands on another's number.
fn inherit(descriptors: [RawFd; 3]) -> io::Result<()> {
    let mut moved = [-1; 3];
    for (slot, fd) in moved.iter_mut().zip(descriptors) {
        // SAFETY: F_DUPFD_CLOEXEC makes a new descriptor and touches no memory.
        *slot = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, CLEAR) };
        if *slot < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    for (to, fd) in (3..).zip(moved) {
        // SAFETY: dup2 replaces `to`, which nothing in this child uses before exec.
        if unsafe { libc::dup2(fd, to) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_arguments() {
        assert_eq!(arguments("a=b&c=d%20e+f"), ["a", "b", "c", "d e f"]);
        assert_eq!(arguments("flag"), ["flag"]);
        assert_eq!(arguments(""), Vec::<String>::new());
        assert_eq!(decode("100%"), "100%");
        assert_eq!(decode("%zz%4"), "%zz%4");
    }
}
