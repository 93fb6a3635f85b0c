//! How the agent and the host reach each other: vsock in a guest, unix sockets named by port in a test.
//!
//! Both are plain nonblocking stream sockets, so one [`Connection`] serves for both, for ttrpc (through tokio's
//! traits) as for the standard streams (through its descriptor, by splice(2)).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType, sockopt,
};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

mod vsock;

/// The host's CID, by the vsock specification.
const HOST_CID: u32 = 2;
/// Pending connections that the kernel keeps for [`Listener`].
const BACKLOG: i32 = 16;
/// How long the listener rests after an accept that failed for want of descriptors or memory.
const ACCEPT_REST: Duration = Duration::from_millis(100);

/// Where connections go to and come from.
#[derive(Clone, Debug)]
pub enum Transport {
    /// The guest's vsock device; the other side is the host.
    Vsock,
    /// Sockets in a directory: the host's are `host-<port>`, the agent's own `agent-<port>`.
    Unix(PathBuf),
}

/// A connected, nonblocking stream socket.
#[derive(Debug)]
pub struct Connection(AsyncFd<OwnedFd>);

/// A listening socket of the agent's own.
#[derive(Debug)]
pub struct Listener(AsyncFd<OwnedFd>);

impl Transport {
    /// Opens a connection to the host's `port`.
    ///
    /// # Errors
    ///
    /// Those of socket(2) and connect(2): ECONNREFUSED or ECONNRESET when nobody listens there.
    pub async fn dial(&self, port: u32) -> io::Result<Connection> {
        let socket = self.socket()?;
        let connected = match self {
            Transport::Vsock => vsock::connect(socket.as_fd(), HOST_CID, port),
            Transport::Unix(dir) => SocketAddrUnix::new(dir.join(format!("host-{port}")))
                .and_then(|address| rustix::net::connect(&socket, &address)),
        };
        let connection = Connection(both_ways(socket)?);
        match connected {
            Ok(()) => Ok(connection),
            Err(Errno::INPROGRESS) => {
                // A connected socket is a writable one, and so is one whose connection failed.
                let _ready = connection.0.writable().await?;
                sockopt::socket_error(connection.0.get_ref())??;
                Ok(connection)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Listens on the agent's own `port`.
    ///
    /// # Errors
    ///
    /// Those of socket(2), bind(2) and listen(2).
    pub fn listen(&self, port: u32) -> io::Result<Listener> {
        let socket = self.socket()?;
        match self {
            Transport::Vsock => vsock::bind(socket.as_fd(), port)?,
            Transport::Unix(dir) => {
                let address = SocketAddrUnix::new(dir.join(format!("agent-{port}")))?;
                rustix::net::bind(&socket, &address)?;
            }
        }
        rustix::net::listen(&socket, BACKLOG)?;
        Ok(Listener(both_ways(socket)?))
    }

    fn socket(&self) -> io::Result<OwnedFd> {
        let family = match self {
            Transport::Vsock => AddressFamily::VSOCK,
            Transport::Unix(_) => AddressFamily::UNIX,
        };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        Ok(rustix::net::socket_with(
            family,
            SocketType::STREAM,
            flags,
            None,
        )?)
    }
}

impl Listener {
    /// The next connection. A connection that fails before it is accepted is passed over; when the agent lacks
    /// descriptors or memory for it, it waits in the kernel's queue while the agent rests.
    pub async fn accept(&self) -> io::Result<Connection> {
        loop {
            let mut ready = self.0.readable().await?;
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            match rustix::net::accept_with(self.0.get_ref(), flags) {
                Ok(socket) => return Ok(Connection(both_ways(socket)?)),
                Err(Errno::AGAIN) => ready.clear_ready(),
                Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                    tokio::time::sleep(ACCEPT_REST).await;
                }
                Err(Errno::CONNABORTED | Errno::INTR | Errno::CONNRESET) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Connection {
    /// The socket with its readiness, for splice(2).
    pub fn socket(&self) -> &AsyncFd<OwnedFd> {
        &self.0
    }

    /// Writes all of `bytes`.
    ///
    /// # Errors
    ///
    /// Those of sendto(2).
    pub async fn send_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut ready = self.0.writable().await?;
            if let Ok(sent) = ready.try_io(|socket| send(socket.as_fd(), bytes)) {
                bytes = bytes.get(sent?..).unwrap_or_default();
            }
        }
        Ok(())
    }

    /// Ends the outgoing half: the other side reads to its end.
    pub fn finish(&self) {
        // A connection that is gone already needs no end.
        let _ = rustix::net::shutdown(self.0.get_ref(), Shutdown::Write);
    }
}

fn send(socket: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
    Ok(rustix::net::send(socket, bytes, SendFlags::NOSIGNAL)?)
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut ready = ready!(self.0.poll_read_ready(cx))?;
            let space = buf.initialize_unfilled();
            let received = ready.try_io(|socket| {
                rustix::net::recv(socket, &mut *space, RecvFlags::empty())
                    .map(|(length, _)| length)
                    .map_err(io::Error::from)
            });
            if let Ok(received) = received {
                return Poll::Ready(received.map(|length| buf.advance(length)));
            }
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.0.poll_write_ready(cx))?;
            if let Ok(sent) = ready.try_io(|socket| send(socket.as_fd(), bytes)) {
                return Poll::Ready(sent);
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.finish();
        Poll::Ready(Ok(()))
    }
}

fn both_ways(socket: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    crate::ready::register(socket, Interest::READABLE | Interest::WRITABLE)
}
