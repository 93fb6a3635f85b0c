//! Terminals: made in the container's own devpts, so that the container sees its terminal by a name of its own.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use super::report::{At, ChildResult, Message, Step};
use super::sys::{self, Errno};
use super::{Error, Result};

/// What [`Step::Terminal`]'s index means.
pub(super) const STEPS: [&str; 7] = [
    "opening /dev/ptmx of the container's devpts",
    "checking that it is a pseudo-terminal multiplexer",
    "unlocking the terminal",
    "opening the terminal",
    "setting its size",
    "handing it to the agent",
    "making it the controlling terminal",
];

/// Sets the size of the terminal whose master is `fd`, in characters.
pub fn resize(fd: BorrowedFd<'_>, rows: u16, columns: u16) -> Result<()> {
    let size = rustix::termios::Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    rustix::termios::tcsetwinsize(fd, size).map_err(|e| Error::Terminal {
        step: "setting its size",
        source: e.into(),
    })
}

/// In the child: makes a terminal in the devpts under `root` (a directory that is the container's root or will be),
/// sends its master to the agent, returns its slave.
pub(super) fn make(root: RawFd, size: Option<(u16, u16)>, socket: RawFd) -> ChildResult<RawFd> {
    let flags = libc::O_RDWR | libc::O_NOCTTY;
    // Not /dev/ptmx: an image may have anything there, while /dev/pts is known by its file system type.
    let master = sys::open_in_root(root, c"/dev/pts/ptmx", flags, 0).at_index(Step::Terminal, 0)?;
    let magic = sys::filesystem_type(master).at_index(Step::Terminal, 1)?;
    #[allow(
        clippy::unnecessary_cast,
        reason = "the type differs between C libraries"
    )]
    if magic != libc::DEVPTS_SUPER_MAGIC as i64 {
        return Err(Errno(libc::ENODEV)).at_index(Step::Terminal, 1);
    }
    let unlocked = 0i32;
    sys::ioctl(
        master,
        libc::TIOCSPTLCK,
        std::ptr::from_ref(&unlocked) as u64,
    )
    .at_index(Step::Terminal, 2)?;
    let slave = sys::ioctl(master, libc::TIOCGPTPEER, (flags | libc::O_CLOEXEC) as u64)
        .and_then(|fd| RawFd::try_from(fd).map_err(|_| Errno(libc::EBADF)))
        .at_index(Step::Terminal, 3)?;
    if let Some((rows, columns)) = size {
        let size = [rows, columns, 0, 0];
        sys::ioctl(master, libc::TIOCSWINSZ, size.as_ptr() as u64).at_index(Step::Terminal, 4)?;
    }
    send_descriptor(socket, master).at_index(Step::Terminal, 5)?;
    sys::close(master);
    Ok(slave)
}

/// In the child, a session leader: takes the terminal, and gives it to its user.
pub(super) fn make_controlling(slave: RawFd, uid: u32) -> ChildResult {
    sys::ioctl(slave, libc::TIOCSCTTY, 0).at_index(Step::Terminal, 6)?;
    if uid != 0 {
        // The group stays what devpts gave it (tty).
        sys::chown_at(slave, c"", uid, u32::MAX).at_index(Step::Terminal, 6)?;
    }
    Ok(())
}

/// Sends [`Message::Terminal`] with a descriptor, without allocation.
fn send_descriptor(socket: RawFd, fd: RawFd) -> Result<(), Errno> {
    let mut bytes = Message::Terminal.encode();
    let mut data = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    let mut control = [0u64; 4];
    // SAFETY: all zeroes is a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut data;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    let length = u32::try_from(size_of::<RawFd>()).unwrap_or(4);
    // SAFETY: computes a length.
    message.msg_controllen = unsafe { libc::CMSG_SPACE(length) } as _;
    // SAFETY: `control` is aligned and has room for one header and one descriptor (24 bytes of 32).
    unsafe {
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(length) as _;
        libc::CMSG_DATA(header).cast::<RawFd>().write_unaligned(fd);
    }
    // SAFETY: the message points to live buffers.
    let sent = unsafe { libc::syscall(libc::SYS_sendmsg, socket, &raw const message, 0) };
    if sent < 0 {
        return Err(Errno(
            std::io::Error::last_os_error()
                .raw_os_error()
                .unwrap_or(libc::EIO),
        ));
    }
    Ok(())
}

/// In the agent: the next message, with the descriptor that came along.
pub(super) fn receive(socket: impl AsFd) -> std::io::Result<(Message, Option<OwnedFd>)> {
    let mut bytes = [0u8; 16];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(
            &socket,
            &mut [std::io::IoSliceMut::new(&mut bytes)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )
    });
    let length = match received {
        Err(rustix::io::Errno::CONNRESET) => 0,
        other => other?.bytes,
    };
    let fd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    Ok((Message::decode(bytes.get(..length).unwrap_or_default()), fd))
}
