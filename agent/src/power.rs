//! The end of the guest: asked for, or because its PID 1 cannot go on.

use std::fmt::Write as _;
use std::panic::PanicHookInfo;

/// Syncs and resets the machine, which the VMM takes for the guest's end. Does not return in a guest.
///
/// A guest has no power switch: without ACPI the kernel makes a halt of a power-off, and nobody outside sees a halt.
pub fn off() {
    rustix::fs::sync();
    reset();
}

/// Resets the machine at once. Does not return in a guest.
pub fn reset() {
    // SAFETY: reboot(2) reads no memory of ours. It fails, harmlessly, without CAP_SYS_BOOT.
    unsafe { libc::reboot(libc::LINUX_REBOOT_CMD_RESTART) };
}

/// A PID 1 that panics must not leave a guest behind that nobody answers in: the hook says why on the console and
/// resets the machine.
pub fn install_panic_hook() {
    std::panic::set_hook(Box::new(|info: &PanicHookInfo<'_>| {
        let mut line = String::new();
        // A String takes everything.
        let _ = writeln!(line, "cella-agent: {info}");
        report(&line);
        reset();
    }));
}

/// Writes `line` to the console, as far as the machine has one.
pub fn report(line: &str) {
    // There is nowhere else to say it.
    let _ = rustix::io::write(rustix::stdio::stderr(), line.as_bytes());
}
