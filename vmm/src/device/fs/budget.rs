//! How many files of the host's a guest may hold open.
//!
//! The file server keeps a descriptor for every file that the guest remembers and for every one that it has open.
//! The descriptors are the process's, and it needs some for itself.

use std::collections::HashMap;

/// Descriptors left to the rest of the process.
const RESERVE: u64 = 2048;

/// What the guest holds.
#[derive(Debug)]
pub struct Budget {
    limit: usize,
    // Lookups not forgotten of each inode, as FUSE counts them.
    inodes: HashMap<u64, u64>,
    handles: HashMap<u64, Opened>,
}

/// An open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    /// Which one.
    pub inode: u64,
    /// How it was opened, less what has its effect once.
    pub flags: u32,
    /// As a directory.
    pub directory: bool,
}

impl Budget {
    /// For a process that may have `descriptors` open at a time.
    pub fn new(descriptors: u64) -> Self {
        let limit = descriptors.saturating_sub(RESERVE.min(descriptors / 2));
        Self {
            limit: usize::try_from(limit).unwrap_or(usize::MAX),
            inodes: HashMap::new(),
            handles: HashMap::new(),
        }
    }

    fn held(&self) -> usize {
        self.inodes.len().saturating_add(self.handles.len())
    }

    /// The most that may be held.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// True if nothing more may be opened.
    pub fn is_spent(&self) -> bool {
        self.held() >= self.limit
    }

    /// Counts a lookup of `inode`; false, and not counted, if it is new and the budget is spent.
    pub fn look_up(&mut self, inode: u64) -> bool {
        let spent = self.is_spent();
        match self.inodes.get_mut(&inode) {
            Some(lookups) => *lookups = lookups.saturating_add(1),
            None if spent => return false,
            None => {
                self.inodes.insert(inode, 1);
            }
        }
        true
    }

    /// The guest goes on with `lookups` of `inode` that a process of the past counted.
    pub fn go_on(&mut self, inode: u64, lookups: u64) {
        self.inodes.insert(inode, lookups);
    }

    /// The guest forgets `count` lookups of `inode`; true if these were the last.
    pub fn forget(&mut self, inode: u64, count: u64) -> bool {
        let Some(lookups) = self.inodes.get_mut(&inode) else {
            return false;
        };
        *lookups = lookups.saturating_sub(count);
        let last = *lookups == 0;
        if last {
            self.inodes.remove(&inode);
        }
        last
    }

    /// A file was opened.
    pub fn open(&mut self, handle: u64, opened: Opened) {
        self.handles.insert(handle, opened);
    }

    /// True if `handle` is one of `inode`.
    pub fn is_open(&self, inode: u64, handle: u64) -> bool {
        self.handles
            .get(&handle)
            .is_some_and(|it| it.inode == inode)
    }

    /// A file was closed.
    pub fn close(&mut self, handle: u64) {
        self.handles.remove(&handle);
    }

    /// The inodes and how many lookups the guest has of each.
    pub fn inodes(&self) -> &HashMap<u64, u64> {
        &self.inodes
    }

    /// The open files by their handles.
    pub fn handles(&self) -> &HashMap<u64, Opened> {
        &self.handles
    }

    /// Everything was given back.
    pub fn clear(&mut self) {
        self.inodes = HashMap::new();
        self.handles = HashMap::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPENED: Opened = Opened {
        inode: 1,
        flags: 0,
        directory: false,
    };

    #[test]
    fn a_spent_budget_refuses_new_files_only() {
        let mut budget = Budget::new(8);
        for inode in 1..=3 {
            assert!(budget.look_up(inode));
        }
        budget.open(7, OPENED);
        assert!(budget.is_spent(), "half of eight");
        assert!(!budget.look_up(4));
        assert!(budget.look_up(3), "known already");
        assert!(!budget.forget(3, 1));
        assert!(!budget.look_up(4), "one lookup of 3 is left");
        assert!(budget.forget(3, 1));
        assert!(budget.look_up(4));
        assert!(budget.is_open(1, 7) && !budget.is_open(2, 7) && !budget.is_open(1, 8));
        budget.close(7);
        assert!(!budget.is_spent());
    }

    #[test]
    fn a_guest_that_forgets_what_it_never_had_changes_nothing() {
        let mut budget = Budget::new(4);
        assert!(!budget.forget(9, u64::MAX));
        budget.close(9);
        assert!(budget.look_up(1));
        budget.forget(1, u64::MAX);
        assert_eq!(budget.held(), 0);
    }

    #[test]
    fn large_limits_keep_a_fixed_reserve() {
        assert_eq!(Budget::new(1 << 20).limit, (1 << 20) - 2048);
        assert_eq!(Budget::new(1024).limit, 512);
        assert_eq!(Budget::new(0).limit, 0);
    }
}
