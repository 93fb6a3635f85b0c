//! A process's streams and this process's: copied by a thread each, to their ends.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

use super::Error;
use super::logs::{LogWriter, Stream};
use crate::sandbox::stdio::Streams;
use crate::timeline::Timeline;

/// Bytes copied at a time where the kernel cannot do it alone.
const CHUNK: usize = 64 * 1024;

/// Where a process's output goes.
pub enum Output {
    /// To this process's own.
    Own,
    /// Into a log.
    Log(Arc<LogWriter>),
}

impl Output {
    /// A log in a new file.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn log(path: &Path) -> Result<Self, Error> {
        let log = LogWriter::create(path)
            .map_err(|e| Error::host(format!("making the log {}", path.display()), e))?;
        Ok(Self::Log(Arc::new(log)))
    }
}

/// The threads that copy a process's output.
pub struct Pumps(Vec<JoinHandle<()>>);

impl Pumps {
    /// Starts copying. The input's thread is left to itself: it ends with this process at the latest.
    pub fn start(streams: Streams, output: &Output, timeline: Option<Arc<Timeline>>) -> Self {
        if let Some(socket) = streams.stdin {
            std::thread::spawn(move || feed(&socket));
        }
        let outputs = [
            (streams.stdout, Stream::Stdout),
            (streams.stderr, Stream::Stderr),
        ];
        let threads = outputs.into_iter().filter_map(|(socket, stream)| {
            let socket = socket?;
            let timeline = timeline.clone();
            let log = match output {
                Output::Own => None,
                Output::Log(log) => Some(Arc::clone(log)),
            };
            Some(std::thread::spawn(move || {
                drain(&socket, stream, log.as_deref(), timeline.as_deref());
            }))
        });
        Self(threads.collect())
    }

    /// Waits until every output has come to its end.
    pub async fn finish(self) {
        for thread in self.0 {
            // Blocking: the runtime's own threads are free to wait.
            let _ = tokio::task::spawn_blocking(move || thread.join()).await;
        }
    }
}

fn feed(socket: &UnixStream) {
    let mut to = socket;
    // An error is the process's having closed its input, or this one's input having failed: either way it ends.
    let _ = io::copy(&mut io::stdin().lock(), &mut to);
    let _ = socket.shutdown(Shutdown::Write);
}

fn drain(
    socket: &UnixStream,
    stream: Stream,
    log: Option<&LogWriter>,
    timeline: Option<&Timeline>,
) {
    let copied = match log {
        Some(log) => copy_to_log(socket, stream, log, timeline),
        None => copy_to_own(socket, stream, timeline),
    };
    if copied.is_err() {
        // Nobody reads any more: the process learns it as it would from a closed pipe.
        let _ = socket.shutdown(Shutdown::Both);
    }
}

fn copy_to_own(
    mut socket: &UnixStream,
    stream: Stream,
    timeline: Option<&Timeline>,
) -> io::Result<()> {
    let mut own: Box<dyn Write> = match stream {
        // Not the buffered handle: what the process wrote is written when it comes.
        Stream::Stdout => Box::new(raw(rustix::stdio::stdout())?),
        Stream::Stderr => Box::new(raw(rustix::stdio::stderr())?),
    };
    let mut chunk = vec![0; CHUNK];
    loop {
        let read = match socket.read(&mut chunk) {
            Ok(0) => return Ok(()),
            Ok(read) => read,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        if let Some(timeline) = timeline {
            timeline.mark("first-output");
        }
        own.write_all(chunk.get(..read).unwrap_or_default())?;
    }
}

fn copy_to_log(
    mut socket: &UnixStream,
    stream: Stream,
    log: &LogWriter,
    timeline: Option<&Timeline>,
) -> io::Result<()> {
    let mut lines = log.lines(stream);
    let mut chunk = vec![0; CHUNK];
    loop {
        let read = match socket.read(&mut chunk) {
            Ok(0) => return lines.end(),
            Ok(read) => read,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        if let Some(timeline) = timeline {
            timeline.mark("first-output");
        }
        lines.take(chunk.get(..read).unwrap_or_default())?;
    }
}

fn raw(fd: std::os::fd::BorrowedFd<'_>) -> io::Result<std::fs::File> {
    Ok(fd.try_clone_to_owned()?.into())
}
