//! A vCPU's thread: a state machine that commands move.
//!
//! ```text
//! Waiting (configured or paused) --Run--> Running --Pause--> Waiting
//!       \------------- Stop, or the guest's own end ------------> gone
//! ```
//!
//! A command to a running thread is followed by a kick; the thread looks at its commands when `KVM_RUN` has returned
//! `EINTR`, and at no other time. Since `KVM_RUN` completes the exit before it even then, a thread that waits has no
//! exit half done, and its registers are the guest's.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::thread::JoinHandle;
use std::time::Duration;

use cella_proto::snapshot::VcpuState;
use kvm_bindings::{
    KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES,
};
use kvm_ioctls::VcpuFd;

use super::emulate::Emulator;
use super::exit::{Buses, Outcome, handle};
use super::kick::{Kickable, Target};
use super::{ExitReason, ExitStats, VcpuError};
use crate::jail::ThreadKind;
use crate::machine::Confine;

/// How long a vCPU may take to leave the guest. An access to a device takes microseconds; the rest is the host's load.
const ANSWER: Duration = Duration::from_secs(10);

/// What a thread is told.
#[derive(Debug)]
enum Command {
    Run,
    Pause,
    /// Legal while waiting: read the vCPU's state, with these model-specific registers.
    Save(Vec<u32>, Sender<Result<VcpuState, VcpuError>>),
    Stop,
}

/// How a thread ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// It was told to.
    Commanded,
    /// The guest ended the machine, in this way.
    Guest(&'static str),
    /// It cannot go on, for this reason.
    Failure(String),
}

/// Called by a thread that ends by itself.
pub type OnEnd = Arc<dyn Fn(End) + Send + Sync>;

/// What a vCPU's thread needs.
pub struct Parts {
    /// Counts from 0.
    pub index: u32,
    /// The vCPU, its registers set.
    pub vcpu: VcpuFd,
    /// Who answers outside of RAM.
    pub buses: Buses,
    /// Completes what KVM cannot emulate; `None` on hosts with hardware virtualization.
    pub emulator: Option<Emulator>,
    /// Called when the guest or a failure ends the thread.
    pub on_end: OnEnd,
}

/// A vCPU's thread, as the machine sees it.
pub struct VcpuThread {
    index: u32,
    commands: Sender<Command>,
    paused: Receiver<()>,
    target: Target,
    stats: Arc<ExitStats>,
    // Returns the vCPU: its descriptor and its mapping go where the thread is joined, and a vCPU thread's filter need
    // not know how (in debug builds std checks a descriptor before it closes it).
    thread: Option<JoinHandle<Option<VcpuFd>>>,
}

impl VcpuThread {
    /// Makes the thread, which confines itself and waits. Returns when it is confined.
    ///
    /// # Errors
    /// It could not be made or confined.
    pub fn spawn(parts: Parts, confine: Confine) -> Result<Self, VcpuError> {
        let index = parts.index;
        let failed = |source| VcpuError::Thread { index, source };
        let stats = Arc::new(ExitStats::default());
        let (commands, receiver) = mpsc::channel();
        let (paused_sender, paused) = mpsc::channel();
        let (confined, is_confined) = mpsc::channel();
        let of_thread = Arc::clone(&stats);
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{index}"))
            .spawn(move || {
                let runner = Runner::new(parts, receiver, paused_sender, of_thread);
                match runner.and_then(|runner| confine(ThreadKind::Vcpu).map(|()| runner)) {
                    Ok(runner) => {
                        let _ = confined.send(Ok(Target::current()));
                        Some(runner.run())
                    }
                    Err(error) => {
                        let _ = confined.send(Err(error));
                        None
                    }
                }
            })
            .map_err(failed)?;
        let target = is_confined
            .recv()
            .unwrap_or_else(|_| Err(io::Error::other("it ended before it was confined")))
            .map_err(failed)?;
        Ok(Self {
            index,
            commands,
            paused,
            target,
            stats,
            thread: Some(thread),
        })
    }

    /// Lets the guest's code run.
    pub fn run(&self) {
        // A thread that has ended has told why.
        let _ = self.commands.send(Command::Run);
    }

    /// Asks a running vCPU to leave the guest; [`VcpuThread::wait_paused`] waits for it.
    pub fn pause(&self) {
        if self.commands.send(Command::Pause).is_ok() {
            self.target.kick();
        }
    }

    /// Waits until the vCPU has left the guest after [`VcpuThread::pause`], or has ended.
    ///
    /// # Errors
    /// [`VcpuError::Deaf`].
    pub fn wait_paused(&self) -> Result<(), VcpuError> {
        match self.paused.recv_timeout(ANSWER) {
            Ok(()) | Err(RecvTimeoutError::Disconnected) => Ok(()),
            Err(RecvTimeoutError::Timeout) => Err(VcpuError::Deaf {
                index: self.index,
                command: "to pause",
                seconds: ANSWER.as_secs(),
            }),
        }
    }

    /// The state of a vCPU that waits, with those of the model-specific registers `msrs` that it has.
    ///
    /// # Errors
    /// KVM refuses to give it, or the thread does not answer.
    pub fn save(&self, msrs: &[u32]) -> Result<VcpuState, VcpuError> {
        let (sender, saved) = mpsc::channel();
        // A thread that has ended drops the sender.
        let _ = self.commands.send(Command::Save(msrs.to_vec(), sender));
        saved.recv_timeout(ANSWER).map_err(|_| VcpuError::Deaf {
            index: self.index,
            command: "to give its state",
            seconds: ANSWER.as_secs(),
        })?
    }

    /// Tells the thread to end.
    pub fn stop(&self) {
        if self.commands.send(Command::Stop).is_ok() {
            self.target.kick();
        }
    }

    /// Waits for the end of a thread that was told to end.
    pub fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            // It cannot panic on what a guest does; if it does otherwise, the process is at its end anyway.
            let _ = thread.join();
        }
    }

    /// Its exits so far.
    pub fn stats(&self) -> &ExitStats {
        &self.stats
    }
}

/// The thread's own side.
struct Runner {
    index: u32,
    kickable: Kickable,
    buses: Buses,
    emulator: Option<Emulator>,
    on_end: OnEnd,
    commands: Receiver<Command>,
    paused: Sender<()>,
    stats: Arc<ExitStats>,
}

enum State {
    Waiting,
    Running,
}

/// What one `KVM_RUN` came to.
enum Step {
    Again,
    Interrupted,
    End(End),
}

impl Runner {
    fn new(
        parts: Parts,
        commands: Receiver<Command>,
        paused: Sender<()>,
        stats: Arc<ExitStats>,
    ) -> io::Result<Self> {
        Ok(Self {
            index: parts.index,
            kickable: Kickable::bind(parts.vcpu)
                .map_err(|error| io::Error::other(error.to_string()))?,
            buses: parts.buses,
            emulator: parts.emulator,
            on_end: parts.on_end,
            commands,
            paused,
            stats,
        })
    }

    fn run(mut self) -> VcpuFd {
        let mut state = State::Waiting;
        let end = loop {
            let command = match state {
                State::Waiting => self.commands.recv().unwrap_or(Command::Stop),
                State::Running => match self.step() {
                    Step::Again => continue,
                    Step::End(end) => break end,
                    Step::Interrupted => match self.commands.try_recv() {
                        Ok(command) => command,
                        // A signal of the host's.
                        Err(TryRecvError::Empty) => continue,
                        Err(TryRecvError::Disconnected) => Command::Stop,
                    },
                },
            };
            state = match command {
                Command::Run => State::Running,
                Command::Pause => {
                    let _ = self.paused.send(());
                    State::Waiting
                }
                Command::Save(msrs, sender) => {
                    let saved = super::state::save(self.kickable.vcpu(), self.index, &msrs);
                    let _ = sender.send(saved);
                    state
                }
                Command::Stop => break End::Commanded,
            };
        };
        if end != End::Commanded {
            (self.on_end)(end);
        }
        self.kickable.release()
    }

    fn step(&mut self) -> Step {
        let outcome = match self.kickable.vcpu().run() {
            Ok(exit) => {
                let (reason, outcome) = handle(exit, &self.buses);
                self.stats.count(reason);
                outcome
            }
            Err(error) => return self.not_run(error),
        };
        match outcome {
            Outcome::Continue => Step::Again,
            Outcome::GuestStop(how) => Step::End(End::Guest(how)),
            Outcome::Failure(why) => self.failure(&why),
            Outcome::InternalError => match self.complete() {
                Ok(()) => Step::Again,
                Err(why) => self.failure(&why),
            },
        }
    }

    fn not_run(&mut self, error: kvm_ioctls::Error) -> Step {
        match error.errno() {
            libc::EINTR => {
                // Before the commands are looked at: a kick from here on sets it again.
                self.kickable.vcpu().set_kvm_immediate_exit(0);
                self.stats.count(ExitReason::Interrupted);
                Step::Interrupted
            }
            // A secondary vCPU was woken while it waits for its start.
            libc::EAGAIN => Step::Again,
            _ => self.failure(&format!("KVM_RUN: {error}")),
        }
    }

    /// Completes the instruction that KVM gave up on.
    fn complete(&mut self) -> Result<(), String> {
        let vcpu = self.kickable.vcpu();
        let run = vcpu.get_kvm_run();
        // SAFETY: the exit reason was KVM_EXIT_INTERNAL_ERROR, whose data this member is; every bit pattern of it is valid.
        let error = unsafe { run.__bindgen_anon_1.emulation_failure };
        let Some(emulator) = self
            .emulator
            .as_ref()
            .filter(|_| error.suberror == KVM_INTERNAL_ERROR_EMULATION)
        else {
            return Err(format!("KVM's internal error {}", error.suberror));
        };
        let has_bytes = error.ndata >= 3
            && error.flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0;
        // SAFETY: the flag says that KVM has filled these in; every bit pattern of them is valid.
        let instruction = unsafe { error.__bindgen_anon_1.__bindgen_anon_1 };
        let size = match has_bytes {
            true => usize::from(instruction.insn_size),
            false => 0,
        };
        let bytes = instruction
            .insn_bytes
            .get(..size)
            .unwrap_or(&instruction.insn_bytes);
        emulator
            .complete(vcpu, bytes)
            .map_err(|error| error.to_string())
    }

    fn failure(&self, why: &str) -> Step {
        Step::End(End::Failure(format!("vCPU {}: {why}", self.index)))
    }
}
