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
//! A long file because FUSE has many operations: one method each, most of which only pass on.

use std::ffi::CStr;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, stat64, statvfs64};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SetattrValid, ZeroCopyReader, ZeroCopyWriter,
};
use fuse_backend_rs::passthrough::PassthroughFs;

use rustix::fs::{AtFlags, CWD};

use super::budget::Budget;
use super::content::Contents;
use super::descriptor;

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
    budget: Mutex<Budget>,
    contents: Mutex<Contents>,
    // A session was begun and not ended.
    mounted: AtomicBool,
}

impl Guarded {
    /// Whether a guest has the file system mounted: it may hold inodes and files that exist in this process alone.
    pub fn is_mounted(&self) -> bool {
        self.mounted.load(Ordering::SeqCst)
    }

    /// Guards `inner`, within `budget`.
    pub fn new(inner: PassthroughFs, budget: Budget) -> Self {
        Self {
            inner,
            budget: Mutex::new(budget),
            contents: Mutex::default(),
            mounted: AtomicBool::new(false),
        }
    }

    // Both are whole after every step.
    fn budget(&self) -> MutexGuard<'_, Budget> {
        self.budget.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn contents(&self) -> MutexGuard<'_, Contents> {
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // Before anything is made that could not be held.
    fn can_hold(&self) -> io::Result<()> {
        match self.budget().is_spent() {
            true => Err(errno(libc::ENFILE)),
            false => Ok(()),
        }
    }

    // Counts an entry that goes to the guest.
    fn hold(&self, ctx: &Context, mut entry: Entry) -> io::Result<Entry> {
        if !self.budget().look_up(entry.inode) {
            self.inner.forget(ctx, entry.inode, 1);
            return Err(errno(libc::ENFILE));
        }
        entry.attr.st_ino = entry.inode;
        Ok(entry)
    }

    // An entry of something just made, for which there was room.
    fn make(
        &self,
        ctx: &Context,
        make: impl FnOnce(&PassthroughFs) -> io::Result<Entry>,
    ) -> io::Result<Entry> {
        self.can_hold()?;
        let entry = make(&self.inner)?;
        self.hold(ctx, entry)
    }

    fn counted<T>(&self, opened: io::Result<T>) -> io::Result<T> {
        if opened.is_ok() {
            self.budget().open();
        }
        opened
    }

    fn closed(&self, closed: io::Result<()>) -> io::Result<()> {
        if closed.is_ok() {
            self.budget().close();
        }
        closed
    }
}

fn errno(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

// A name that cannot lead out of its directory.
fn component(name: &CStr) -> io::Result<&CStr> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(errno(libc::EINVAL)),
        bytes if bytes.contains(&b'/') => Err(errno(libc::EINVAL)),
        _ => Ok(name),
    }
}

fn masked(flags: u32, allowed: i32) -> u32 {
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

// The server links by an empty path, for which the kernel wants CAP_DAC_READ_SEARCH in the host's user namespace.
// Following the descriptor's link in /proc needs nothing.
fn link(
    inner: &PassthroughFs,
    ctx: &Context,
    inode: u64,
    newparent: u64,
    name: &CStr,
) -> io::Result<()> {
    let Ok(file) = descriptor::open(inner, ctx, inode) else {
        // Not a regular file: only the server can.
        return inner.link(ctx, inode, newparent, name).map(|entry| {
            // Looked up once more by the caller.
            inner.forget(ctx, entry.inode, 1);
        });
    };
    let directory = descriptor::open(inner, ctx, newparent)?;
    let old = format!("/proc/self/fd/{}", file.as_raw_fd());
    let follow = AtFlags::SYMLINK_FOLLOW;
    Ok(rustix::fs::linkat(CWD, old, directory, name, follow)?)
}

impl FileSystem for Guarded {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        // DAX would have files mapped into the guest.
        let capable = capable.difference(FsOptions::PERFILE_DAX);
        // A new session begins with nothing held.
        self.destroy();
        self.mounted.store(true, Ordering::SeqCst);
        Ok(self.inner.init(capable)? | OPTIONS)
    }

    fn destroy(&self) {
        self.mounted.store(false, Ordering::SeqCst);
        self.inner.destroy();
        self.budget().clear();
        self.contents().clear();
    }

    fn lookup(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        let entry = self.inner.lookup(ctx, parent, component(name)?)?;
        self.hold(ctx, entry)
    }

    fn forget(&self, ctx: &Context, inode: u64, count: u64) {
        self.inner.forget(ctx, inode, count);
        if self.budget().forget(inode, count) {
            self.contents().forget(inode);
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
        own_number(inode, self.inner.getattr(ctx, inode, handle))
    }

    fn setattr(
        &self,
        ctx: &Context,
        inode: u64,
        attr: stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        own_number(inode, self.inner.setattr(ctx, inode, attr, handle, valid))
    }

    fn readlink(&self, ctx: &Context, inode: u64) -> io::Result<Vec<u8>> {
        self.inner.readlink(ctx, inode)
    }

    fn symlink(
        &self,
        ctx: &Context,
        linkname: &CStr,
        parent: u64,
        name: &CStr,
    ) -> io::Result<Entry> {
        let name = component(name)?;
        self.make(ctx, |inner| inner.symlink(ctx, linkname, parent, name))
    }

    fn mknod(
        &self,
        ctx: &Context,
        inode: u64,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        let name = component(name)?;
        self.make(ctx, |inner| {
            inner.mknod(ctx, inode, name, mode, rdev, umask)
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
        self.make(ctx, |inner| inner.mkdir(ctx, parent, name, mode, umask))
    }

    fn unlink(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.inner.unlink(ctx, parent, component(name)?)
    }

    fn rmdir(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.inner.rmdir(ctx, parent, component(name)?)
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
        let (old, new) = (component(oldname)?, component(newname)?);
        self.inner.rename(ctx, olddir, old, newdir, new, flags)
    }

    fn link(&self, ctx: &Context, inode: u64, newparent: u64, newname: &CStr) -> io::Result<Entry> {
        let name = component(newname)?;
        self.make(ctx, |inner| {
            link(inner, ctx, inode, newparent, name)?;
            inner.lookup(ctx, newparent, name)
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
        let opened = self.inner.open(ctx, inode, flags, fuse_flags);
        let (handle, mut options, passthrough) = self.counted(opened)?;
        if let Ok((stat, _)) = self.inner.getattr(ctx, inode, handle)
            && self.contents().open(inode, &stat)
        {
            options |= OpenOptions::KEEP_CACHE;
        }
        Ok((handle, options, passthrough))
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
        let (entry, handle, options, passthrough) = self.inner.create(ctx, parent, name, args)?;
        let entry = self.hold(ctx, entry)?;
        self.budget().open();
        Ok((entry, handle, options, passthrough))
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
        self.inner.flush(ctx, inode, handle, lock_owner)
    }

    fn fsync(&self, ctx: &Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
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
        self.closed(
            self.inner
                .release(ctx, inode, flags, handle, flush, flock_release, lock_owner),
        )
    }

    fn statfs(&self, ctx: &Context, inode: u64) -> io::Result<statvfs64> {
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
        self.inner.setxattr(ctx, inode, name, value, flags)
    }

    fn getxattr(
        &self,
        ctx: &Context,
        inode: u64,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        self.inner.getxattr(ctx, inode, name, size.min(MAX_XATTR))
    }

    fn listxattr(&self, ctx: &Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        self.inner.listxattr(ctx, inode, size.min(MAX_XATTR))
    }

    fn removexattr(&self, ctx: &Context, inode: u64, name: &CStr) -> io::Result<()> {
        self.inner.removexattr(ctx, inode, name)
    }

    fn opendir(
        &self,
        ctx: &Context,
        inode: u64,
        flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        self.can_hold()?;
        let flags = masked(flags, OPEN_FLAGS & !libc::O_TRUNC);
        self.counted(self.inner.opendir(ctx, inode, flags))
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
        let size = size.min(MAX_READDIR);
        // The entries' numbers are the server's own.
        self.inner
            .readdir(ctx, inode, handle, size, offset, add_entry)
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
        let mut add = |mut name: DirEntry<'_>, mut entry: Entry| {
            let inode = entry.inode;
            name.ino = inode;
            entry.attr.st_ino = inode;
            let held = self.budget().look_up(inode);
            if !held {
                // Says that nothing was looked up: the guest asks again when it needs to.
                entry.inode = 0;
            }
            let added = add_entry(name, entry);
            let taken = matches!(added, Ok(1..));
            if held && !taken {
                self.budget().forget(inode, 1);
            }
            if !held && taken {
                // What did not fit (nothing taken) the inner file system forgets by itself.
                self.inner.forget(ctx, inode, 1);
            }
            added
        };
        self.inner
            .readdirplus(ctx, inode, handle, size, offset, &mut add)
    }

    fn fsyncdir(&self, ctx: &Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        self.inner.fsyncdir(ctx, inode, datasync, handle)
    }

    fn releasedir(&self, ctx: &Context, inode: u64, flags: u32, handle: u64) -> io::Result<()> {
        self.closed(self.inner.releasedir(ctx, inode, flags, handle))
    }

    fn access(&self, ctx: &Context, inode: u64, mask: u32) -> io::Result<()> {
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
        self.inner.lseek(ctx, inode, handle, offset, whence)
    }
}
