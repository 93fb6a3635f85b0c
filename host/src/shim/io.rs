//! A process's standard streams: the guest's connections, and the FIFOs, files or loggers that containerd names.
//!
//! Both ends of an output FIFO are held, so that what is written waits for the next reader when containerd is away. A stream
//! is a task that moves bytes by splice(2), through no memory of the shim's, and stands still when its reader does.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::pipe::SpliceFlags;
use tokio::io::unix::AsyncFd;
use tokio::task::{JoinHandle, JoinSet};

use super::error::refuse;
use super::logger::Logger;
use crate::error::ErrorKind;
use crate::sandbox::Error;
use crate::sandbox::stdio::Streams;

/// Bytes moved at a time.
const CHUNK: usize = 64 * 1024;
/// Before a transfer is tried again that could have been done and was not.
const PAUSE: Duration = Duration::from_millis(10);
/// The longest time between two looks at a FIFO that is to be read up.
const MAX_PAUSE: Duration = Duration::from_secs(1);

/// What containerd says of a process's streams; an empty path is no stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stdio {
    /// A FIFO.
    pub stdin: String,
    /// A FIFO's path, or a URL.
    pub stdout: String,
    /// As `stdout`; with a terminal, there is none.
    pub stderr: String,
    /// The process has a terminal.
    pub terminal: bool,
}

/// Where an output goes.
#[derive(Debug)]
pub enum Sink {
    /// Nowhere.
    Null,
    /// A pipe, whose reader is there.
    Pipe(OwnedFd),
    /// A FIFO, whose readers come and go.
    Fifo(OwnedFd),
    /// A file, at its end.
    File(File),
}

/// containerd's ends of a process's streams.
#[derive(Debug, Default)]
pub struct Io {
    /// The guest's end of the input, until the process is started.
    stdin: Option<OwnedFd>,
    stdin_path: String,
    /// Keeps the input from ending before CloseIO.
    holder: Option<OwnedFd>,
    stdin_closed: bool,
    sinks: Vec<Sink>,
    logger: Option<Logger>,
    input: Option<JoinHandle<()>>,
    outputs: JoinSet<()>,
}

impl Io {
    /// Opens what `stdio` names.
    ///
    /// # Errors
    /// `NotFound`: there is no such FIFO. `Unimplemented`: a URL of another kind.
    pub async fn open(stdio: &Stdio, container: &str, namespace: &str) -> Result<Self, Error> {
        let mut io = Self::default();
        io.stdin_path.clone_from(&stdio.stdin);
        if let Some(url) = stdio.stdout.strip_prefix("binary://") {
            let (logger, stdout, stderr) = Logger::start(url, container, namespace).await?;
            io.logger = Some(logger);
            io.sinks = vec![Sink::Pipe(stdout), Sink::Pipe(stderr)];
        } else {
            io.sinks.push(open_output(&stdio.stdout)?);
            let stderr = if stdio.terminal { "" } else { &stdio.stderr };
            io.sinks.push(open_output(stderr)?);
        }
        Ok(io)
    }

    /// Joins containerd's ends with the guest's.
    ///
    /// # Errors
    /// The event loop takes no more descriptors.
    pub fn connect(&mut self, streams: Streams) -> Result<(), Error> {
        let register = |e: io::Error| Error::host("watching a standard stream", e);
        let sockets = [streams.stdout, streams.stderr];
        for (socket, sink) in sockets.into_iter().zip(self.sinks.drain(..)) {
            if let Some(socket) = socket {
                let from = asynchronous(socket.into()).map_err(register)?;
                let sink = match sink {
                    Sink::Pipe(pipe) => Target::Pipe(asynchronous(pipe).map_err(register)?),
                    Sink::Fifo(fifo) => Target::Fifo(asynchronous(fifo).map_err(register)?),
                    Sink::File(file) => Target::File(file),
                    Sink::Null => Target::Null,
                };
                self.outputs.spawn(drain(from, sink));
            }
        }
        self.stdin = streams.stdin.map(Into::into);
        Ok(())
    }

    /// Opens the input, when the process is about to be started: not before, since clients call CloseIO only if they
    /// know the process when they have written all.
    ///
    /// # Errors
    /// The FIFO is not there.
    pub fn open_stdin(&mut self) -> Result<(), Error> {
        let Some(socket) = self.stdin.take() else {
            return Ok(());
        };
        let host =
            |e: io::Error| Error::host(format!("opening standard input {}", self.stdin_path), e);
        let (reader, holder) = open_input(&self.stdin_path).map_err(host)?;
        let from = asynchronous(reader).map_err(host)?;
        let to = asynchronous(socket).map_err(host)?;
        self.holder = (!self.stdin_closed).then_some(holder);
        self.input = Some(tokio::spawn(feed(from, to)));
        Ok(())
    }

    /// The input ends when its other writers have closed it too.
    pub fn close_stdin(&mut self) {
        self.stdin_closed = true;
        self.holder = None;
    }

    /// Waits until every output has come to its end, but no longer than `limit`; then lets go of everything.
    pub async fn finish(mut self, limit: Duration) {
        let drained = async { while self.outputs.join_next().await.is_some() {} };
        if tokio::time::timeout(limit, drained).await.is_err() {
            tracing::warn!("an output that nobody reads is given up after {limit:?}");
        }
        self.outputs.shutdown().await;
        if let Some(logger) = self.logger.take() {
            logger.finish();
        }
    }
}

impl Drop for Io {
    fn drop(&mut self) {
        if let Some(input) = &self.input {
            input.abort();
        }
    }
}

enum Target {
    Null,
    Pipe(AsyncFd<OwnedFd>),
    Fifo(AsyncFd<OwnedFd>),
    File(File),
}

/// Opens a FIFO for reading, and for writing, neither of which waits for another process.
fn open_input(path: &str) -> io::Result<(OwnedFd, OwnedFd)> {
    let reader = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    let holder = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    Ok((reader.into(), holder.into()))
}

fn open_output(name: &str) -> Result<Sink, Error> {
    let action = || format!("opening output {name}");
    let path = match name.split_once("://") {
        _ if name.is_empty() => return Ok(Sink::Null),
        None | Some(("fifo", _)) => Path::new(name.trim_start_matches("fifo://")),
        Some(("file", path)) => {
            return open_log(Path::new(path)).map_err(|e| Error::host(action(), e));
        }
        Some((scheme, _)) => {
            return Err(refuse(
                ErrorKind::Unimplemented,
                format!("{}: there is no way to log by {scheme}://", action()),
            ));
        }
    };
    let open = || {
        if !std::fs::metadata(path)?.file_type().is_fifo() {
            return open_log(path);
        }
        let fifo = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)?;
        Ok(Sink::Fifo(fifo.into()))
    };
    open().map_err(|e| Error::host(action(), e))
}

fn open_log(path: &Path) -> io::Result<Sink> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o644)
        .open(path)?;
    Ok(Sink::File(file))
}

fn asynchronous(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    rustix::io::ioctl_fionbio(&fd, true)?;
    // SAFETY: the AsyncFd owns the descriptor, so it stays open for as long as it is registered.
    Ok(unsafe { AsyncFd::register(fd) }?)
}

async fn drain(from: AsyncFd<OwnedFd>, to: Target) {
    let ended = match to {
        Target::Pipe(pipe) => pump(&from, &pipe).await,
        Target::Fifo(fifo) => match pump(&from, &fifo).await {
            Ok(()) => read_up(&fifo).await,
            Err(error) => Err(error),
        },
        Target::File(mut file) => copy(from, |bytes| file.write_all(bytes)).await,
        Target::Null => copy(from, |_| Ok(())).await,
    };
    if let Err(error) = ended {
        // Nobody can read any more: the process learns it as it would from a closed pipe.
        tracing::debug!("an output ended early: {error}");
    }
}

async fn feed(from: AsyncFd<OwnedFd>, to: AsyncFd<OwnedFd>) {
    // An error is the process's having closed its input.
    let _ = pump(&from, &to).await;
    let _ = rustix::net::shutdown(&to, rustix::net::Shutdown::Write);
}

/// Waits until everything in a FIFO has been read: what is in it goes with the last descriptor of it, and its reader may
/// be a containerd that is just restarting. The kernel tells nobody, so this looks, ever more seldom.
async fn read_up(fifo: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let mut pause = PAUSE;
    while rustix::io::ioctl_fionread(fifo)? > 0 {
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(MAX_PAUSE);
    }
    Ok(())
}

/// Moves everything from one to the other; one of the two is a pipe.
async fn pump(from: &AsyncFd<OwnedFd>, to: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
    loop {
        match rustix::pipe::splice(from, None, to, None, CHUNK, flags) {
            Ok(0) => return Ok(()),
            // Others have their turn, however fast this one is.
            Ok(_) => tokio::task::yield_now().await,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => wait(from, to).await?,
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Waits until it is worth trying again. Which of the two was not ready the kernel does not say; and to forget the
/// readiness of one that is ready would be to wait forever.
async fn wait(from: &AsyncFd<OwnedFd>, to: &AsyncFd<OwnedFd>) -> io::Result<()> {
    if !is_ready(from, PollFlags::IN)? {
        let mut guard = from.readable().await?;
        if !is_ready(from, PollFlags::IN)? {
            guard.clear_ready();
        }
        return Ok(());
    }
    if !is_ready(to, PollFlags::OUT)? {
        let mut guard = to.writable().await?;
        if !is_ready(to, PollFlags::OUT)? {
            guard.clear_ready();
        }
        return Ok(());
    }
    tokio::time::sleep(PAUSE).await;
    Ok(())
}

/// Whether `fd` is ready now. An end or an error counts: the next transfer will tell.
fn is_ready(fd: &impl AsFd, flags: PollFlags) -> io::Result<bool> {
    let mut fds = [PollFd::new(fd, flags)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    Ok(rustix::event::poll(&mut fds, Some(&now))? > 0)
}

async fn copy(
    from: AsyncFd<OwnedFd>,
    mut write: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK / 4];
    loop {
        let mut guard = from.readable().await?;
        match guard.try_io(|socket| Ok(rustix::io::read(socket, &mut chunk)?)) {
            Ok(Ok(0)) => return Ok(()),
            Ok(Ok(read)) => write(chunk.get(..read).unwrap_or_default())?,
            Ok(Err(e)) if e.kind() == io::ErrorKind::Interrupted => {}
            Ok(Err(e)) => return Err(e),
            Err(_would_block) => {}
        }
    }
}

#[cfg(test)]
#[path = "io_tests.rs"]
mod tests;
