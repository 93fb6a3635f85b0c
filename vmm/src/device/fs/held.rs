//! A guest's session: what it has of the file system.

use fuse_backend_rs::api::filesystem::FsOptions;

use super::budget::Budget;
use super::content::Contents;
use super::names::Names;
use super::numbers::Numbers;

/// See the module. Whole after every step; everything is by the guest's numbers.
pub struct Held {
    /// The inodes and the handles.
    pub budget: Budget,
    /// Where the inodes are.
    pub names: Names,
    /// What the guest has cached.
    pub contents: Contents,
    /// The server's numbers of the inodes.
    pub inodes: Numbers,
    /// The server's numbers of the handles.
    pub handles: Numbers,
    /// What the guest's driver can do.
    pub options: FsOptions,
}

impl Held {
    /// Nothing yet, and never more than `budget` allows.
    pub fn new(budget: Budget) -> Self {
        Self {
            budget,
            names: Names::default(),
            contents: Contents::default(),
            inodes: Numbers::default(),
            handles: Numbers::default(),
            options: FsOptions::empty(),
        }
    }

    /// The session has ended.
    pub fn clear(&mut self) {
        self.budget.clear();
        self.names = Names::default();
        self.contents.clear();
        self.inodes = Numbers::default();
        self.handles = Numbers::default();
        self.options = FsOptions::empty();
    }
}
