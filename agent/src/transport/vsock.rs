//! connect(2) and bind(2) with AF_VSOCK addresses, which rustix does not know.

use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: sockaddr_vm is made of integers; all zeroes is a valid value.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

fn checked(result: libc::c_int) -> Result<(), Errno> {
    if result == 0 {
        return Ok(());
    }
    let error = std::io::Error::last_os_error();
    Err(Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

/// connect(2) to `port` of `cid`; INPROGRESS for a nonblocking socket.
pub(super) fn connect(socket: BorrowedFd<'_>, cid: u32, port: u32) -> Result<(), Errno> {
    let address = address(cid, port);
    // SAFETY: the address lives across the call and its size is the one given.
    checked(unsafe {
        libc::connect(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_vm>() as libc::socklen_t,
        )
    })
}

/// bind(2) to `port` of any CID.
pub(super) fn bind(socket: BorrowedFd<'_>, port: u32) -> Result<(), Errno> {
    let address = address(libc::VMADDR_CID_ANY, port);
    // SAFETY: the address lives across the call and its size is the one given.
    checked(unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_vm>() as libc::socklen_t,
        )
    })
}
