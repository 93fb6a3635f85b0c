//! This process's terminal, for `-t`.

use rustix::termios::{OptionalActions, Termios};

use super::Error;

/// The terminal in raw mode; dropped, it is as it was.
pub struct Raw(Termios);

impl Raw {
    /// Puts standard input into raw mode.
    ///
    /// # Errors
    /// It is no terminal.
    pub fn enter() -> Result<Self, Error> {
        let stdin = rustix::stdio::stdin();
        let before = rustix::termios::tcgetattr(stdin)
            .map_err(|e| Error::usage(format!("-t needs a terminal as standard input: {e}")))?;
        let mut raw = before.clone();
        raw.make_raw();
        rustix::termios::tcsetattr(stdin, OptionalActions::Now, &raw)
            .map_err(|e| Error::host("putting the terminal into raw mode", e))?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = rustix::termios::tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &self.0);
    }
}

/// Rows and columns of the terminal; 24 by 80 where there is none.
pub fn size() -> (u16, u16) {
    match rustix::termios::tcgetwinsize(rustix::stdio::stdin()) {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => (size.ws_row, size.ws_col),
        _ => (24, 80),
    }
}

/// Whether standard input is a terminal.
pub fn is_present() -> bool {
    rustix::termios::isatty(rustix::stdio::stdin())
}
