//! Terminals.
use std::os::fd::BorrowedFd;

use super::{Error, Result};

/// Sets the size of the terminal whose master is `fd`.
pub fn resize(fd: BorrowedFd<'_>, rows: u16, columns: u16) -> Result<()> {
    let size = rustix::termios::Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    rustix::termios::tcsetwinsize(fd, size).map_err(|e| Error::Terminal {
        step: "setting the size",
        source: e.into(),
    })
}
