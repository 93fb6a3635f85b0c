//! A stream's connection, which another may take the place of: a snapshot has the processes, but not the connections of the
//! past, and whoever goes on from it gives the streams new ones.

use std::io;
use std::sync::Arc;

use tokio::sync::mpsc::{Receiver, Sender, channel};

use crate::transport::Connection;

/// One stream's way to the host.
#[derive(Debug)]
pub(super) struct Line {
    connection: Arc<Connection>,
    /// What takes the connection's place; `None` ends the stream. Closed where nothing ever does.
    next: Receiver<Option<Connection>>,
}

/// How the streams of one process get other connections.
#[derive(Debug, Default)]
pub struct Replacements {
    stdin: Option<Sender<Option<Connection>>>,
    stdout: Option<Sender<Option<Connection>>>,
    stderr: Option<Sender<Option<Connection>>>,
}

impl Line {
    /// A line that is `connection` for good.
    pub(super) fn new(connection: Connection) -> Self {
        let (_, next) = channel(1);
        Self {
            connection: Arc::new(connection),
            next,
        }
    }

    /// The sender's connections take the place of this one's.
    pub(super) fn replaceable(&mut self) -> Sender<Option<Connection>> {
        let (sender, next) = channel(1);
        self.next = next;
        sender
    }

    /// A line's that was never used.
    pub(super) fn into_connection(self) -> Option<Connection> {
        Arc::into_inner(self.connection)
    }

    /// The connection that the stream has now.
    pub(super) fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Has `carry` move the bytes over the connection, and over each one that takes its place, until it is done. A connection that
    /// was cut by a restore waits for the next one, if there can be one.
    ///
    /// # Errors
    /// Those of `carry`; [`io::ErrorKind::NotConnected`] if the stream is to end.
    pub(super) async fn carry<F>(&mut self, carry: impl Fn(Arc<Connection>) -> F) -> io::Result<()>
    where
        F: Future<Output = io::Result<()>>,
    {
        loop {
            let next = tokio::select! {
                carried = carry(self.connection.clone()) => match carried {
                    Err(error) if was_cut(&error) => self.next.recv().await.flatten(),
                    carried => return carried,
                },
                Some(next) = self.next.recv() => next,
            };
            self.connection = Arc::new(next.ok_or(io::ErrorKind::NotConnected)?);
        }
    }
}

impl Replacements {
    /// Of the three streams, those that there are.
    pub(super) fn of([stdin, stdout, stderr]: [&mut Option<Line>; 3]) -> Self {
        let sender = |line: &mut Option<Line>| line.as_mut().map(Line::replaceable);
        Self {
            stdin: sender(stdin),
            stdout: sender(stdout),
            stderr: sender(stderr),
        }
    }

    /// Gives each stream that has not ended its new connection; one that gets none ends.
    pub(super) async fn replace(&self, connections: [Option<Connection>; 3]) {
        let [stdin, stdout, stderr] = connections;
        let pairs = [
            (&self.stdin, stdin),
            (&self.stdout, stdout),
            (&self.stderr, stderr),
        ];
        for (sender, connection) in pairs {
            if let Some(sender) = sender {
                // A stream that has ended takes none.
                let _ = sender.send(connection).await;
            }
        }
    }
}

/// Whether the transport was reset under the connection, as a restore does. The peer's own end is not told by an error, or by
/// another (virtio 1.2, section 5.10.6.7; `virtio_vsock_reset_sock` in Linux).
fn was_cut(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotConnected | io::ErrorKind::ConnectionReset
    )
}
