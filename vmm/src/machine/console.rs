//! The serial console, for debugging only: an 8250 whose output goes to a file.

use std::fs::File;
use std::io;
use std::sync::{Mutex, PoisonError};

use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use super::bus::BusDevice;

/// An 8250 on the bus of ports.
pub struct Console(Mutex<Serial<Line, NoEvents, File>>);

/// Its interrupt line.
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

impl Console {
    /// Bytes of its range of ports.
    pub const PORTS: u64 = 8;

    /// Writes to `output`; raises `line`.
    pub fn new(line: EventFd, output: File) -> Self {
        Self(Mutex::new(Serial::new(Line(line), output)))
    }
}

impl BusDevice for Console {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (Ok(offset), [byte]) = (u8::try_from(offset), data) {
            *byte = self
                .0
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .read(offset);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (Ok(offset), [byte]) = (u8::try_from(offset), data) {
            // Output that cannot be written is lost: the console is no reason to stop a guest.
            let _ = self
                .0
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .write(offset, *byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek};

    #[test]
    fn what_the_guest_writes_comes_out() {
        let mut file = tempfile::tempfile().unwrap();
        let console = Console::new(EventFd::new(0).unwrap(), file.try_clone().unwrap());
        for byte in *b"hello" {
            console.write(0, &[byte]);
        }
        // Wider accesses than the device has, and ports that it has not.
        console.write(0, b"xx");
        console.write(99, b"x");
        let mut wide = [0; 2];
        console.read(0, &mut wide);
        assert_eq!(wide, [0xff; 2]);
        file.rewind().unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
    }
}
