//! A decorator of fuse-backend-rs's pass-through file system that holds a hostile guest to the rules.
//!
//! | rule | why |
//! | --- | --- |
//! | a name is one component: no slash, not `.`, not `..` | the share's directories have parents |
//! | open flags are those that an ordinary open has | `O_PATH` would follow a symbolic link where creating does not, `O_DIRECT` and `O_ASYNC` act on the VMM |
//! | sizes that the server allocates are capped | they come from the guest |
//! | files held are counted ([`Budget`]) | the descriptors are the process's |
//! | inode numbers are the server's own | files of different mounts in the share have the same numbers on the host |
//!
//! It knows what the guest holds and by which names it can be found ([`Held`]), for a snapshot ([`super::saved`]). The guest's
//! numbers are not always the server's ([`super::numbers`]): all that it sees and says are translated here. The server holds an inode
//! until the guest's last lookup is forgotten; how many there are is counted here alone.
//!
//! A long file because FUSE has many operations: one method each, most of which only pass on.

use std::ffi::{CStr, CString};
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, stat64, statvfs64};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SetattrValid, ZeroCopyReader, ZeroCopyWriter,
};
use fuse_backend_rs::passthrough::PassthroughFs;

use super::budget::{Budget, Opened};
use super::descriptor;
use super::held::Held;
use super::names::Place;

/// Directory entries are read in pieces of at most this many bytes, whatever the guest has room for.
const MAX_READDIR: u32 = 64 * 1024;
/// `XATTR_SIZE_MAX` and `XATTR_LIST_MAX` of Linux.
const MAX_XATTR: u32 = 64 * 1024;

/// Flags that an open may have. `O_DIRECT` is left out: the guest's buffers need not be aligned as the host's file
/// system wants it.
const OPEN_FLAGS: i32 = libc::O_ACCMODE
    | libc::O_APPEND
    | libc::O_TRUNC
    | libc::O_NONBLOCK
    | libc::O_SYNC
    | libc::O_LARGEFILE
    | libc::O_DIRECTORY;
/// Of these, what an open file goes on with: the rest had its effect.
pub const OPENED_FLAGS: i32 = OPEN_FLAGS & !libc::O_TRUNC;
/// Flags that a create may have besides.
const CREATE_FLAGS: i32 = libc::O_CREAT | libc::O_EXCL;
/// Flags that the kernel changes on an open file.
const FILE_FLAGS: i32 = libc::O_ACCMODE | libc::O_APPEND | libc::O_NONBLOCK | libc::O_LARGEFILE;

/// What the server asks of the guest's driver, besides what the pass-through file system does.
const OPTIONS: FsOptions = FsOptions::ASYNC_READ
    .union(FsOptions::BIG_WRITES)
    .union(FsOptions::MAX_PAGES)
    .union(FsOptions::PARALLEL_DIROPS)
    .union(FsOptions::ASYNC_DIO)
    .union(FsOptions::ATOMIC_O_TRUNC)
    .union(FsOptions::CACHE_SYMLINKS)
    // A file that the host has changed is read anew.
    .union(FsOptions::AUTO_INVAL_DATA);

/// See the module.
pub struct Guarded {
    inner: PassthroughFs,
    held: Mutex<Held>,
}

impl Guarded {
    /// Guards `inner`, within `budget`.
    pub fn new(inner: PassthroughFs, budget: Budget) -> Self {
        Self {
            inner,
            held: Mutex::new(Held::new(budget)),
        }
    }

    /// What the guest holds; whole after every step.
    pub fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The server.
    pub fn inner(&self) -> &PassthroughFs {
        &self.inner
    }

    // The server's number of the guest's inode.
    fn inode(&self, inode: u64) -> io::Result<u64> {
        self.held().inodes.server(inode)
    }

    // The server's numbers of the guest's inode and handle.
    fn file(&self, inode: u64, handle: u64) -> io::Result<(u64, u64)> {
        let held = self.held();
        Ok((held.inodes.server(inode)?, held.handles.server(handle)?))
    }

    fn file_or_inode(&self, inode: u64, handle: Option<u64>) -> io::Result<(u64, Option<u64>)> {
        let held = self.held();
        let handle = handle.map(|handle| held.handles.server(handle));
        Ok((held.inodes.server(inode)?, handle.transpose()?))
    }

    // Before anything is made that could not be held.
    fn can_hold(&self) -> io::Result<()> {
        match self.held().budget.is_spent() {
            true => Err(errno(libc::ENFILE)),
            false => Ok(()),
        }
    }

    // Counts an entry that goes to the guest, under the guest's number.
    fn hold(&self, ctx: &Context, place: Place<'_>, mut entry: Entry) -> io::Result<Entry> {
        let held = &mut *self.held();
        let server = entry.inode;
        entry.inode = held.inodes.guest(server);
        if !held.budget.look_up(entry.inode) {
            self.inner.forget(ctx, server, 1);
            return Err(errno(libc::ENFILE));
        }
        held.names.found(place, entry.inode, entry.attr.st_mode);
        entry.attr.st_ino = entry.inode;
        Ok(entry)
    }

    // An entry of something just made in a directory, by its server's number, for which there was room.
    fn make(
        &self,
        ctx: &Context,
        place: Place<'_>,
        make: impl FnOnce(&PassthroughFs, u64) -> io::Result<Entry>,
    ) -> io::Result<Entry> {
        self.can_hold()?;
        let entry = make(&self.inner, self.inode(place.0)?)?;
        self.hold(ctx, place, entry)
    }

    // Counts an open file; the guest's number of its handle.
    fn opened(&self, handle: Option<u64>, opened: Opened) -> Option<u64> {
        let held = &mut *self.held();
        let number = held.handles.guest(handle?);
        held.budget.open(number, opened);
        Some(number)
    }

    fn close(
        &self,
        inode: u64,
        handle: u64,
        close: impl FnOnce(u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        if !self.held().budget.is_open(inode, handle) {
            return Err(errno(libc::EBADF));
        }
        // What a restore has lost the server does not have.
        if let Ok((inode, handle)) = self.file(inode, handle) {
            close(inode, handle)?;
        }
        self.held().budget.close(handle);
        Ok(())
    }
}

/// The error of an error number.
pub fn errno(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

/// `name`, if it cannot lead out of its directory.
///
/// # Errors
/// `EINVAL`: it could.
pub fn component(name: &CStr) -> io::Result<&CStr> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(errno(libc::EINVAL)),
        bytes if bytes.contains(&b'/') => Err(errno(libc::EINVAL)),
        _ => Ok(name),
    }
}

/// What is `allowed` of `flags`.
pub fn masked(flags: u32, allowed: i32) -> u32 {
    // The bits of flags, which are positive.
    flags & allowed as u32
}

fn own_number(
    inode: u64,
    attributes: io::Result<(stat64, Duration)>,
) -> io::Result<(stat64, Duration)> {
    attributes.map(|(mut stat, timeout)| {
        stat.st_ino = inode;
        (stat, timeout)
    })
}

impl FileSystem for Guarded {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        // DAX would have files mapped into the guest.
        let capable = capable.difference(FsOptions::PERFILE_DAX);
        // A new session begins with nothing held.
        self.destroy();
        let options = self.inner.init(capable)? | OPTIONS;
        self.held().options = capable;
        Ok(options)
    }

    fn destroy(&self) {
        self.inner.destroy();
        self.held().clear();
    }

    fn lookup(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        let name = component(name)?;
        let entry = self.inner.lookup(ctx, self.inode(parent)?, name)?;
        self.hold(ctx, (parent, name), entry)
    }

    fn forget(&self, ctx: &Context, inode: u64, count: u64) {
        let held = &mut *self.held();
        if !held.budget.forget(inode, count) {
            return;
        }
        held.names.forget(inode);
        held.contents.forget(inode);
        if let Ok(server) = held.inodes.server(inode) {
            // All of them: after a restore the server has not counted as many as the guest.
            self.inner.forget(ctx, server, u64::MAX);
        }
    }

    fn batch_forget(&self, ctx: &Context, requests: Vec<(u64, u64)>) {
        for (inode, count) in requests {
            self.forget(ctx, inode, count);
        }
    }

    fn getattr(
        &self,
        ctx: &Context,
        inode: u64,
        handle: Option<u64>,
    ) -> io::Result<(stat64, Duration)> {
        let (server, handle) = self.file_or_inode(inode, handle)?;
        own_number(inode, self.inner.getattr(ctx, server, handle))
    }

    fn setattr(
        &self,
        ctx: &Context,
        inode: u64,
        attr: stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        let (server, handle) = self.file_or_inode(inode, handle)?;
        own_number(inode, self.inner.setattr(ctx, server, attr, handle, valid))
    }

    fn readlink(&self, ctx: &Context, inode: u64) -> io::Result<Vec<u8>> {
        self.inner.readlink(ctx, self.inode(inode)?)
    }

    fn symlink(
        &self,
        ctx: &Context,
        linkname: &CStr,
        parent: u64,
        name: &CStr,
    ) -> io::Result<Entry> {
        let name = component(name)?;
        self.make(ctx, (parent, name), |inner, parent| {
            inner.symlink(ctx, linkname, parent, name)
        })
    }

    fn mknod(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        let name = component(name)?;
        self.make(ctx, (parent, name), |inner, parent| {
            inner.mknod(ctx, parent, name, mode, rdev, umask)
        })
    }

    fn mkdir(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        let name = component(name)?;
        self.make(ctx, (parent, name), |inner, parent| {
            inner.mkdir(ctx, parent, name, mode, umask)
        })
    }

    fn unlink(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        let name = component(name)?;
        self.inner.unlink(ctx, self.inode(parent)?, name)?;
        self.held().names.removed((parent, name));
        Ok(())
    }

    fn rmdir(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        let name = component(name)?;
        self.inner.rmdir(ctx, self.inode(parent)?, name)?;
        self.held().names.removed((parent, name));
        Ok(())
    }

    fn rename(
        &self,
        ctx: &Context,
        olddir: u64,
        oldname: &CStr,
        newdir: u64,
        newname: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        let old = (olddir, component(oldname)?);
        let new = (newdir, component(newname)?);
        let (from, to) = (self.inode(olddir)?, self.inode(newdir)?);
        self.inner.rename(ctx, from, old.1, to, new.1, flags)?;
        let names = &mut self.held().names;
        match flags & libc::RENAME_EXCHANGE {
            0 => names.moved(old, new),
            _ => names.exchanged(old, new),
        }
        Ok(())
    }

    fn link(&self, ctx: &Context, inode: u64, newparent: u64, newname: &CStr) -> io::Result<Entry> {
        let name = component(newname)?;
        let inode = self.inode(inode)?;
        self.make(ctx, (newparent, name), |inner, parent| {
            descriptor::link(inner, ctx, inode, parent, name)?;
            inner.lookup(ctx, parent, name)
        })
    }

    fn open(
        &self,
        ctx: &Context,
        inode: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        self.can_hold()?;
        let flags = masked(flags, OPEN_FLAGS);
        let server = self.inode(inode)?;
        let (handle, mut options, passthrough) = self.inner.open(ctx, server, flags, fuse_flags)?;
        if let Ok((stat, _)) = self.inner.getattr(ctx, server, handle)
            && self.held().contents.open(inode, &stat)
        {
            options |= OpenOptions::KEEP_CACHE;
        }
        let opened = Opened {
            inode,
            flags: masked(flags, OPENED_FLAGS),
            directory: false,
        };
        Ok((self.opened(handle, opened), options, passthrough))
    }

    fn create(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        let name = component(name)?;
        self.can_hold()?;
        let args = CreateIn {
            flags: masked(args.flags, OPEN_FLAGS | CREATE_FLAGS),
            ..args
        };
        let server = self.inode(parent)?;
        let (entry, handle, options, passthrough) = self.inner.create(ctx, server, name, args)?;
        let entry = self.hold(ctx, (parent, name), entry)?;
        let opened = Opened {
            inode: entry.inode,
            flags: masked(args.flags, OPENED_FLAGS),
            directory: false,
        };
        Ok((entry, self.opened(handle, opened), options, passthrough))
    }

    fn read(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        w: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        let (inode, handle) = self.file(inode, handle)?;
        let flags = masked(flags, FILE_FLAGS);
        self.inner
            .read(ctx, inode, handle, w, size, offset, lock_owner, flags)
    }

    fn write(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        r: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed_write: bool,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        let (inode, handle) = self.file(inode, handle)?;
        let flags = masked(flags, FILE_FLAGS);
        self.inner.write(
            ctx,
            inode,
            handle,
            r,
            size,
            offset,
            lock_owner,
            delayed_write,
            flags,
            fuse_flags,
        )
    }

    fn flush(&self, ctx: &Context, inode: u64, handle: u64, lock_owner: u64) -> io::Result<()> {
        let (inode, handle) = self.file(inode, handle)?;
        self.inner.flush(ctx, inode, handle, lock_owner)
    }

    fn fsync(&self, ctx: &Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        let (inode, handle) = self.file(inode, handle)?;
        self.inner.fsync(ctx, inode, datasync, handle)
    }

    fn fallocate(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        let (inode, handle) = self.file(inode, handle)?;
        self.inner
            .fallocate(ctx, inode, handle, mode, offset, length)
    }

    fn release(
        &self,
        ctx: &Context,
        inode: u64,
        flags: u32,
        handle: u64,
        flush: bool,
        flock_release: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        self.close(inode, handle, |inode, handle| {
            self.inner
                .release(ctx, inode, flags, handle, flush, flock_release, lock_owner)
        })
    }

    fn statfs(&self, ctx: &Context, inode: u64) -> io::Result<statvfs64> {
        let inode = self.inode(inode)?;
        self.inner.statfs(ctx, inode)
    }

    fn setxattr(
        &self,
        ctx: &Context,
        inode: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> io::Result<()> {
        let inode = self.inode(inode)?;
        self.inner.setxattr(ctx, inode, name, value, flags)
    }

    fn getxattr(
        &self,
        ctx: &Context,
        inode: u64,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        let inode = self.inode(inode)?;
        self.inner.getxattr(ctx, inode, name, size.min(MAX_XATTR))
    }

    fn listxattr(&self, ctx: &Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        let inode = self.inode(inode)?;
        self.inner.listxattr(ctx, inode, size.min(MAX_XATTR))
    }

    fn removexattr(&self, ctx: &Context, inode: u64, name: &CStr) -> io::Result<()> {
        let inode = self.inode(inode)?;
        self.inner.removexattr(ctx, inode, name)
    }

    fn opendir(
        &self,
        ctx: &Context,
        inode: u64,
        flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        self.can_hold()?;
        let flags = masked(flags, OPENED_FLAGS);
        let (handle, options) = self.inner.opendir(ctx, self.inode(inode)?, flags)?;
        let opened = Opened {
            inode,
            flags,
            directory: true,
        };
        Ok((self.opened(handle, opened), options))
    }

    fn readdir(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let (inode, handle) = self.file(inode, handle)?;
        let size = size.min(MAX_READDIR);
        // The entries' numbers are the server's own.
        let mut add = |mut name: DirEntry<'_>| {
            name.ino = self.held().inodes.guest(name.ino);
            add_entry(name)
        };
        self.inner
            .readdir(ctx, inode, handle, size, offset, &mut add)
    }

    fn readdirplus(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let size = size.min(MAX_READDIR);
        let (directory, (server, handle)) = (inode, self.file(inode, handle)?);
        let mut add = |mut name: DirEntry<'_>, mut entry: Entry| {
            let server = entry.inode;
            let mode = entry.attr.st_mode;
            let inode = self.held().inodes.guest(server);
            (name.ino, entry.inode, entry.attr.st_ino) = (inode, inode, inode);
            let place = name.name;
            let held = self.held().budget.look_up(inode);
            if !held {
                // Says that nothing was looked up: the guest asks again when it needs to.
                entry.inode = 0;
            }
            let added = add_entry(name, entry);
            let taken = matches!(added, Ok(1..));
            match (held, taken) {
                (true, true) => {
                    if let Ok(name) = CString::new(place) {
                        self.held().names.found((directory, &name), inode, mode);
                    }
                }
                (true, false) => {
                    self.held().budget.forget(inode, 1);
                }
                // What did not fit (nothing taken) the inner file system forgets by itself.
                (false, true) => self.inner.forget(ctx, server, 1),
                (false, false) => {}
            }
            added
        };
        self.inner
            .readdirplus(ctx, server, handle, size, offset, &mut add)
    }

    fn fsyncdir(&self, ctx: &Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        let (inode, handle) = self.file(inode, handle)?;
        self.inner.fsyncdir(ctx, inode, datasync, handle)
    }

    fn releasedir(&self, ctx: &Context, inode: u64, flags: u32, handle: u64) -> io::Result<()> {
        self.close(inode, handle, |inode, handle| {
            self.inner.releasedir(ctx, inode, flags, handle)
        })
    }

    fn access(&self, ctx: &Context, inode: u64, mask: u32) -> io::Result<()> {
        let inode = self.inode(inode)?;
        self.inner.access(ctx, inode, mask)
    }

    fn lseek(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        let (inode, handle) = self.file(inode, handle)?;
        self.inner.lseek(ctx, inode, handle, offset, whence)
    }
}
