//! The door's end of the control socket: `vmm.proto` packets with file descriptors on a SOCK_SEQPACKET socket.

use std::collections::HashMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cella_proto::vmm::{Error as VmmError, ErrorKind as VmmErrorKind, Reply, Request, StopReason};
use cella_proto::vmm::{reply, request};
use protobuf::Message;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{oneshot, watch};

use super::{Ended, Error};
use crate::error::ErrorKind;

/// The largest packet, as `vmm.proto` has it.
const PACKET: usize = 64 * 1024;
/// The most descriptors that one packet carries here.
const MAX_FDS: usize = 32;

type Waiters = Arc<Mutex<HashMap<u64, oneshot::Sender<reply::Body>>>>;

/// A connection to one VMM; its end is the VMM's end.
pub(super) struct Channel {
    id: String,
    socket: Arc<AsyncFd<OwnedFd>>,
    next: AtomicU64,
    waiters: Waiters,
    ended: watch::Receiver<Option<Ended>>,
    started: watch::Receiver<Option<u64>>,
    reader: tokio::task::JoinHandle<()>,
    given_away: bool,
}

impl Channel {
    /// Takes the door's end of a connected SOCK_SEQPACKET pair.
    pub(super) fn new(id: &str, socket: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        // SAFETY: the AsyncFd owns the descriptor, so it stays open for as long as it is registered.
        let socket = Arc::new(unsafe { AsyncFd::register(socket) }?);
        let waiters = Waiters::default();
        let (ended_tx, ended) = watch::channel(None);
        let (started_tx, started) = watch::channel(None);
        let reader = tokio::spawn(read_replies(
            Arc::clone(&socket),
            Arc::clone(&waiters),
            ended_tx,
            started_tx,
        ));
        Ok(Self {
            id: id.to_owned(),
            socket,
            next: AtomicU64::new(1),
            waiters,
            ended,
            started,
            reader,
            given_away: false,
        })
    }

    /// The socket, for another process: the end of this channel is no longer the VMM's. To be called when no call is
    /// under way; what the VMM says from now on is read by whoever gets it.
    pub(super) fn give_away(&mut self) -> io::Result<OwnedFd> {
        let socket = self.socket.get_ref().try_clone()?;
        self.reader.abort();
        self.given_away = true;
        Ok(socket)
    }

    /// Sends one request with `fds` and waits for what the VMM answers.
    pub(super) async fn call(
        &self,
        call: request::Call,
        fds: &[BorrowedFd<'_>],
    ) -> Result<reply::Body, Error> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let request = Request {
            id,
            call: Some(call),
            ..Default::default()
        };
        let (sender, receiver) = oneshot::channel();
        lock(&self.waiters).insert(id, sender);
        let sent = match request.write_to_bytes() {
            Ok(packet) => self.send(&packet, fds).await,
            Err(error) => Err(io::Error::other(error)),
        };
        if let Err(source) = sent {
            lock(&self.waiters).remove(&id);
            // It has closed its end; the reader may not have come to that yet.
            if let io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset = source.kind() {
                return Err(self.gone(&self.ended().await));
            }
            let action = format!("sending a request to the VMM of {}", self.id);
            return Err(Error::host(action, source));
        }
        match receiver.await {
            Ok(reply::Body::Error(error)) => Err(self.refused(&error)),
            Ok(body) => Ok(body),
            // The reader has dropped every waiter: the VMM is gone.
            Err(_) => Err(self.gone(&self.ended().await)),
        }
    }

    /// Returns when the VMM has ended.
    pub(super) async fn ended(&self) -> Ended {
        let mut ended = self.ended.clone();
        let found = match ended.wait_for(Option::is_some).await {
            Ok(found) => found.clone(),
            Err(_) => None,
        };
        found.unwrap_or_else(|| Ended {
            reason: StopReason::STOP_REASON_FAILURE,
            message: "its control socket is lost".into(),
        })
    }

    /// When the first guest instruction ran, microseconds of CLOCK_MONOTONIC, once it did.
    pub(super) fn started_us(&self) -> Option<u64> {
        *self.started.borrow()
    }

    async fn send(&self, packet: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.socket
            .async_io(Interest::WRITABLE, |socket| {
                let mut space =
                    [MaybeUninit::<u8>::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
                    return Err(io::Error::other("too many file descriptors for one packet"));
                }
                rustix::net::sendmsg(
                    socket.as_fd(),
                    &[io::IoSlice::new(packet)],
                    &mut control,
                    SendFlags::NOSIGNAL,
                )?;
                Ok(())
            })
            .await
    }

    fn refused(&self, error: &VmmError) -> Error {
        let kind = match error.kind.enum_value_or_default() {
            VmmErrorKind::ERROR_KIND_INTERNAL => ErrorKind::Internal,
            VmmErrorKind::ERROR_KIND_INVALID_ARGUMENT => ErrorKind::InvalidArgument,
            VmmErrorKind::ERROR_KIND_FAILED_PRECONDITION => ErrorKind::FailedPrecondition,
            VmmErrorKind::ERROR_KIND_RESOURCE_EXHAUSTED => ErrorKind::ResourceExhausted,
            VmmErrorKind::ERROR_KIND_UNAVAILABLE => ErrorKind::Unavailable,
        };
        Error::Refused {
            id: self.id.clone(),
            kind,
            message: error.message.clone(),
        }
    }

    fn gone(&self, ended: &Ended) -> Error {
        Error::Gone {
            id: self.id.clone(),
            message: ended.message.clone(),
        }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.reader.abort();
        if self.given_away {
            return;
        }
        // The reader holds the socket too, until its task is dropped: end the connection at once.
        let _ = rustix::net::shutdown(self.socket.as_fd(), rustix::net::Shutdown::Both);
    }
}

/// Hands replies to their waiters and keeps the events, until the VMM closes its end.
async fn read_replies(
    socket: Arc<AsyncFd<OwnedFd>>,
    waiters: Waiters,
    ended: watch::Sender<Option<Ended>>,
    started: watch::Sender<Option<u64>>,
) {
    let mut packet = vec![0; PACKET];
    let mut end = None;
    loop {
        let read = socket
            .async_io(Interest::READABLE, |socket| {
                Ok(rustix::net::recv(
                    socket.as_fd(),
                    &mut packet[..],
                    RecvFlags::empty(),
                )?)
            })
            .await;
        let len = match read {
            // It ended before it had read every request; what it said before can still be read, and then its end.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => continue,
            Ok((0, _)) | Err(_) => break,
            Ok((len, _)) => len,
        };
        let Ok(reply) = Reply::parse_from_bytes(&packet[..len]) else {
            continue;
        };
        match reply.body {
            Some(reply::Body::Stopped(stopped)) => {
                end = Some(Ended {
                    reason: stopped.reason.enum_value_or_default(),
                    message: stopped.message,
                });
            }
            Some(reply::Body::Started(event)) => {
                started.send_replace(Some(event.started_us));
            }
            Some(body) => {
                if let Some(waiter) = lock(&waiters).remove(&reply.id) {
                    let _ = waiter.send(body);
                }
            }
            None => {}
        }
    }
    ended.send_replace(Some(end.unwrap_or_else(|| Ended {
        reason: StopReason::STOP_REASON_FAILURE,
        message: "its process died".into(),
    })));
    lock(&waiters).clear();
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
