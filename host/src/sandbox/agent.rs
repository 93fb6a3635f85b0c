//! The connection to a sandbox's agent, and what it reports of itself.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use cella_proto::agent::{
    Event, Exit, Ready, RenewRequest, SetUpSandboxRequest, WatchRequest, event,
};
use cella_proto::agent_ttrpc::AgentClient;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::watch;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::Context;

use super::error::Error;
use crate::error::ErrorKind;

/// The vsock port of the agent, in the guest as on the host.
pub const AGENT_PORT: u32 = 1024;

/// What the agent has reported so far.
#[derive(Clone, Debug, Default)]
struct Seen {
    ready: Option<Ready>,
    /// By container id and exec id.
    exits: HashMap<(String, String), Exit>,
    /// Out-of-memory kills by container id.
    ooms: HashMap<String, u64>,
    /// Set when the stream has ended: nothing more will come.
    lost: Option<String>,
}

/// A connection to an agent. Cheap to clone.
#[derive(Clone)]
pub struct Agent {
    client: AgentClient,
    seen: Arc<watch::Sender<Seen>>,
    // Ends the reader with the last clone.
    _reader: Arc<AbortOnDrop>,
}

/// A task that ends with its owner.
pub(super) struct AbortOnDrop(pub(super) tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Agent {
    /// Talks to the agent over a connection that it dialled, or that [`dial`] made.
    ///
    /// # Errors
    /// The event stream cannot be opened.
    pub async fn new(stream: UnixStream) -> Result<Self, Error> {
        Self::watching(client(stream)).await
    }

    /// Sets the guest up with `request` before it is asked for anything else: a clone must not use what its template
    /// has left it.
    ///
    /// # Errors
    /// The inner one is the agent's own refusal, which a booted guest would give as well.
    pub(super) async fn set_up_first(
        stream: UnixStream,
        request: &SetUpSandboxRequest,
    ) -> Result<Result<Self, ttrpc::Error>, Error> {
        let client = client(stream);
        match client.set_up_sandbox(Context::default(), request).await {
            Ok(_) => Self::watching(client).await.map(Ok),
            Err(refusal @ ttrpc::Error::RpcStatus(_)) => Ok(Err(refusal)),
            Err(error) => Err(Error::agent("setting up the clone", error)),
        }
    }

    /// Gives a guest that goes on from a snapshot `request` before anything else.
    pub(super) async fn renew_first(
        stream: UnixStream,
        request: &RenewRequest,
    ) -> Result<Self, Error> {
        let client = client(stream);
        client
            .renew(Context::default(), request)
            .await
            .map_err(|e| Error::agent("renewing the restored guest", e))?;
        Self::watching(client).await
    }

    async fn watching(client: AgentClient) -> Result<Self, Error> {
        let seen = Arc::new(watch::Sender::new(Seen::default()));
        let sender = Arc::clone(&seen);
        let mut events = client
            .watch(Context::default(), &WatchRequest::new())
            .await
            .map_err(|e| Error::agent("watching the agent's events", e))?;
        let reader = tokio::spawn(async move {
            let lost = loop {
                match events.recv().await {
                    Ok(Some(event)) => sender.send_modify(|seen| take(seen, event)),
                    Ok(None) => break "it closed its event stream".to_owned(),
                    Err(error) => break error.to_string(),
                }
            };
            sender.send_modify(|seen| seen.lost = Some(lost));
        });
        Ok(Self {
            client,
            seen,
            _reader: Arc::new(AbortOnDrop(reader)),
        })
    }

    /// The generated client.
    pub fn client(&self) -> &AgentClient {
        &self.client
    }

    /// Waits for the agent's first event.
    ///
    /// # Errors
    /// `Unavailable`: the connection ended first.
    pub async fn ready(&self) -> Result<Ready, Error> {
        self.until("waiting for the agent", |seen| seen.ready.clone())
            .await
    }

    /// Waits for the exit of a container's init (`exec` empty) or of an exec process.
    ///
    /// # Errors
    /// `Unavailable`: the connection ended first.
    pub async fn exit(&self, container: &str, exec: &str) -> Result<Exit, Error> {
        let key = (container.to_owned(), exec.to_owned());
        self.until("waiting for an exit", |seen| seen.exits.get(&key).cloned())
            .await
    }

    /// Waits until a container has had more than `known` out-of-memory kills, and returns how many.
    ///
    /// # Errors
    /// `Unavailable`: the connection ended first.
    pub async fn oom(&self, container: &str, known: u64) -> Result<u64, Error> {
        self.until("waiting for an out-of-memory kill", |seen| {
            seen.ooms
                .get(container)
                .copied()
                .filter(|count| *count > known)
        })
        .await
    }

    /// Forgets the exit of a deleted process, or all of a deleted container (`exec` empty): its id may come again.
    pub fn forget(&self, container: &str, exec: &str) {
        self.seen.send_modify(|seen| match exec {
            "" => {
                seen.exits.retain(|(of, _), _| of != container);
                seen.ooms.remove(container);
            }
            exec => {
                seen.exits.remove(&(container.to_owned(), exec.to_owned()));
            }
        });
    }

    async fn until<T>(&self, action: &str, pick: impl Fn(&Seen) -> Option<T>) -> Result<T, Error> {
        let mut seen = self.seen.subscribe();
        let found = seen
            .wait_for(|seen| pick(seen).is_some() || seen.lost.is_some())
            .await;
        let lost = match found {
            Ok(seen) => match pick(&seen) {
                Some(value) => return Ok(value),
                None => seen.lost.clone().unwrap_or_default(),
            },
            Err(_) => "its reader is gone".into(),
        };
        Err(Error::state(
            ErrorKind::Unavailable,
            format!("{action}: the agent is gone: {lost}"),
        ))
    }
}

fn client(stream: UnixStream) -> AgentClient {
    AgentClient::new(ttrpc::asynchronous::Client::new(Socket::new(stream)))
}

fn take(seen: &mut Seen, event: Event) {
    match event.event {
        Some(event::Event::Ready(ready)) => seen.ready = Some(ready),
        Some(event::Event::Exit(exit)) => {
            let key = (exit.container_id.clone(), exit.exec_id.clone());
            seen.exits.insert(key, exit);
        }
        Some(event::Event::Oom(oom)) => {
            let count = seen.ooms.entry(oom.container_id).or_default();
            *count = count.saturating_add(1);
        }
        // Statistics are asked for.
        _ => {}
    }
}

/// Connects to `port` in the guest through the VMM's socket.
///
/// # Errors
/// `Unavailable`: nobody listens on the socket or on the port.
pub async fn dial(vsock: &Path, port: u32) -> Result<UnixStream, Error> {
    let action = || format!("connecting to port {port} through {}", vsock.display());
    let mut stream = UnixStream::connect(vsock)
        .await
        .map_err(|e| Error::host(action(), e))?;
    stream
        .write_all(format!("CONNECT {port}\n").as_bytes())
        .await
        .map_err(|e| Error::host(action(), e))?;
    // Byte by byte: what follows the line belongs to the stream. "OK 4294967295\n" is the longest answer.
    let mut line = Vec::with_capacity(16);
    loop {
        let byte = stream
            .read_u8()
            .await
            .map_err(|e| Error::host(action(), e))?;
        match byte {
            b'\n' if line.starts_with(b"OK ") => return Ok(stream),
            b'\n' => break,
            _ if line.len() >= 16 => break,
            _ => line.push(byte),
        }
    }
    Err(Error::host(
        action(),
        io::Error::new(
            io::ErrorKind::InvalidData,
            "the VMM answered something else than OK",
        ),
    ))
}
