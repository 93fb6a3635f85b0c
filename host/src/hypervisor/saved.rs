//! A saved virtual machine on disk: `state` and `memory` in a directory.

use std::fs::File;
use std::io;
use std::path::Path;

use crate::own_files;

const STATE: &str = "state";
const MEMORY: &str = "memory";

/// The files of a saved virtual machine, as `vmm.proto`'s Snapshot has them.
#[derive(Debug)]
pub struct SavedVm {
    /// Registers, interrupt controllers, devices.
    pub state: File,
    /// The guest's memory, with holes where it was never used.
    pub memory: File,
}

impl SavedVm {
    /// The names of the files.
    pub const FILES: [&str; 2] = [STATE, MEMORY];

    /// Makes the files in `dir`, for a machine with `memory_bytes` of memory.
    ///
    /// # Errors
    /// They cannot be made.
    pub fn create(dir: &Path, memory_bytes: u64) -> io::Result<Self> {
        let state = own_files::make(&dir.join(STATE))?;
        let memory = own_files::make(&dir.join(MEMORY))?;
        memory.set_len(memory_bytes)?;
        Ok(Self { state, memory })
    }

    /// Opens the files in `dir`, if nobody but this user can have written them.
    ///
    /// # Errors
    /// See [`own_files::open`].
    pub fn open(dir: &Path) -> io::Result<Self> {
        Ok(Self {
            state: own_files::open(&dir.join(STATE))?,
            memory: own_files::open(&dir.join(MEMORY))?,
        })
    }

    /// Has what was written reach the disk.
    ///
    /// # Errors
    /// Those of fsync(2).
    pub fn sync(&self) -> io::Result<()> {
        self.memory.sync_all()?;
        self.state.sync_all()
    }
}
