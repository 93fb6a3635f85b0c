//! The shim's log: the FIFO `log` in the first bundle, which containerd reads. What finds it full is lost, because a shim
//! must not stand still for its log.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use tracing_subscriber::fmt::MakeWriter;

/// Logs into the FIFO `log` of `bundle`, if there is one.
pub fn init(bundle: &Path, debug: bool) {
    // Open for reading too: so neither opening nor writing fails when containerd is away.
    let fifo = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(bundle.join("log"));
    let Ok(fifo) = fifo else { return };
    let level = if debug {
        tracing::Level::DEBUG
    } else {
        tracing::Level::INFO
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_ansi(false)
        .with_target(false)
        .with_writer(Log(Arc::new(fifo)))
        .init();
}

#[derive(Clone)]
struct Log(Arc<File>);

impl Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut fifo = &*self.0;
        let _ = fifo.write(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}
