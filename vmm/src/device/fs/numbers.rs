//! The numbers that the guest has of inodes and handles, and the server's of the same.
//!
//! They are the same until a restore. A restored guest goes on with the numbers that a process of the past gave it, and this
//! process's server counts from the beginning: so the guest's old numbers have each one of the server's beside them, and all that
//! are new lie above the old ones.

use std::collections::HashMap;
use std::io;

use super::guarded::errno;

/// The greatest number that a guest can have had. The server's own stay below, so that sums of both fit.
pub const MAX: u64 = 1 << 62;

/// See the module.
#[derive(Debug, Default)]
pub struct Numbers {
    // The guest's numbers up to this one are of the past.
    past: u64,
    to_server: HashMap<u64, u64>,
    to_guest: HashMap<u64, u64>,
}

impl Numbers {
    /// For a guest that has had numbers up to `past`, at most [`MAX`]. None of them means anything until it is added.
    pub fn after(past: u64) -> Self {
        Self {
            past,
            ..Self::default()
        }
    }

    /// The guest's `number` of the past is the server's `server`; false if the server's has another number already.
    pub fn add(&mut self, number: u64, server: u64) -> bool {
        if self.to_guest.contains_key(&server) {
            return false;
        }
        self.to_guest.insert(server, number);
        self.to_server.insert(number, server);
        true
    }

    /// The server's number for the guest's.
    ///
    /// # Errors
    /// `ESTALE`: it was lost in the restore.
    pub fn server(&self, number: u64) -> io::Result<u64> {
        let found = match number.checked_sub(self.past) {
            // Whatever was restored has its old number alone.
            Some(server) if server > 0 => Some(server).filter(|it| !self.to_guest.contains_key(it)),
            _ if self.past == 0 => Some(number),
            _ => self.to_server.get(&number).copied(),
        };
        found.ok_or_else(|| errno(libc::ESTALE))
    }

    /// The guest's number for the server's.
    pub fn guest(&self, server: u64) -> u64 {
        match self.to_guest.get(&server) {
            Some(number) => *number,
            // The server counts, and does not reach the end.
            None => server.saturating_add(self.past),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stale(numbers: &Numbers, number: u64) -> bool {
        let answer = numbers.server(number);
        answer.is_err_and(|error| error.raw_os_error() == Some(libc::ESTALE))
    }

    #[test]
    fn without_a_past_they_are_the_same() {
        let numbers = Numbers::default();
        for number in [0, 1, 2, 99, u64::MAX] {
            assert_eq!(numbers.server(number).unwrap(), number);
            assert_eq!(numbers.guest(number), number);
        }
    }

    #[test]
    fn old_numbers_stay_and_new_ones_lie_above() {
        let mut numbers = Numbers::after(10);
        assert!(numbers.add(1, 1));
        assert!(numbers.add(10, 2));
        assert!(!numbers.add(7, 2), "the server's second has the number 10");
        assert_eq!(numbers.server(10).unwrap(), 2);
        assert_eq!(numbers.guest(2), 10);
        assert!(stale(&numbers, 7), "lost");
        assert!(stale(&numbers, 0));
        assert_eq!(numbers.guest(3), 13);
        assert_eq!(numbers.server(13).unwrap(), 3);
        assert!(stale(&numbers, 12), "a second number for the tenth");
        assert!(stale(&numbers, 11), "a second number for the root");
    }
}
