//! `delete`: what containerd runs when a shim is gone, and with older versions after each task of a pod whose shim lives.

use std::os::unix::net::UnixStream;
use std::path::Path;

use containerd_shim_protos::api::DeleteResponse;
use protobuf::{Message, MessageField};
use rustix::mount::UnmountFlags;

use super::args::Args;
use super::bootstrap;
use super::bundle::{self, Role};
use super::time::timestamp_now;
use crate::paths::Paths;
use crate::sandbox::Error;

/// The status of a task whose end nobody saw: as killed.
const STATUS: u32 = 137;

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
    // One that is starting this moment has no sandbox yet, but listens.
    let lives = UnixStream::connect(&socket).is_ok() || dir.is_owned();
    if !lives {
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

/// containerd's own unmounting fails on what is still busy.
fn unmount(rootfs: &Path) {
    let _ = rustix::mount::unmount(rootfs, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
}
