//! virtio over vhost-user: another hypervisor (QEMU) shows the device to the guest, and hands over the guest's memory
//! and the queues' rings through a socket.
//!
//! Everything runs on one thread, that of the event loop which the device runs in: requests of the hypervisor, kicks and
//! the device's own descriptors. The hypervisor is trusted no more than the guest that may have broken it: whatever
//! comes through the socket, this process goes on, and the connection ends with a message that says why. What a
//! hypervisor that breaks the protocol can do is to stall the thread that serves it.
//!
//! The wire format is the `vhost` crate's; the specification is QEMU's `docs/interop/vhost-user.rst`.
//!
//! | module | what lives there |
//! | --- | --- |
//! | `connection` | what each request does |
//! | `memory` | the guest's memory as the hypervisor gives it |
//! | `ring` | a queue's rings between the requests that set them up |

mod connection;
mod memory;
mod ring;
#[cfg(test)]
mod tests;

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use vhost::vhost_user::{BackendReqHandler, Error};

use super::{Transport, lock};
use crate::device::{Device, Readiness, Watcher};
use connection::Connection;

/// Called once, with what there is to say, when the hypervisor has hung up or broken the protocol.
pub type OnEnd = Arc<dyn Fn(String) + Send + Sync>;

/// The socket's token; those above are the kicks of the queues.
const SOCKET: u64 = 0;
const FIRST_KICK: u64 = 1;

const READ: Readiness = Readiness {
    read: true,
    write: false,
};

/// A device behind a vhost-user socket.
pub struct VhostUserTransport {
    name: &'static str,
    // None once the connection has ended. Taken before the connection's lock.
    requests: Mutex<Option<BackendReqHandler<Connection>>>,
    connection: Arc<Connection>,
    watcher: Mutex<Option<Arc<dyn Watcher + Send + Sync>>>,
    on_end: OnEnd,
}

impl VhostUserTransport {
    /// Serves `device` through `socket`, connected to the hypervisor. `name` is what log lines call the device,
    /// `handed` says how many of its queues, from the first on, the hypervisor hands over, and `watcher` is where the
    /// device will watch its descriptors.
    pub fn new(
        name: &'static str,
        device: Box<dyn Device>,
        handed: usize,
        socket: UnixStream,
        watcher: Arc<dyn Watcher + Send + Sync>,
        on_end: OnEnd,
    ) -> Arc<Self> {
        let connection = Arc::new(Connection::new(name, device, handed, watcher));
        let requests = BackendReqHandler::from_stream(socket, Arc::clone(&connection));
        Arc::new(Self {
            name,
            requests: Mutex::new(Some(requests)),
            connection,
            watcher: Mutex::new(None),
            on_end,
        })
    }

    /// Where the guest's memory is mapped for this device.
    pub fn guest_ranges(&self) -> Vec<Range<u64>> {
        self.connection.guest_ranges()
    }

    fn serve(&self) {
        let mut requests = lock(&self.requests);
        let Some(handler) = requests.as_mut() else {
            return;
        };
        let Err(error) = handler.handle_request() else {
            return;
        };
        let why = match error {
            Error::Disconnected => format!(
                "the hypervisor closed the connection of device {}",
                self.name
            ),
            error => format!(
                "device {}: the hypervisor sent what cannot be done: {error}",
                self.name
            ),
        };
        if let Some(watcher) = &*lock(&self.watcher) {
            let _ = watcher.unwatch(handler.as_raw_fd());
        }
        *requests = None;
        drop(requests);
        self.connection.end();
        (self.on_end)(why);
    }
}

impl Transport for VhostUserTransport {
    fn start(&self, watcher: Arc<dyn Watcher + Send + Sync>) -> io::Result<()> {
        if let Some(requests) = &*lock(&self.requests) {
            watcher.watch(requests.as_raw_fd(), SOCKET, READ)?;
        }
        self.connection.watch_with(Arc::clone(&watcher));
        *lock(&self.watcher) = Some(watcher);
        Ok(())
    }

    fn ready(&self, token: u64) {
        match token.checked_sub(FIRST_KICK) {
            None => self.serve(),
            Some(index) => self
                .connection
                .kicked(usize::try_from(index).unwrap_or(usize::MAX)),
        }
    }

    fn event(&self, token: u64, readiness: Readiness) {
        self.connection.event(token, readiness);
    }

    fn shut_down(&self) {
        self.connection.end();
    }
}
