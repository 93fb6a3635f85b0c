//! `delete`: what containerd runs when a shim is gone, and with older versions after each task of a pod whose shim lives.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use containerd_shim_protos::api::DeleteResponse;
use protobuf::{Message, MessageField};
use rustix::mount::UnmountFlags;

use super::args::Args;
use super::bootstrap;
use super::bundle::{self, Role};
use super::time::timestamp_now;
use crate::paths::Paths;
use crate::sandbox::Error;
use crate::sandbox::dir::SandboxDir;

/// The status of a task whose end nobody saw: as killed.
const STATUS: u32 = 137;
/// The longest that the end of a killed process may take. containerd waits 5 seconds for this program.
const DYING: Duration = Duration::from_secs(2);

/// Removes what a dead shim left of container `args.id`, and prints a DeleteResponse. A living shim's sandbox is left
/// alone.
///
/// # Errors
/// Something could not be removed.
pub fn main(paths: &Paths, args: &Args) -> Result<(), Error> {
    let bundle = match &args.bundle {
        Some(bundle) => bundle.clone(),
        None => std::env::current_dir().map_err(|e| Error::host("finding the bundle", e))?,
    };
    let role = bundle::read_spec(&bundle).map_or(Role::Alone, |spec| Role::of(&spec));
    let group = role.group(&args.id);
    let dir = bundle::sandbox_dir(paths, &args.namespace, group)?;
    let socket = bundle::socket(&args.address, &args.namespace, group);
    if !lives(&socket, &dir) {
        dir.remove()?;
        let _ = std::fs::remove_file(&socket);
    }
    unmount(&bundle.join("rootfs"));
    let response = DeleteResponse {
        exit_status: STATUS,
        exited_at: MessageField::some(timestamp_now()),
        ..Default::default()
    };
    let bytes = response
        .write_to_bytes()
        .map_err(|e| Error::host("encoding the answer", e))?;
    bootstrap::print(&bytes).map_err(|e| Error::host("printing the answer", e))
}

/// Whether there is a shim. One that is starting this moment has no sandbox yet, but listens; one that is being killed has
/// closed its socket, which is how containerd knows, and may have its sandbox's lock for moments more.
fn lives(socket: &Path, dir: &SandboxDir) -> bool {
    let deadline = Instant::now() + DYING;
    while UnixStream::connect(socket).is_err() {
        if !dir.is_owned() {
            return false;
        }
        if Instant::now() > deadline {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    true
}

/// containerd's own unmounting fails on what is still busy.
fn unmount(rootfs: &Path) {
    let _ = rustix::mount::unmount(rootfs, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
}
