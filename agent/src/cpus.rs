//! CPUs that a clone has beyond its template's: the kernel knows of them since its boot, and has started none of them yet.

use std::io::{self, Write};
use std::path::Path;

use crate::info;
use crate::sandbox::Error;

/// A directory for each CPU that the kernel knows of.
const CPUS: &str = "/sys/devices/system/cpu";
/// Whether whoever waits for every CPU's readers (RCU) interrupts the CPUs instead of waiting for their next tick.
const EXPEDITED: &str = "/sys/kernel/rcu_expedited";

/// Starts those of the first `cpus` CPUs that are not in use: processes run on them when this returns. Nothing to do for 0.
///
/// # Errors
/// The kernel knows of fewer, or one does not start.
pub fn take_into_use(cpus: u32) -> Result<(), Error> {
    match cpus {
        0 => Ok(()),
        _ => bring_online(Path::new(CPUS), Path::new(EXPEDITED), cpus),
    }
}

fn bring_online(dir: &Path, expedited: &Path, cpus: u32) -> Result<(), Error> {
    let list = dir.join("online");
    let online = std::fs::read_to_string(&list).map_err(|source| Error::System {
        doing: "reading",
        what: list.display().to_string(),
        source,
    })?;
    // A kernel starts them in the order of their numbers: the first that is missing is the next.
    let missing = info::count(&online)..cpus;
    if missing.is_empty() {
        return Ok(());
    }
    // Each CPU waits for the readers. It takes 1.3 s where the kernel is emulated, and 0.9 s like this; it works either way.
    let _ = switch(expedited, "1");
    let started = missing.into_iter().try_for_each(|number| {
        switch(&dir.join(format!("cpu{number}/online")), "1").map_err(|source| Error::System {
            doing: "bringing online",
            what: format!("CPU {number} of {cpus}"),
            source,
        })
    });
    let _ = switch(expedited, "0");
    started
}

/// Writes to a file of sysfs. It is not made where it is missing: the kernel does not know it then.
fn switch(path: &Path, value: &str) -> io::Result<()> {
    let mut file = std::fs::File::options().write(true).open(path)?;
    file.write_all(value.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_that_are_missing_are_started() {
        let dir = tempfile::tempdir().unwrap();
        let switch = |number: u32| dir.path().join(format!("cpu{number}/online"));
        let expedited = dir.path().join("rcu_expedited");
        let bring_online = |cpus| bring_online(dir.path(), &expedited, cpus);
        std::fs::write(dir.path().join("online"), "0-1\n").unwrap();
        for number in 1..4 {
            std::fs::create_dir(dir.path().join(format!("cpu{number}"))).unwrap();
            std::fs::write(switch(number), "?").unwrap();
        }
        let state = |number| std::fs::read_to_string(switch(number)).unwrap();
        bring_online(2).unwrap();
        assert_eq!([state(1), state(2)], ["?", "?"]);
        // Without the one that only makes it quicker, and with it.
        bring_online(3).unwrap();
        assert_eq!([state(1), state(2), state(3)], ["?", "1", "?"]);
        let error = bring_online(5).unwrap_err();
        assert_eq!(error.to_string(), "bringing online CPU 4 of 5");
        assert!(!switch(4).exists());
        std::fs::write(&expedited, "?").unwrap();
        bring_online(3).unwrap();
        assert_eq!(std::fs::read_to_string(&expedited).unwrap(), "0");
    }

    #[test]
    fn none_is_no_work() {
        take_into_use(0).unwrap();
    }
}
