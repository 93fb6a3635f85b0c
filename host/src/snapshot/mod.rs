//! Snapshots: running sandboxes saved with their containers, from which others go on.
//!
//! A directory of this user's alone:
//!
//! | path | what it is |
//! | --- | --- |
//! | `about.json` | [`About`] |
//! | `state`, `memory` | the virtual machine, as of a template |
//! | `rootfs/<container>/` | what the container has written to its root file system: overlayfs's upper directory |
//!
//! Images and volumes are not in it: whoever goes on from it needs the same images, and finds the volumes as they are then.
//!
//! | file | what lives there |
//! | --- | --- |
//! | `files` | the directory: whole under its name, or not there |
//! | `save` | a sandbox stands still while it is written |
//! | `restore` | a sandbox that goes on, with its containers |
//! | [`owner`] | how another process asks a sandbox's owner for one |

mod files;
pub mod owner;
mod restore;
mod save;

use std::path::PathBuf;

use oci_spec::runtime::{Mount, Spec};
use serde::{Deserialize, Serialize};

pub use files::{Snapshot, open};
pub use restore::{RestoredContainer, restore};
pub use save::save;

use crate::error::ErrorKind;
use crate::sandbox::Error;

/// The format of `about.json`.
const VERSION: u32 = 2;

/// What is written down of a saved sandbox.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct About {
    version: u32,
    /// The sandbox that was saved.
    pub sandbox: String,
    /// It outlives its containers until it is stopped.
    pub pod: bool,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Guest RAM, bytes.
    pub memory_bytes: u64,
    /// The names of its network interfaces, in the guest's order.
    pub interfaces: Vec<String>,
    /// The containers that ran in it.
    pub containers: Vec<SavedContainer>,
    /// Seconds since the epoch.
    pub created: u64,
}

/// A container of a saved sandbox.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SavedContainer {
    /// Its id in the guest.
    pub id: String,
    /// On the host it was called as its sandbox.
    as_sandbox: bool,
    /// As given on the command line.
    pub image: String,
    /// The digests of its layers, the lowest first: the same have to be there again. None of a plain directory, whose content
    /// nobody checks.
    layers: Vec<String>,
    /// Its init's arguments.
    pub command: Vec<String>,
    /// What it has of the host.
    volumes: Vec<Mount>,
    /// The guest's specification.
    spec: Spec,
}

/// Where a saved container's writes are, in the snapshot's directory.
fn rootfs(container: &str) -> PathBuf {
    PathBuf::from("rootfs").join(container)
}

fn refuse(message: impl Into<String>) -> Error {
    Error::state(ErrorKind::FailedPrecondition, message)
}
