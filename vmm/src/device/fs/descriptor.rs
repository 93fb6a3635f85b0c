//! A descriptor of a file that the pass-through server holds.
//!
//! The server keeps its descriptors to itself but for one door: a request to map a file into the guest (DAX) opens
//! it and passes the descriptor on. This device maps nothing, so that the door is free for calls that the server
//! cannot make inside of a user namespace.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use fuse_backend_rs::abi::virtio_fs::RemovemappingOne;
use fuse_backend_rs::api::filesystem::{Context, FileSystem};
use fuse_backend_rs::passthrough::PassthroughFs;
use fuse_backend_rs::transport::FsCacheReqHandler;
use rustix::fs::{AtFlags, CWD};

#[derive(Default)]
struct Catch(Option<OwnedFd>);

impl FsCacheReqHandler for Catch {
    fn map(&mut self, _: u64, _: u64, _: u64, _: u64, fd: RawFd) -> io::Result<()> {
        // SAFETY: the server has the file open until this call returns.
        let file = unsafe { BorrowedFd::borrow_raw(fd) };
        self.0 = Some(file.try_clone_to_owned()?);
        Ok(())
    }

    fn unmap(&mut self, _: Vec<RemovemappingOne>) -> io::Result<()> {
        Ok(())
    }
}

/// Opens `inode` for reading.
///
/// # Errors
/// `EBADF` if the server does not know it or it is neither a regular file nor a directory; as open(2).
pub fn open(inner: &PassthroughFs, ctx: &Context, inode: u64) -> io::Result<OwnedFd> {
    let mut catch = Catch::default();
    inner.setupmapping(ctx, inode, 0, 0, 0, 0, 0, &mut catch)?;
    catch.0.ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// Makes `name` in `newparent` another name of `inode`. The server links by an empty path, for which the kernel wants
/// `CAP_DAC_READ_SEARCH` in the host's user namespace; following the descriptor's link in /proc needs nothing.
///
/// # Errors
/// As linkat(2).
pub fn link(
    inner: &PassthroughFs,
    ctx: &Context,
    inode: u64,
    newparent: u64,
    name: &CStr,
) -> io::Result<()> {
    let Ok(file) = open(inner, ctx, inode) else {
        // Not a regular file: only the server can.
        return inner.link(ctx, inode, newparent, name).map(|entry| {
            // Looked up once more by the caller.
            inner.forget(ctx, entry.inode, 1);
        });
    };
    let directory = open(inner, ctx, newparent)?;
    let old = format!("/proc/self/fd/{}", file.as_raw_fd());
    let follow = AtFlags::SYMLINK_FOLLOW;
    Ok(rustix::fs::linkat(CWD, old, directory, name, follow)?)
}
