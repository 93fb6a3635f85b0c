//! Files of the companion's that it reads once: it gets copies in memory, which are taken away when it has read them.
//! A hypervisor that maps the guest's kernel has it resident for the machine's whole life otherwise.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use rustix::fs::{FallocateFlags, Mode, OFlags, fallocate, openat};

use super::JailError;
use super::error::Doing;
use super::root;

/// Bytes of the file system that holds the copies beside what is in them.
const SLACK: u64 = 1 << 20;

/// The copies and their lengths, for as long as they are needed.
#[derive(Debug, Default)]
pub struct Copies(Vec<(File, u64)>);

impl Copies {
    /// Copies `files` into a file system of their own, under their names; it is not mounted anywhere yet.
    pub(super) fn make(files: &[(PathBuf, String)]) -> Result<(Self, OwnedFd), JailError> {
        let mut sources = Vec::new();
        let mut bytes = SLACK;
        for (path, name) in files {
            let action = format!("opening {}", path.display());
            let file = File::open(path).doing(action.clone())?;
            let len = file.metadata().doing(action)?.len();
            bytes = bytes.saturating_add(len.next_multiple_of(4096));
            sources.push((file, path, name));
        }
        let mount =
            root::tmpfs(&bytes.to_string()).doing("making a tmpfs for the companion's files")?;
        let mut copies = Vec::new();
        for (mut source, path, name) in sources {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
            let mut copy = || -> io::Result<(File, u64)> {
                let mode = Mode::from_raw_mode(0o444);
                let mut copy = File::from(openat(&mount, name, flags, mode)?);
                let len = io::copy(&mut source, &mut copy)?;
                Ok((copy, len))
            };
            copies.push(copy().doing(format!("copying {}", path.display()))?);
        }
        Ok((Self(copies), mount))
    }

    /// Takes the content away: whoever still has it mapped sees zeros.
    ///
    /// # Errors
    /// The system's; nobody but the host's memory suffers from it.
    pub fn take_away(&mut self) -> io::Result<()> {
        for (copy, len) in self.0.drain(..) {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(&copy, flags, 0, len)?;
        }
        Ok(())
    }

    /// Whether all is gone.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
