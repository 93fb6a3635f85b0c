//! Connections made in the pod's network namespace, handed on to the guest: to the same port on its loopback device.
//!
//! containerd dials `localhost` in the namespace to serve `kubectl port-forward`.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

use super::agent::{self, AbortOnDrop};
use super::error::Error;
use crate::network::Entrance;

/// The agent's port for these connections: it reads two bytes, the TCP port in network order, and answers one, 0 if
/// somebody listens there.
const FORWARD_PORT: u32 = 1025;

/// Connections at a time. Further ones wait to be accepted.
const CONNECTIONS: usize = 128;

/// After a failure for want of descriptors.
const REST: Duration = Duration::from_millis(100);

/// Serves a namespace's entrance; dropping it ends that.
pub(super) struct Forward {
    _serving: AbortOnDrop,
    // Closed after: nobody is steered to a socket that is not served.
    _entrance: Entrance,
}

impl Forward {
    /// Hands connections on to the guest behind `vsock`.
    ///
    /// # Errors
    /// The listener cannot be registered with the runtime.
    pub(super) fn start(entrance: Entrance, vsock: &Path) -> Result<Self, Error> {
        let action = "serving connections to the pod's ports";
        let listener = entrance
            .listener()
            .try_clone()
            .and_then(|listener: TcpListener| tokio::net::TcpListener::from_std(listener))
            .map_err(|e| Error::host(action, e))?;
        let serving = tokio::spawn(serve(listener, vsock.to_owned()));
        Ok(Self {
            _serving: AbortOnDrop(serving),
            _entrance: entrance,
        })
    }
}

async fn serve(listener: tokio::net::TcpListener, vsock: PathBuf) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    // Owned by this task, so that all of them end with it.
    let mut running = tokio::task::JoinSet::new();
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        while running.try_join_next().is_some() {}
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(REST).await;
            continue;
        };
        let vsock = vsock.clone();
        running.spawn(async move {
            if let Err(error) = hand_on(stream, &vsock).await {
                tracing::debug!("handing a connection on: {error}");
            }
            drop(place);
        });
    }
}

async fn hand_on(mut outside: TcpStream, vsock: &Path) -> Result<(), Error> {
    let action = "handing a connection on to the guest";
    let host = |e| Error::host(action, e);
    // The address that was dialled, not the listener's.
    let port = outside.local_addr().map_err(host)?.port();
    let mut inside = agent::dial(vsock, FORWARD_PORT).await?;
    inside.write_all(&port.to_be_bytes()).await.map_err(host)?;
    if inside.read_u8().await.map_err(host)? != 0 {
        // Nobody listens: whoever dialled sees a reset, not an empty answer.
        return outside.set_zero_linger().map_err(host);
    }
    tokio::io::copy_bidirectional(&mut outside, &mut inside)
        .await
        .map(drop)
        .map_err(host)
}
