//! Notifications of cgroups: files that change, and poll(2) on them.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;

use super::{Cgroup, failed};
use crate::container::Result;

/// The value of `name` in a file of "name value" lines.
pub(super) fn value(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(' ')?;
        if key == name {
            value.trim().parse().ok()
        } else {
            None
        }
    })
}

/// Waits for a control file to change; false once the deadline has passed.
pub(super) fn wait_for_change(file: &OwnedFd, deadline: Instant) -> bool {
    let Some(left) = deadline.checked_duration_since(Instant::now()) else {
        return false;
    };
    // A tenth of a second at most, in case a change came before the file was last read.
    let left = left.min(std::time::Duration::from_millis(100));
    let timeout = Timespec {
        tv_sec: 0,
        tv_nsec: i64::from(left.subsec_nanos()),
    };
    // An interruption or an error is one more look at the file.
    let _ = poll(&mut [PollFd::new(file, PollFlags::PRI)], Some(&timeout));
    true
}

/// Watches a container's `memory.events`.
#[derive(Debug)]
pub struct OomWatch {
    file: OwnedFd,
    path: PathBuf,
}

impl OomWatch {
    /// Poll it for POLLPRI: it changes with every event of the memory controller. Read [`kills`](Self::kills) to
    /// see whether it was an out-of-memory kill, and to arm it again.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Processes of the container killed for want of memory, since it was made.
    pub fn kills(&self) -> Result<u64> {
        let mut buffer = [0u8; 512];
        let length = rustix::io::retry_on_intr(|| rustix::io::pread(&self.file, &mut buffer, 0))
            .map_err(|e| failed("reading", &self.path)(e.into()))?;
        let text = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default());
        Ok(value(&text, "oom_kill").unwrap_or(0))
    }
}

impl Cgroup {
    /// A watch of memory.events; fails with `NotFound` in the chain if the memory controller is off.
    pub(in crate::container) fn oom_watch(&self) -> Result<OomWatch> {
        let path = self.path.join("memory.events");
        let file = self
            .open("memory.events", OFlags::RDONLY)
            .map_err(failed("opening", &path))?;
        Ok(OomWatch { file, path })
    }

    /// Out-of-memory kills; 0 without the memory controller.
    pub(in crate::container) fn oom_kills(&self) -> Result<u64> {
        let text = self.read("memory.events")?.unwrap_or_default();
        Ok(value(&text, "oom_kill").unwrap_or(0))
    }
}
