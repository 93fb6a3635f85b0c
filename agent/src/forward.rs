//! Connections that the host hands on to the pod: `kubectl port-forward`, which dials the pod's loopback device.
//!
//! The host opens a vsock connection to [`PORT`] and writes the TCP port, two bytes in network order. The agent connects
//! to it on the loopback device, of either family, and answers one byte: 0, or 1 if nobody listens. After that, the
//! connection is the pod's.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

use crate::transport::{Connection, Listener, Transport};

/// The agent's port for these connections.
pub const PORT: u32 = 1025;
/// Connections at a time; further ones wait in the kernel's queue.
const CONNECTIONS: usize = 128;

/// Listens on [`PORT`] from now on.
///
/// # Errors
///
/// When the port cannot be listened on.
pub fn start(transport: &Transport) -> io::Result<()> {
    let listener = transport.listen(PORT)?;
    tokio::spawn(serve(listener));
    Ok(())
}

async fn serve(listener: Listener) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        let Ok(connection) = listener.accept().await else {
            return;
        };
        tokio::spawn(async move {
            // Whoever is at the other end sees the connection's end.
            let _ = hand_on(connection).await;
            drop(place);
        });
    }
}

async fn hand_on(mut host: Connection) -> io::Result<()> {
    let port = host.read_u16().await?;
    let connected = match TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await {
        Ok(pod) => Ok(pod),
        Err(_) => TcpStream::connect((Ipv6Addr::LOCALHOST, port)).await,
    };
    let Ok(mut pod) = connected else {
        return host.write_u8(1).await;
    };
    host.write_u8(0).await?;
    tokio::io::copy_bidirectional(&mut host, &mut pod)
        .await
        .map(drop)
}
