//! What `peers` and its guest agree on.

/// Sends back what comes.
pub const ECHO: u32 = 7001;
/// Takes [`MIB`] MiB, then sends one byte.
pub const SINK: u32 = 7002;
/// Sends [`MIB`] MiB.
pub const SOURCE: u32 = 7003;
/// Takes the report.
pub const REPORT: u32 = 7004;
/// The tag of the shared directory.
pub const TAG: &str = "share";
/// A directory in it that the guest may write to.
pub const WRITTEN: &str = "written";
/// MiB of each file and stream.
pub const MIB: usize = 64;
/// Files that are looked up.
pub const FILES: usize = 1000;
/// Bytes of a message that goes there and back.
pub const MESSAGE: usize = 64;
/// How often it does.
pub const ROUND_TRIPS: usize = 2000;
/// How often everything is measured in one guest.
pub const ROUNDS: usize = 3;

/// The name of the large file of a round.
pub fn large(round: usize) -> String {
    format!("large-{round}")
}
