//! A pool (off by default): idle clones that wait for whoever needs a sandbox. Claiming one spares the start of its VMM.
//!
//! There are as many as the configuration says, and of the kinds that were asked for last: those that the last so many
//! sandboxes would have needed. In the beginning they are of the configuration's own shape, without a network.
//!
//! One keeper a run directory holds them: a process in the background that ends when the configuration asks for no pool
//! any more. An idle clone is a sandbox like any other: a directory `pool-<id>` whose owner is the keeper. Who claims it gets the
//! VMM's control socket and the directory's locks, and renames the directory: from then on it is theirs. Whoever dies in
//! between, the lock is free and the control socket closed: the VMM ends, and `cella gc` removes the directory.
//!
//! | file | what lives there |
//! | --- | --- |
//! | [`keeper`] | the process that holds the idle ones |
//! | [`claim`] | how one changes hands |
//! | `wire` | what claimer and keeper say to each other |
//! | `cgroup` | a claimed VMM counts where its claimer does |

mod cgroup;
pub mod claim;
pub mod keeper;
mod wire;

use std::path::PathBuf;

pub use claim::{Claimed, claim};

use crate::paths::Paths;

/// The beginning of an idle sandbox's id.
const PREFIX: &str = "pool-";

/// The keeper's directory; its name is no sandbox's.
fn dir(paths: &Paths) -> PathBuf {
    paths.run_dir.join(".pool")
}

fn socket(paths: &Paths) -> PathBuf {
    dir(paths).join("socket")
}
