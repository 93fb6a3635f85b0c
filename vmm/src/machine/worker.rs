//! The event loop that devices run in: one on the main thread, one on a thread for each block and fs device.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::device::{Readiness, Watcher};
use crate::jail::ThreadKind;
use crate::machine::Confine;
use crate::transport::Transport;

/// How many ready descriptors one wait returns at most.
const BATCH: usize = 32;

/// Who is told that a descriptor is ready.
#[derive(Clone)]
enum Target {
    /// The transport of this index watches it for itself under this token.
    Transport(usize, u64),
    /// The device behind the transport of this index does.
    Device(usize, u64),
    /// The owner of the loop, by the token it chose.
    Owner(u64),
}

/// What is watched. An epoll event carries a number that is never used twice, so that an event of a
/// descriptor that was closed in the meantime reaches nobody, not whoever opened the next of that number.
#[derive(Default)]
struct Watched {
    last: u64,
    numbers: HashMap<RawFd, u64>,
    targets: HashMap<u64, Target>,
}

struct Shared {
    epoll: Epoll,
    watched: Mutex<Watched>,
}

impl Shared {
    fn watched(&self) -> MutexGuard<'_, Watched> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn watch(&self, fd: RawFd, target: Target, interest: EventSet) -> io::Result<()> {
        let mut watched = self.watched();
        let number = watched.last.wrapping_add(1);
        let event = EpollEvent::new(interest, number);
        let operation = match watched.numbers.contains_key(&fd) {
            true => ControlOperation::Modify,
            false => ControlOperation::Add,
        };
        self.epoll.ctl(operation, fd, event)?;
        watched.last = number;
        if let Some(old) = watched.numbers.insert(fd, number) {
            watched.targets.remove(&old);
        }
        watched.targets.insert(number, target);
        Ok(())
    }

    fn unwatch(&self, fd: RawFd) -> io::Result<()> {
        let mut watched = self.watched();
        let number = watched.numbers.remove(&fd).ok_or(io::ErrorKind::NotFound)?;
        watched.targets.remove(&number);
        self.epoll
            .ctl(ControlOperation::Delete, fd, EpollEvent::default())
    }
}

/// Watches for one device of a loop, or for its transport.
struct DeviceWatcher {
    shared: Arc<Shared>,
    index: usize,
    target: fn(usize, u64) -> Target,
}

impl Watcher for DeviceWatcher {
    fn watch(&self, fd: RawFd, token: u64, interest: Readiness) -> io::Result<()> {
        let mut events = EventSet::empty();
        events.set(EventSet::IN, interest.read);
        events.set(EventSet::OUT, interest.write);
        self.shared
            .watch(fd, (self.target)(self.index, token), events)
    }

    fn unwatch(&self, fd: RawFd) -> io::Result<()> {
        self.shared.unwatch(fd)
    }
}

/// An event loop and the devices that it runs.
pub struct Worker {
    shared: Arc<Shared>,
    devices: Vec<Arc<dyn Transport>>,
}

impl Worker {
    /// A loop that runs nothing yet.
    ///
    /// # Errors
    /// `epoll_create1` failed.
    pub fn new() -> io::Result<Self> {
        let shared = Shared {
            epoll: Epoll::new()?,
            watched: Mutex::default(),
        };
        Ok(Self {
            shared: Arc::new(shared),
            devices: Vec::new(),
        })
    }

    /// The watcher to make the next device's transport with, which [`Self::add`] then takes.
    pub fn watcher(&self) -> Arc<dyn Watcher + Send + Sync> {
        self.watcher_for(Target::Device)
    }

    fn watcher_for(&self, target: fn(usize, u64) -> Target) -> Arc<dyn Watcher + Send + Sync> {
        Arc::new(DeviceWatcher {
            shared: self.shared.clone(),
            index: self.devices.len(),
            target,
        })
    }

    /// Runs `transport`'s device in this loop.
    ///
    /// # Errors
    /// `epoll_ctl` failed.
    pub fn add(&mut self, transport: Arc<dyn Transport>) -> io::Result<()> {
        transport.start(self.watcher_for(Target::Transport))?;
        self.devices.push(transport);
        Ok(())
    }

    /// Watches a descriptor of the loop's owner for input: [`Self::run_once`] returns `token` when it is ready.
    ///
    /// # Errors
    /// `epoll_ctl` failed.
    pub fn watch(&self, fd: RawFd, token: u64) -> io::Result<()> {
        self.shared.watch(fd, Target::Owner(token), EventSet::IN)
    }

    /// Stops watching a descriptor of the loop's owner.
    ///
    /// # Errors
    /// It was not watched.
    pub fn unwatch(&self, fd: RawFd) -> io::Result<()> {
        self.shared.unwatch(fd)
    }

    /// Ends the use of every device of this loop, on the thread that runs it: only that thread's filter has the
    /// system calls for it.
    pub fn shut_down(&self) {
        self.devices.iter().for_each(|device| device.shut_down());
    }

    /// Waits until something is ready, runs the devices that it concerns, and returns the owner's tokens.
    ///
    /// # Errors
    /// `epoll_wait` failed.
    pub fn run_once(&self) -> io::Result<Vec<u64>> {
        let mut events = [EpollEvent::default(); BATCH];
        let ready = match self.shared.epoll.wait(-1, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            other => other?,
        };
        let mut tokens = Vec::new();
        for event in events.iter().take(ready) {
            // Looked up one by one, and the lock let go: a device may watch and unwatch while it runs.
            let target = self.shared.watched().targets.get(&event.data()).cloned();
            match target {
                Some(Target::Transport(index, token)) => {
                    if let Some(transport) = self.devices.get(index) {
                        transport.ready(token);
                    }
                }
                Some(Target::Device(device, token)) => {
                    if let Some(transport) = self.devices.get(device) {
                        transport.event(token, readiness(event.events()));
                    }
                }
                Some(Target::Owner(token)) => tokens.push(token),
                None => {}
            }
        }
        Ok(tokens)
    }
}

fn readiness(events: u32) -> Readiness {
    let both = (EventSet::ERROR | EventSet::HANG_UP).bits();
    Readiness {
        read: events & (EventSet::IN.bits() | both) != 0,
        write: events & (EventSet::OUT.bits() | both) != 0,
    }
}

const STOP: u64 = 0;

/// A thread that runs a [`Worker`]. Dropping it ends its devices' use, and joins the thread.
pub struct WorkerThread {
    stop: EventFd,
    handle: Option<JoinHandle<()>>,
}

impl WorkerThread {
    /// Starts a thread that confines itself as `kind` and then runs `worker`.
    ///
    /// # Errors
    /// No thread or no event file descriptor could be made.
    pub fn spawn(
        name: &str,
        worker: Worker,
        kind: ThreadKind,
        confine: Confine,
    ) -> io::Result<Self> {
        let stop = EventFd::new(EFD_NONBLOCK)?;
        worker.watch(stop.as_raw_fd(), STOP)?;
        let handle = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                run_thread(&worker, kind, &confine);
            })?;
        Ok(Self {
            stop,
            handle: Some(handle),
        })
    }
}

fn run_thread(worker: &Worker, kind: ThreadKind, confine: &Confine) {
    if let Err(error) = confine(kind) {
        // A thread that keeps its rights must not touch the guest, and a machine without its device is none.
        eprintln!("cella-vmm: confining a {kind:?} thread: {error}");
        std::process::exit(1);
    }
    loop {
        match worker.run_once() {
            Ok(tokens) if tokens.is_empty() => {}
            Ok(_) => return worker.shut_down(),
            Err(error) => {
                eprintln!("cella-vmm: event loop of a {kind:?} thread: {error}");
                return;
            }
        }
    }
}

impl Drop for WorkerThread {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(handle) = self.handle.take() {
            let _ = handle.join();
        }
    }
}
