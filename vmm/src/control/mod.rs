//! `vmm.proto` on the inherited socket: the main thread's loop from the closed jail to the end of the machine.

mod configure;
mod memory;
mod packet;
mod refusal;
mod session;

pub use session::now_us;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use cella_proto::vmm::{Error, ErrorKind, Reply, StopReason, Stopped, reply};

use crate::jail::Companion;
use crate::machine::worker::Worker;
use crate::machine::{self, Confine};
use packet::Packet;
use refusal::Refusal;
use session::Session;

const CONTROL: u64 = 1;
const MACHINE_STOPPED: u64 = 2;
const COMPANION_OUTPUT: u64 = 3;

/// Why the control loop gave up.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The socket or the event loop failed.
    #[error("{action}: {source}")]
    Io {
        /// What was being done, on what.
        action: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// KVM or a device gave up, and nobody was there to be told.
    #[error("the machine failed: {0}")]
    Machine(String),
}

impl ControlError {
    fn io(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, source }
    }
}

/// What the process brings into the control loop.
pub struct Context {
    /// The `SOCK_SEQPACKET` socket to the door.
    pub control: OwnedFd,
    /// The hypervisor that runs the machine, if it is not this process.
    pub companion: Option<Companion>,
    /// `/proc/self/smaps`, opened by this process while there was a `/proc`.
    pub smaps: File,
    /// What each thread calls first, and the main thread once the machine is made.
    pub confine: Confine,
    /// When `main` was entered, microseconds of `CLOCK_MONOTONIC`.
    pub entered_us: u64,
    /// When the jail was closed.
    pub jailed_us: u64,
}

/// Serves the door until it is gone or the machine has stopped.
///
/// # Errors
/// See [`ControlError`]. An orderly end, also one that the guest asked for, is none.
pub fn run(context: Context) -> Result<(), ControlError> {
    let worker = Worker::new().map_err(ControlError::io("making the event loop"))?;
    worker
        .watch(context.control.as_raw_fd(), CONTROL)
        .map_err(ControlError::io("watching the control socket"))?;
    let mut session = Session::new(context, worker);
    loop {
        let ready = session
            .worker
            .run_once()
            .map_err(ControlError::io("waiting for events"))?;
        if ready.contains(&CONTROL) && !serve(&mut session)? {
            session.stop();
            return Ok(());
        }
        if ready.contains(&COMPANION_OUTPUT) {
            session.read_output();
        }
        session.look_at_guest();
        if session.stopping || ready.contains(&MACHINE_STOPPED) {
            return finish(&mut session);
        }
    }
}

/// Answers one packet; false at the end of the connection.
fn serve(session: &mut Session) -> Result<bool, ControlError> {
    let packet = packet::receive(session.control.as_fd())
        .map_err(ControlError::io("receiving from the control socket"))?;
    let (id, outcome) = match packet {
        Packet::Nothing => return Ok(true),
        Packet::End => return Ok(false),
        Packet::Malformed(message) => {
            let kind = ErrorKind::ERROR_KIND_INVALID_ARGUMENT;
            (0, Err(Refusal { kind, message }))
        }
        Packet::Request(request, fds) => (request.id, session.handle(request, fds)),
    };
    let body = outcome.unwrap_or_else(|refusal| {
        reply::Body::Error(Error {
            kind: refusal.kind.into(),
            message: one_line(&refusal.message),
            ..Error::default()
        })
    });
    send(session, id, body)
}

/// Sends a reply, or an event if `id` is 0; false if the door is gone.
fn send(session: &Session, id: u64, body: reply::Body) -> Result<bool, ControlError> {
    let reply = Reply {
        id,
        body: Some(body),
        ..Reply::default()
    };
    packet::reply(session.control.as_fd(), &reply)
        .map_err(ControlError::io("sending to the control socket"))
}

/// The machine has stopped: says why, and ends.
fn finish(session: &mut Session) -> Result<(), ControlError> {
    let why = session.stop();
    let (reason, message) = match &why {
        machine::StopReason::Guest(how) => (StopReason::STOP_REASON_GUEST, (*how).to_owned()),
        machine::StopReason::Requested => (StopReason::STOP_REASON_REQUESTED, String::new()),
        machine::StopReason::Failure(why) => (StopReason::STOP_REASON_FAILURE, one_line(why)),
    };
    let stopped = Stopped {
        reason: reason.into(),
        message,
        ..Stopped::default()
    };
    let told = send(session, 0, reply::Body::Stopped(stopped))?;
    match why {
        // The door says it; where there is none any more, the log does.
        machine::StopReason::Failure(why) if !told => Err(ControlError::Machine(why)),
        _ => Ok(()),
    }
}

/// Replies and log lines are one line each.
fn one_line(text: &str) -> String {
    text.replace(['\n', '\r'], " ")
}
