//! Standard streams as connections (docs/design.md, decision 6).
//!
//! Each stream is a connection of its own that the agent opens to the host and names by the host's token. A
//! task per stream moves the bytes between the connection and the process's pipe by splice(2), or between it and
//! the terminal through a buffer of [`TERMINAL_BUFFER`] bytes. Nothing else is kept in memory: when one end is
//! full, the other waits. A stream ends when its last writer is gone, and its task ends when the host has
//! closed the connection, that is, when the host has read it all.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use cella_proto::agent;
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use rustix::termios::Winsize;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::transport::{Connection, Transport};

mod copy;
mod line;
#[cfg(test)]
mod tests;

use line::Line;
pub use line::Replacements;

/// Length of the token that names a stream to the host, by agent.proto.
const TOKEN: usize = 16;

/// Why a standard stream could not be connected.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request does not make sense.
    #[error("standard stream {stream}: {why}")]
    Invalid {
        /// The stream's name.
        stream: &'static str,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The host does not take the connection.
    #[error("connecting standard stream {stream} to port {port} of the host")]
    Connect {
        /// The stream's name.
        stream: &'static str,
        /// The host's vsock port.
        port: u32,
        /// What the kernel says.
        source: io::Error,
    },
    /// No descriptor or memory for it, as a rule.
    #[error("{what} for a standard stream")]
    System {
        /// What was being made.
        what: &'static str,
        /// What the kernel says.
        source: io::Error,
    },
}

/// The connections of one process's standard streams; `None` is /dev/null.
#[derive(Debug, Default)]
pub struct Streams {
    stdin: Option<Line>,
    stdout: Option<Line>,
    stderr: Option<Line>,
}

/// What a process without a terminal has as its standard input, output and error; `None` is /dev/null.
#[derive(Debug)]
pub struct ProcessEnds {
    /// Read by the process.
    pub stdin: Option<OwnedFd>,
    /// Written by the process.
    pub stdout: Option<OwnedFd>,
    /// Written by the process.
    pub stderr: Option<OwnedFd>,
}

/// The agent's ends of a process's pipes, and the connections that they belong to.
#[derive(Debug, Default)]
pub struct Pipes {
    stdin: Option<(Line, AsyncFd<OwnedFd>)>,
    stdout: Option<(AsyncFd<OwnedFd>, Line)>,
    stderr: Option<(AsyncFd<OwnedFd>, Line)>,
}

/// The controlling side of a process's terminal.
#[derive(Clone, Debug)]
pub struct Terminal(Arc<AsyncFd<OwnedFd>>);

impl Streams {
    /// Opens the connections that `stdio` asks for, all at once.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a token of a wrong length or a stderr beside a terminal; [`Error::Connect`].
    pub async fn open(
        transport: &Transport,
        stdio: &agent::Stdio,
        terminal: bool,
    ) -> Result<Self, Error> {
        if terminal && stdio.stderr.as_ref().is_some_and(|stderr| stderr.port != 0) {
            return Err(Error::Invalid {
                stream: "stderr",
                why: "a process with a terminal has none",
            });
        }
        let (stdin, stdout, stderr) = tokio::try_join!(
            open(transport, "stdin", stdio.stdin.as_ref()),
            open(transport, "stdout", stdio.stdout.as_ref()),
            open(transport, "stderr", stdio.stderr.as_ref()),
        )?;
        Ok(Self {
            stdin: stdin.map(Line::new),
            stdout: stdout.map(Line::new),
            stderr: stderr.map(Line::new),
        })
    }

    /// How these streams get other connections later. Without it, they end with those that they have.
    pub fn replacements(&mut self) -> Replacements {
        Replacements::of([&mut self.stdin, &mut self.stdout, &mut self.stderr])
    }

    /// Puts these streams' connections in the places of others'.
    pub async fn take_over(self, others: &Replacements) {
        let connections = [self.stdin, self.stdout, self.stderr];
        others
            .replace(connections.map(|line| line.and_then(Line::into_connection)))
            .await;
    }

    /// Pipes for a process without a terminal: the process's ends, and the agent's.
    ///
    /// # Errors
    ///
    /// [`Error::System`] when a pipe cannot be made.
    pub fn pipes(self) -> Result<(ProcessEnds, Pipes), Error> {
        let mut pipes = Pipes::default();
        let stdin = match self.stdin {
            None => None,
            Some(line) => {
                let (reader, writer) = pipe()?;
                // A pipe whose reader is gone reports an error, whoever waits for what.
                let writer = registered(writer, Interest::WRITABLE | Interest::ERROR)?;
                pipes.stdin = Some((line, writer));
                Some(reader)
            }
        };
        let (stdout, kept) = outgoing(self.stdout)?;
        pipes.stdout = kept;
        let (stderr, kept) = outgoing(self.stderr)?;
        pipes.stderr = kept;
        Ok((
            ProcessEnds {
                stdin,
                stdout,
                stderr,
            },
            pipes,
        ))
    }

    /// Starts to move bytes between the terminal behind `master` and the connections.
    ///
    /// # Errors
    ///
    /// [`Error::System`] when `master` cannot be waited on.
    pub fn attach(self, master: OwnedFd) -> Result<Terminal, Error> {
        rustix::io::ioctl_fionbio(&master, true).map_err(|source| Error::System {
            what: "making a terminal nonblocking",
            source: source.into(),
        })?;
        let master = Arc::new(registered(master, Interest::READABLE | Interest::WRITABLE)?);
        if let Some(line) = self.stdin {
            tokio::spawn(copy::into_terminal(line, master.clone()));
        }
        tokio::spawn(copy::out_of_terminal(master.clone(), self.stdout));
        Ok(Terminal(master))
    }
}

impl Pipes {
    /// Starts to move the bytes. The process has its ends by now, and the agent has closed its copies of them.
    pub fn run(self) {
        if let Some((line, pipe)) = self.stdin {
            tokio::spawn(copy::into_pipe(line, pipe));
        }
        for (pipe, line) in [self.stdout, self.stderr].into_iter().flatten() {
            tokio::spawn(copy::out_of_pipe(pipe, line));
        }
    }
}

impl Terminal {
    /// Sets the terminal's size in characters; its foreground processes get SIGWINCH.
    ///
    /// # Errors
    ///
    /// Those of ioctl(TIOCSWINSZ).
    pub fn resize(&self, rows: u16, columns: u16) -> io::Result<()> {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        Ok(rustix::termios::tcsetwinsize(self.0.get_ref(), size)?)
    }
}

/// Connects one stream, unless it is /dev/null, and names it to the host.
async fn open(
    transport: &Transport,
    stream: &'static str,
    wanted: Option<&agent::Stream>,
) -> Result<Option<Connection>, Error> {
    let Some(wanted) = wanted.filter(|wanted| wanted.port != 0) else {
        return Ok(None);
    };
    if wanted.token.len() != TOKEN {
        return Err(Error::Invalid {
            stream,
            why: "its token must have 16 bytes",
        });
    }
    let connected = async {
        let connection = transport.dial(wanted.port).await?;
        connection.send_all(&wanted.token).await?;
        Ok(connection)
    };
    match connected.await {
        Ok(connection) => Ok(Some(connection)),
        Err(source) => Err(Error::Connect {
            stream,
            port: wanted.port,
            source,
        }),
    }
}

/// What a process writes to, and what the agent keeps of it.
type Outgoing = (Option<OwnedFd>, Option<(AsyncFd<OwnedFd>, Line)>);

fn outgoing(line: Option<Line>) -> Result<Outgoing, Error> {
    let Some(line) = line else {
        return Ok((None, None));
    };
    let (reader, writer) = pipe()?;
    let reader = registered(reader, Interest::READABLE)?;
    Ok((Some(writer), Some((reader, line))))
}

fn pipe() -> Result<(OwnedFd, OwnedFd), Error> {
    // Blocking, as a program expects of its standard streams; the agent's side is nonblocking by splice's flag.
    rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(system("making a pipe"))
}

fn registered(descriptor: OwnedFd, interest: Interest) -> Result<AsyncFd<OwnedFd>, Error> {
    crate::ready::register(descriptor, interest).map_err(|source| Error::System {
        what: "waiting on a descriptor",
        source,
    })
}

fn system(what: &'static str) -> impl FnOnce(Errno) -> Error {
    move |source| Error::System {
        what,
        source: source.into(),
    }
}
