//! Whether a file's content is still what the guest has cached of it.
//!
//! A driver that opens a file throws away what it had cached of it, unless the server says that it may keep it. A program
//! that is executed again would then be read again, page by page. The server says so where nothing has touched the file since
//! the guest opened it last. What a host process writes through a mapping that is dirty already changes no time of the file until
//! the kernel writes it back, within half a minute: that is how late a guest may see it that keeps opening the file.

use std::collections::HashMap;
use std::time::{SystemTime, UNIX_EPOCH};

use fuse_backend_rs::abi::fuse_abi::stat64;

/// How old a change must be, in seconds, to be told from the next by its time: file systems count in ticks of some
/// milliseconds, and their clocks and ours may differ by as much.
const SETTLED: i64 = 2;

/// The files as they were when the guest last opened them.
#[derive(Debug, Default)]
pub struct Contents(HashMap<u64, Stamp>);

/// What no write leaves as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    size: i64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Contents {
    /// The guest opens `inode`, which is a file as `stat` says; true if it may keep what it has cached of it.
    pub fn open(&mut self, inode: u64, stat: &stat64) -> bool {
        self.open_at(inode, stat, seconds_now())
    }

    fn open_at(&mut self, inode: u64, stat: &stat64, now: i64) -> bool {
        let stamp = Stamp {
            size: stat.st_size,
            modified: (stat.st_mtime, stat.st_mtime_nsec),
            changed: (stat.st_ctime, stat.st_ctime_nsec),
        };
        // The time of a change is the kernel's to set; that of a modification is whatever its owner says.
        if now.saturating_sub(stat.st_ctime) < SETTLED {
            self.0.remove(&inode);
            return false;
        }
        self.0.insert(inode, stamp) == Some(stamp)
    }

    /// The guest has forgotten `inode`, and what it had cached.
    pub fn forget(&mut self, inode: u64) {
        self.0.remove(&inode);
    }

    /// The guest has forgotten everything.
    pub fn clear(&mut self) {
        self.0 = HashMap::new();
    }
}

/// A clock before 1970 makes every change seem recent.
fn seconds_now() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|since| i64::try_from(since.as_secs()).ok())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(size: i64, changed: i64) -> stat64 {
        // SAFETY: stat64 is made of integers; all zeroes is a valid value.
        let mut stat: stat64 = unsafe { std::mem::zeroed() };
        stat.st_size = size;
        stat.st_ctime = changed;
        stat
    }

    #[test]
    fn only_a_file_that_was_seen_before_and_is_the_same_is_kept() {
        let mut contents = Contents::default();
        assert!(!contents.open_at(1, &file(10, 100), 200), "never seen");
        assert!(contents.open_at(1, &file(10, 100), 200));
        assert!(!contents.open_at(2, &file(10, 100), 200), "another file");
        assert!(!contents.open_at(1, &file(11, 100), 200), "another size");
        assert!(contents.open_at(1, &file(11, 100), 200));
        assert!(!contents.open_at(1, &file(11, 150), 200), "changed since");
        let mut dated_back = file(11, 150);
        dated_back.st_mtime_nsec = 1;
        assert!(!contents.open_at(1, &dated_back, 200), "modified since");
    }

    #[test]
    fn a_change_a_moment_ago_may_have_a_successor_of_the_same_time() {
        let mut contents = Contents::default();
        assert!(!contents.open_at(1, &file(10, 199), 200));
        assert!(!contents.open_at(1, &file(10, 199), 201), "not recorded");
        assert!(contents.open_at(1, &file(10, 199), 202));
        assert!(!contents.open_at(1, &file(10, 300), 202), "of the future");
    }

    #[test]
    fn what_is_forgotten_is_unknown() {
        let mut contents = Contents::default();
        for forget in [
            |it: &mut Contents| it.forget(1),
            |it: &mut Contents| {
                it.clear();
            },
        ] {
            contents.open_at(1, &file(10, 100), 200);
            forget(&mut contents);
            assert!(!contents.open_at(1, &file(10, 100), 200));
        }
    }
}
