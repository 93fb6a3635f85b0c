//! The jail from both sides: a probe that enters it and tries to leave, and what the host sees of it meanwhile.
//!
//! A process enters the jail before it has a second thread, so this suite has a `main` of its own. It works in a mount
//! namespace of its own and is the reaper of what it starts; after each test nothing may be left.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test"
)]

#[path = "jail/files.rs"]
mod files;
#[path = "jail/host.rs"]
mod host;
#[path = "jail/mounted.rs"]
mod mounted;
#[path = "jail/probe.rs"]
mod probe;
#[path = "jail/suite.rs"]
mod suite;

fn main() {
    let mut words = std::env::args().skip(1);
    let first = words.next();
    if first.as_deref() == Some("probe") {
        let scenario = words.next().expect("a scenario");
        return probe::main(&scenario, words.collect());
    }
    let filter = first
        .filter(|word| !word.starts_with('-'))
        .unwrap_or_default();
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: not root");
        return;
    }
    host::prepare();
    let mut failed = 0;
    for (name, test) in suite::TESTS
        .iter()
        .filter(|(name, _)| name.contains(&filter))
    {
        let before = host::mounts();
        let mut result = std::panic::catch_unwind(test).is_ok();
        let left = host::leaks(&before);
        if !left.is_empty() {
            println!("left behind by {name}: {left:?}");
            result = false;
        }
        println!("test {name} ... {}", if result { "ok" } else { "FAILED" });
        failed += i32::from(!result);
    }
    println!("\ntest result: {failed} failed");
    std::process::exit(i32::from(failed > 0));
}
