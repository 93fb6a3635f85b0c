//! Standard streams as connections: for each stream the agent opens a connection of its own to a port of the
//! sandbox and shows the token that it was given for it.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use cella_proto::agent::{Stdio, Stream};
use protobuf::MessageField;
use tokio::io::AsyncReadExt;

use super::dir::open_to_vmm;
use super::error::Error;
use crate::error::ErrorKind;

/// Bytes of a stream's token.
const TOKEN: usize = 16;
/// Ports of this kind begin here; the agent's own is below.
const FIRST_PORT: u32 = 0x1_0000;
/// Connections that show no valid token and are given up on before this is an error.
const MAX_STRANGERS: usize = 16;

/// Which streams a process shall have.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wanted {
    /// Its standard input; without, it is empty.
    pub stdin: bool,
    /// A terminal of this size: rows, columns. It has no standard error of its own.
    pub terminal: Option<(u16, u16)>,
}

/// The host's ends of a process's streams.
#[derive(Debug, Default)]
pub struct Streams {
    /// Write here; shutting it down is the end of the input.
    pub stdin: Option<UnixStream>,
    /// Read here to the end.
    pub stdout: Option<UnixStream>,
    /// Read here to the end.
    pub stderr: Option<UnixStream>,
}

/// Streams that wait for the agent to connect. Dropping it closes the port.
#[derive(Debug)]
pub struct Pending {
    listener: UnixListener,
    path: PathBuf,
    stdin: Option<[u8; TOKEN]>,
    stdout: [u8; TOKEN],
    stderr: Option<[u8; TOKEN]>,
}

impl Drop for Pending {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Opens a port in the sandbox's `sockets` directory; the [`Stdio`] tells the agent where and with which tokens.
///
/// # Errors
/// The socket cannot be made.
pub fn listen(sockets: &Path, wanted: Wanted) -> Result<(Stdio, Pending), Error> {
    let (port, path, listener) = bind(sockets)?;
    let pending = Pending {
        listener,
        path,
        stdin: wanted.stdin.then(token).transpose()?,
        stdout: token()?,
        stderr: wanted.terminal.is_none().then(token).transpose()?,
    };
    open_to_vmm(&pending.path)?;
    let stream = |token: [u8; TOKEN]| Stream {
        port,
        token: token.to_vec(),
        ..Default::default()
    };
    let (rows, columns) = wanted.terminal.unwrap_or((0, 0));
    let stdio = Stdio {
        stdin: pending.stdin.map(stream).into(),
        stdout: MessageField::some(stream(pending.stdout)),
        stderr: pending.stderr.map(stream).into(),
        rows: rows.into(),
        columns: columns.into(),
        ..Default::default()
    };
    Ok((stdio, pending))
}

impl Pending {
    /// Waits until the agent has connected every stream.
    ///
    /// # Errors
    /// The port fails, or strangers alone come.
    pub async fn accept(mut self) -> Result<Streams, Error> {
        let action = || format!("accepting streams at {}", self.path.display());
        let listener = self
            .listener
            .try_clone()
            .and_then(|listener| {
                listener.set_nonblocking(true)?;
                tokio::net::UnixListener::from_std(listener)
            })
            .map_err(|e| Error::host(action(), e))?;
        let mut streams = Streams::default();
        let mut missing =
            1 + usize::from(self.stdin.is_some()) + usize::from(self.stderr.is_some());
        let mut strangers = 0;
        while missing > 0 {
            let (mut stream, _) = listener.accept().await.map_err(|e| {
                Error::host(format!("accepting streams at {}", self.path.display()), e)
            })?;
            let mut shown = [0; TOKEN];
            let slot = match stream.read_exact(&mut shown).await {
                Ok(_) => self.slot(&shown, &mut streams),
                Err(_) => None,
            };
            match slot {
                Some(slot) => {
                    *slot = Some(blocking(stream)?);
                    missing -= 1;
                }
                None => strangers += 1,
            }
            if strangers > MAX_STRANGERS {
                return Err(Error::state(
                    ErrorKind::Unavailable,
                    "accepting streams: too many connections without a valid token",
                ));
            }
        }
        Ok(streams)
    }

    /// The place of the stream that `shown` stands for, if it is still free.
    fn slot<'a>(
        &mut self,
        shown: &[u8; TOKEN],
        streams: &'a mut Streams,
    ) -> Option<&'a mut Option<UnixStream>> {
        let slot = if Some(*shown) == self.stdin {
            &mut streams.stdin
        } else if *shown == self.stdout {
            &mut streams.stdout
        } else if Some(*shown) == self.stderr {
            &mut streams.stderr
        } else {
            return None;
        };
        slot.is_none().then_some(slot)
    }
}

fn blocking(stream: tokio::net::UnixStream) -> Result<UnixStream, Error> {
    let convert = || {
        let stream = stream.into_std()?;
        stream.set_nonblocking(false)?;
        Ok(stream)
    };
    convert().map_err(|e: io::Error| Error::host("taking a stream over", e))
}

/// Binds the first free port; another process of the same sandbox may be taking ports too.
fn bind(sockets: &Path) -> Result<(u32, PathBuf, UnixListener), Error> {
    let mut port = FIRST_PORT + std::process::id() % 0x10_0000 * 16;
    for _ in 0..4096 {
        let path = sockets.join(port.to_string());
        match UnixListener::bind(&path) {
            Ok(listener) => return Ok((port, path, listener)),
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => port += 1,
            Err(e) => return Err(Error::host(format!("binding {}", path.display()), e)),
        }
    }
    Err(Error::state(
        ErrorKind::ResourceExhausted,
        format!("no free port in {}", sockets.display()),
    ))
}

fn token() -> Result<[u8; TOKEN], Error> {
    let mut token = [0; TOKEN];
    let filled = rustix::rand::getrandom(&mut token, rustix::rand::GetRandomFlags::empty())
        .map_err(|e| Error::host("drawing a stream's token", e))?;
    if filled == TOKEN {
        Ok(token)
    } else {
        Err(Error::host(
            "drawing a stream's token",
            io::Error::other("the kernel gave too few bytes"),
        ))
    }
}
