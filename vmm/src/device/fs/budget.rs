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
    handles: usize,
}

impl Budget {
    /// For a process that may have `descriptors` open at a time.
    pub fn new(descriptors: u64) -> Self {
        let limit = descriptors.saturating_sub(RESERVE.min(descriptors / 2));
        Self {
            limit: usize::try_from(limit).unwrap_or(usize::MAX),
            inodes: HashMap::new(),
            handles: 0,
        }
    }

    fn held(&self) -> usize {
        self.inodes.len().saturating_add(self.handles)
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

    /// The guest forgets `count` lookups of `inode`; true if it knows nothing of it now.
    pub fn forget(&mut self, inode: u64, count: u64) -> bool {
        if let Some(lookups) = self.inodes.get_mut(&inode) {
            *lookups = lookups.saturating_sub(count);
            if *lookups == 0 {
                self.inodes.remove(&inode);
            }
        }
        !self.inodes.contains_key(&inode)
    }

    /// A file was opened.
    pub fn open(&mut self) {
        self.handles = self.handles.saturating_add(1);
    }

    /// A file was closed.
    pub fn close(&mut self) {
        self.handles = self.handles.saturating_sub(1);
    }

    /// Everything was given back.
    pub fn clear(&mut self) {
        self.inodes = HashMap::new();
        self.handles = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spent_budget_refuses_new_files_only() {
        let mut budget = Budget::new(8);
        for inode in 1..=3 {
            assert!(budget.look_up(inode));
        }
        budget.open();
        assert!(budget.is_spent(), "half of eight");
        assert!(!budget.look_up(4));
        assert!(budget.look_up(3), "known already");
        budget.forget(3, 1);
        assert!(!budget.look_up(4), "one lookup of 3 is left");
        budget.forget(3, 1);
        assert!(budget.look_up(4));
        budget.close();
        assert!(!budget.is_spent());
    }

    #[test]
    fn a_guest_that_forgets_what_it_never_had_changes_nothing() {
        let mut budget = Budget::new(4);
        budget.forget(9, u64::MAX);
        budget.close();
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
