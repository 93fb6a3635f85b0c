//! Threads for what may take long: a container's making, start, freeze and end wait for its hooks, mounts and files,
//! and nobody else shall wait for them.
//!
//! Work never queues behind other work: it gets a thread that idles, or a new one. What bounds the threads is the
//! number of [`Slot`]s, which are refused when they are out, instead of a wait that nobody sees the reason of.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

/// A thread's stack in bytes; what is not touched costs nothing. The deepest work there is (a system call filter of
/// hundreds of rules) touches 40 KiB.
const STACK: usize = 256 << 10;
/// How long a thread waits for more work: a container's start follows its making at once.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// Why there is no thread for some work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// All slots are taken.
    #[error("{0} operations are under way already")]
    Busy(usize),
    /// The kernel has no thread.
    #[error("making a thread")]
    Thread(#[source] io::Error),
    /// The work did not come to its end: it panicked, which ends a guest.
    #[error("the work was lost")]
    Lost,
}

/// The threads.
#[derive(Debug, Default)]
pub struct Workers {
    state: Mutex<State>,
    more: Condvar,
}

#[derive(Default)]
struct State {
    /// Slots that are taken.
    taken: usize,
    /// Threads that wait for work: no fewer than there are `jobs`.
    idle: usize,
    jobs: VecDeque<Job>,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} taken, {} idle", self.taken, self.idle)
    }
}

/// Some work; what it returns delivers its result.
type Job = Box<dyn FnOnce() -> Delivery + Send>;
type Delivery = Box<dyn FnOnce()>;

/// The right to a thread, for one piece of work.
#[derive(Debug)]
pub struct Slot(Arc<Workers>);

impl Drop for Slot {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.taken = state.taken.saturating_sub(1);
    }
}

impl Slot {
    /// Does `work` on a thread of its own. It is done to its end even if nobody waits for the result any more.
    ///
    /// # Errors
    ///
    /// When there is no thread, in which case `work` was dropped.
    pub async fn run<T: Send + 'static>(
        self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Error> {
        let (sender, receiver) = oneshot::channel();
        let workers = self.0.clone();
        workers.submit(Box::new(move || {
            let result = work();
            drop(self);
            Box::new(move || {
                // Whoever asked may be gone.
                let _ = sender.send(result);
            })
        }))?;
        receiver.await.map_err(|_| Error::Lost)
    }
}

impl Workers {
    /// No thread yet.
    pub fn new() -> Arc<Self> {
        // The C library would give each thread a heap of its own: memory that the agent holds for nothing.
        #[cfg(target_env = "gnu")]
        // SAFETY: sets a number.
        unsafe {
            libc::mallopt(libc::M_ARENA_MAX, 1);
        }
        Arc::default()
    }

    /// A slot, if fewer than `most` are taken.
    ///
    /// # Errors
    ///
    /// [`Error::Busy`].
    pub fn slot(self: &Arc<Self>, most: usize) -> Result<Slot, Error> {
        let mut state = self.state();
        if state.taken >= most {
            return Err(Error::Busy(state.taken));
        }
        state.taken = state.taken.saturating_add(1);
        Ok(Slot(self.clone()))
    }

    fn submit(self: Arc<Self>, job: Job) -> Result<(), Error> {
        let mut state = self.state();
        if state.jobs.len() < state.idle {
            state.jobs.push_back(job);
            // First, so that who wakes up need not wait for it.
            drop(state);
            self.more.notify_one();
            return Ok(());
        }
        drop(state);
        let thread = std::thread::Builder::new().stack_size(STACK);
        let spawned = thread.spawn(move || self.work(job));
        spawned.map(drop).map_err(Error::Thread)
    }

    /// A thread's life.
    fn work(&self, mut job: Job) {
        loop {
            let deliver = job();
            // Idle before anybody knows, so that the work that follows finds this thread.
            self.become_idle();
            deliver();
            let waited = self
                .more
                .wait_timeout_while(self.state(), KEEP_ALIVE, |state| state.jobs.is_empty());
            let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
            state.idle = state.idle.saturating_sub(1);
            match state.jobs.pop_front() {
                Some(next) => job = next,
                None => return,
            }
        }
    }

    fn become_idle(&self) {
        let mut state = self.state();
        state.idle = state.idle.saturating_add(1);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::thread::ThreadId;

    async fn thread_of(workers: &Arc<Workers>) -> ThreadId {
        let slot = workers.slot(8).unwrap();
        slot.run(|| std::thread::current().id()).await.unwrap()
    }

    #[tokio::test]
    async fn work_waits_for_no_other_work_and_a_thread_is_used_again() {
        let workers = Workers::new();
        let (free, blocked) = mpsc::channel::<()>();
        let stuck = workers.slot(8).unwrap().run(move || blocked.recv().is_ok());
        let stuck = tokio::spawn(stuck);
        tokio::task::yield_now().await;
        let first = thread_of(&workers).await;
        assert_ne!(first, std::thread::current().id());
        assert_eq!(thread_of(&workers).await, first);
        free.send(()).unwrap();
        assert!(stuck.await.unwrap().unwrap());
    }

    #[tokio::test]
    async fn slots_run_out_and_come_back() {
        let workers = Workers::new();
        let first = workers.slot(2).unwrap();
        let second = workers.slot(2).unwrap();
        assert!(matches!(workers.slot(2), Err(Error::Busy(2))));
        drop(workers.slot(3).unwrap());
        drop(first);
        assert_eq!(second.run(|| 5).await.unwrap(), 5);
        // Given back before the result was delivered.
        let _both = [workers.slot(2).unwrap(), workers.slot(2).unwrap()];
    }

    #[tokio::test]
    async fn work_is_done_though_nobody_waits_for_it() {
        let workers = Workers::new();
        let (done, report) = mpsc::channel();
        let work = workers.slot(1).unwrap().run(move || done.send(7));
        let asked = tokio::spawn(work);
        tokio::task::yield_now().await;
        asked.abort();
        assert_eq!(report.recv().unwrap(), 7);
    }
}
