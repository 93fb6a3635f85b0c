//! How a guest's driver reaches a device.

pub mod mmio;
pub mod vhost_user;

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::device::{DeviceError, Readiness, Watcher};

/// A device behind its transport, as the event loop that runs it sees it. Every method is called on that loop's thread.
pub trait Transport: Send + Sync {
    /// Begins to watch the transport's own descriptors with `watcher`, which it may keep.
    ///
    /// # Errors
    /// `epoll_ctl` failed.
    fn start(&self, watcher: Arc<dyn Watcher + Send + Sync>) -> io::Result<()>;

    /// A descriptor that the transport watches under `token` can be read.
    fn ready(&self, token: u64);

    /// A descriptor that the device watches under `token` is ready.
    fn event(&self, token: u64, readiness: Readiness);

    /// Ends the device's use: its connections are closed.
    fn shut_down(&self);
}

/// A device's panic left nothing that cannot be reset: its lock stays usable.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs device code: an error or, in builds that unwind, a panic comes back as text.
fn guarded<T>(call: impl FnOnce() -> Result<T, DeviceError>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(value)) => Ok(value),
        // It has its source's words in its own.
        Ok(Err(error)) => Err(error.to_string()),
        Err(panic) => Err(format!("panic: {}", panic_text(panic.as_ref()))),
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no message")
}
