//! A machine that the process's companion runs: another hypervisor, which uses our devices over vhost-user.
//!
//! It is paused by stopping its process: the guest stands still as under KVM, and the devices keep their connections,
//! which they could not if the hypervisor took them out of use, as its own pause does.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, Mutex};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Signal, WaitId, WaitIdOptions, WaitIdStatus, pidfd_send_signal, waitid};
use vmm_sys_util::eventfd::EventFd;

use super::{Ending, MachineError, State, StopReason};
use crate::jail::Companion;
use crate::transport::vhost_user::OnEnd;

/// Most bytes of the companion's output that are kept, from its end.
const OUTPUT: usize = 1024;

/// How long a companion that has closed a device's connection may take to end: it does so on its way out.
const WAY_OUT: Timespec = Timespec {
    tv_sec: 2,
    tv_nsec: 0,
};

/// A machine run by a companion.
#[derive(Debug)]
pub struct CompanionMachine {
    companion: Companion,
    output: VecDeque<u8>,
    state: State,
    ended: bool,
    /// A device lost its connection.
    lost: Arc<Ending>,
}

impl CompanionMachine {
    /// The machine of a companion that has been started; it waits for its devices.
    ///
    /// # Errors
    /// No more event descriptors.
    pub fn new(companion: Companion) -> Result<Self, MachineError> {
        let stopped = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .map_err(super::host("making an event descriptor"))?;
        Ok(Self {
            companion,
            output: VecDeque::new(),
            state: State::Configured,
            ended: false,
            lost: Arc::new(Ending {
                reason: Mutex::default(),
                stopped,
            }),
        })
    }

    /// For a device's transport to say that its connection has ended.
    pub fn on_end(&self) -> OnEnd {
        let lost = Arc::clone(&self.lost);
        Arc::new(move |why| lost.set(StopReason::Failure(why)))
    }

    /// Readable when the companion or a device's connection to it has ended: time to call [`Self::stop`].
    pub fn ends(&self) -> [RawFd; 2] {
        [
            self.companion.pidfd.as_raw_fd(),
            self.lost.stopped.as_raw_fd(),
        ]
    }

    /// What the companion writes; readable when there is something for [`Self::read_output`].
    pub fn output(&self) -> BorrowedFd<'_> {
        self.companion.output.as_fd()
    }

    /// Keeps what the companion has written, for the message that says how it ended; false if no more will come.
    pub fn read_output(&mut self) -> bool {
        let mut bytes = [0; OUTPUT];
        loop {
            match rustix::io::read(&self.companion.output, &mut bytes) {
                Ok(0) => return false,
                Ok(len) => {
                    self.output.extend(bytes.iter().take(len));
                    let excess = self.output.len().saturating_sub(OUTPUT);
                    self.output.drain(..excess);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return true,
            }
        }
    }

    /// Whether [`Self::booted`] was not called yet.
    pub fn is_booting(&self) -> bool {
        !self.companion.copies.is_empty()
    }

    /// The guest uses a device: its kernel runs, and what the companion was given to start it with is needed no more.
    pub fn booted(&mut self) {
        if let Err(error) = self.companion.copies.take_away() {
            eprintln!("cella-vmm: giving back the memory of the guest's kernel file: {error}");
        }
    }

    /// The companion runs the guest as soon as it has its devices: there is nothing to be done but to know.
    ///
    /// # Errors
    /// [`MachineError::State`] a second time.
    pub fn start(&mut self) -> Result<(), MachineError> {
        self.change("start", State::Configured, State::Running, None)
    }

    /// Stops the guest where it is. Returns when no thread of the companion runs.
    ///
    /// # Errors
    /// [`MachineError::State`] unless running, or the companion has ended.
    pub fn pause(&mut self) -> Result<(), MachineError> {
        self.change("pause", State::Running, State::Paused, Some(Signal::STOP))?;
        let options = WaitIdOptions::STOPPED | WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        self.wait(options)
            .map(drop)
            .map_err(super::host("waiting for the hypervisor to stop"))
    }

    /// Continues a paused guest.
    ///
    /// # Errors
    /// [`MachineError::State`] unless paused, or the companion has ended.
    pub fn resume(&mut self) -> Result<(), MachineError> {
        self.change("resume", State::Paused, State::Running, Some(Signal::CONT))
    }

    /// Ends the companion, if it has not ended by itself, and says how it ended; `used` says whether the guest has come to
    /// use a device.
    pub fn stop(&mut self, used: bool) -> StopReason {
        if std::mem::replace(&mut self.ended, true) {
            return StopReason::Requested;
        }
        let lost = self.lost.get();
        if lost.is_some() {
            let mut end = [PollFd::new(&self.companion.pidfd, PollFlags::IN)];
            // Whether it ended or not is looked at next.
            let _ = poll(&mut end, Some(&WAY_OUT));
        }
        let found = match self.wait(WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {
            Ok(Some(status)) => self.reason(&status, used),
            other => {
                // At the latest it ends with this process, which is process 1 of its pid namespace.
                let killed = pidfd_send_signal(&self.companion.pidfd, Signal::KILL);
                if let (Ok(None), Ok(())) = (other, killed) {
                    let _ = self.wait(WaitIdOptions::EXITED);
                }
                lost.unwrap_or(StopReason::Requested)
            }
        };
        self.state = State::Stopped;
        found
    }

    fn reason(&mut self, status: &WaitIdStatus, used: bool) -> StopReason {
        self.read_output();
        let bytes: Vec<u8> = self.output.drain(..).collect();
        let text = String::from_utf8_lossy(&bytes);
        let said = match text.trim().lines().last() {
            Some(line) => format!(": {line}"),
            None => String::new(),
        };
        match (status.exit_status(), status.terminating_signal()) {
            // What QEMU says when a signal told it to end, which it does with status 0 too.
            (Some(0), _) if text.contains("terminating on signal") => {
                StopReason::Failure(format!("the hypervisor was told to end{said}"))
            }
            (Some(0), _) if !used => StopReason::Failure(format!(
                "the hypervisor ended before the guest had used a device{said}"
            )),
            (Some(0), _) => StopReason::Guest("the guest reset or powered off the machine"),
            (Some(status), _) => {
                StopReason::Failure(format!("the hypervisor ended with status {status}{said}"))
            }
            (None, signal) => StopReason::Failure(format!(
                "the hypervisor was killed by signal {}{said}",
                signal.unwrap_or_default()
            )),
        }
    }

    fn wait(&self, options: WaitIdOptions) -> io::Result<Option<WaitIdStatus>> {
        loop {
            match waitid(WaitId::PidFd(self.companion.pidfd.as_fd()), options) {
                Err(rustix::io::Errno::INTR) => {}
                other => return Ok(other?),
            }
        }
    }

    fn change(
        &mut self,
        action: &'static str,
        from: State,
        to: State,
        signal: Option<Signal>,
    ) -> Result<(), MachineError> {
        if self.state != from {
            return Err(MachineError::State {
                action,
                state: self.state,
            });
        }
        if let Some(signal) = signal {
            pidfd_send_signal(&self.companion.pidfd, signal)
                .map_err(|error| super::host("signalling the hypervisor")(error.into()))?;
        }
        self.state = to;
        Ok(())
    }
}
