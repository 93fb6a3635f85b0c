//! What the guest holds, as a message of a snapshot; and all of it found again in another process.

use std::collections::HashSet;
use std::ffi::{CStr, CString};
use std::io;

use cella_proto::snapshot::{FsHandle, FsInode, FsState};
use fuse_backend_rs::abi::fuse_abi::ROOT_ID;
use fuse_backend_rs::api::filesystem::{Context, FileSystem, FsOptions};
use fuse_backend_rs::passthrough::PassthroughFs;
use protobuf::Message;

use super::budget::Opened;
use super::guarded::{Guarded, OPENED_FLAGS, component, masked};
use super::held::Held;
use super::numbers::{self, Numbers};
use crate::device::DeviceError;

/// `NAME_MAX` of Linux.
const MAX_NAME: usize = 255;

/// Reads a state and checks that a guest within `limit` files could have had it.
///
/// # Errors
/// [`DeviceError::Snapshot`]: it could not.
pub fn read(bytes: &[u8], limit: usize) -> Result<FsState, DeviceError> {
    let state = FsState::parse_from_bytes(bytes)
        .map_err(|_| DeviceError::Snapshot("the saved files are no message"))?;
    check(&state, limit).map_err(DeviceError::Snapshot)?;
    Ok(state)
}

fn check(state: &FsState, limit: usize) -> Result<(), &'static str> {
    if state.inodes.len().saturating_add(state.handles.len()) > limit {
        return Err("it has saved more files than a guest may hold here");
    }
    let mut inodes = HashSet::from([ROOT_ID]);
    for inode in &state.inodes {
        if !(ROOT_ID..=numbers::MAX).contains(&inode.number) || inode.lookups == 0 {
            return Err("a saved inode is none that a guest could hold");
        }
        if !inode.name.is_empty() {
            is_name(&inode.name)?;
            // Those before it: so that there are no circles either.
            if !inodes.contains(&inode.parent) {
                return Err("a saved inode comes before its directory, or without");
            }
        }
        if !inodes.insert(inode.number) {
            return Err("two saved inodes have the same number");
        }
    }
    let mut handles = HashSet::new();
    for handle in &state.handles {
        if !(1..=numbers::MAX).contains(&handle.number) || !inodes.contains(&handle.inode) {
            return Err("a saved handle is none that a guest could have");
        }
        if !handles.insert(handle.number) {
            return Err("two saved handles have the same number");
        }
    }
    Ok(())
}

fn is_name(bytes: &[u8]) -> Result<(), &'static str> {
    let name = CString::new(bytes).ok();
    match name {
        Some(name) if component(&name).is_ok() && bytes.len() <= MAX_NAME => Ok(()),
        _ => Err("a saved inode's name is none of a file in a directory"),
    }
}

impl Guarded {
    /// What the guest holds. Asks nothing of the host.
    ///
    /// # Errors
    /// [`DeviceError::Snapshot`]: it has a file open that nothing would find again.
    pub fn save(&self) -> Result<FsState, DeviceError> {
        let held = self.held();
        let lookups = held.budget.inodes();
        let mut state = FsState {
            options: held.options.bits(),
            ..FsState::default()
        };
        let mut found = HashSet::from([ROOT_ID]);
        for ((parent, name), number) in held.names.reachable() {
            found.insert(number);
            state.inodes.push(FsInode {
                number,
                lookups: lookups.get(&number).copied().unwrap_or(1),
                parent,
                name: name.to_bytes().to_vec(),
                file_type: held.names.file_type(number),
                ..FsInode::default()
            });
        }
        let lost = lookups.iter().filter(|(number, _)| !found.contains(number));
        state.inodes.extend(lost.map(|(&number, &lookups)| FsInode {
            number,
            lookups,
            file_type: held.names.file_type(number),
            ..FsInode::default()
        }));
        for (&number, opened) in held.budget.handles() {
            let inode = opened.inode;
            // What an earlier restore lost stays lost.
            let is_lost = lookups.contains_key(&inode) && held.handles.server(number).is_err();
            if !found.contains(&inode) && !is_lost {
                return Err(DeviceError::Snapshot(
                    "the guest has a removed file open, which nothing would find again",
                ));
            }
            state.handles.push(FsHandle {
                number,
                inode,
                flags: opened.flags,
                directory: opened.directory,
                ..FsHandle::default()
            });
        }
        Ok(state)
    }

    /// Goes on with a session that another process has saved: `state` has been checked by [`read`]. What is not
    /// found, or cannot be opened, the guest holds as before, and hears `ESTALE` of whatever it asks about it. Of two
    /// numbers for what is now the same file the second is lost.
    ///
    /// # Errors
    /// The server cannot begin a session.
    pub fn restore(&self, state: &FsState) -> io::Result<()> {
        let (inner, ctx) = (self.inner(), &Context::new());
        self.init(FsOptions::from_bits_truncate(state.options))?;
        let mut held = self.held();
        let greatest = state.inodes.iter().map(|inode| inode.number).max();
        held.inodes = Numbers::after(greatest.unwrap_or_default());
        held.inodes.add(ROOT_ID, ROOT_ID);
        for inode in &state.inodes {
            held.budget.go_on(inode.number, inode.lookups);
            // A failure of any kind: there is no way to it.
            let _ = find(inner, ctx, &mut held, inode);
        }
        let greatest = state.handles.iter().map(|handle| handle.number).max();
        held.handles = Numbers::after(greatest.unwrap_or_default());
        for handle in &state.handles {
            let flags = masked(handle.flags, OPENED_FLAGS);
            let opened = Opened {
                inode: handle.inode,
                flags,
                directory: handle.directory,
            };
            held.budget.open(handle.number, opened);
            if let Ok(Some(server)) = reopen(inner, ctx, &held.inodes, opened) {
                held.handles.add(handle.number, server);
            }
        }
        Ok(())
    }
}

// Looks an inode up where it was: the server then holds it until the guest's last lookup is forgotten.
fn find(inner: &PassthroughFs, ctx: &Context, held: &mut Held, saved: &FsInode) -> io::Result<()> {
    let name = CString::new(saved.name.as_slice())?;
    let name: &CStr = component(&name)?;
    let parent = held.inodes.server(saved.parent)?;
    let entry = inner.lookup(ctx, parent, name)?;
    let mode = entry.attr.st_mode;
    if mode & libc::S_IFMT == saved.file_type && held.inodes.add(saved.number, entry.inode) {
        held.names.found((saved.parent, name), saved.number, mode);
    } else {
        inner.forget(ctx, entry.inode, 1);
    }
    Ok(())
}

fn reopen(
    inner: &PassthroughFs,
    ctx: &Context,
    inodes: &Numbers,
    opened: Opened,
) -> io::Result<Option<u64>> {
    let inode = inodes.server(opened.inode)?;
    if opened.directory {
        return Ok(inner.opendir(ctx, inode, opened.flags)?.0);
    }
    Ok(inner.open(ctx, inode, opened.flags, 0)?.0)
}
