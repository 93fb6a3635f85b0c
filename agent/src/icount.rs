//! The boot budget's measuring point: under an emulator that counts one TSC tick per instruction, the tick at which
//! the agent would call the host is the cost of the boot so far.

/// The kernel hands a word of its command line that it does not know to init as an environment variable, if the word
/// has a `=` and no dot: `cella_icount=1` measures. That needs no /proc.
pub const VARIABLE: &str = "cella_icount";

/// The time stamp counter.
pub fn ticks() -> u64 {
    // SAFETY: reading the counter has no effect; the kernel leaves it readable to user space.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Writes the count to the console, and beside it what it was at the agent's entry; then what it is when the guest's file
/// systems are there too, which in a real boot comes after the call.
pub fn report(entry: u64) {
    let ready = ticks();
    crate::power::report(&format!("cella-agent: ready tsc={ready} entry={entry}\n"));
    let prepared = crate::guest::prepare();
    let now = ticks();
    crate::power::report(&match prepared {
        Ok(()) => format!("cella-agent: prepared tsc={now}\n"),
        Err(error) => format!(
            "cella-agent: {}\n",
            crate::error::Error::from(error).message()
        ),
    });
}
