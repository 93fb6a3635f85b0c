//! The containers of the measurements: the host's static busybox, alone.

use std::fs;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Process, Root, Spec};

use super::{Error, Options};
use crate::sandbox::stdio::{self, Streams, Wanted};
use crate::sandbox::{Sandbox, volume};

/// Creates a container of busybox alone.
pub(super) async fn container(
    sandbox: &Sandbox,
    id: &str,
    options: &Options,
    command: &[&str],
) -> Result<Streams, Error> {
    container_with(sandbox, id, options, command, |_| ()).await
}

/// One whose specification `edit` has changed.
pub(super) async fn container_with(
    sandbox: &Sandbox,
    id: &str,
    options: &Options,
    command: &[&str],
    edit: impl FnOnce(&mut Spec),
) -> Result<Streams, Error> {
    busybox_rootfs(sandbox, id, &options.busybox)?;
    let mut spec = Spec::default();
    let mut root = Root::default();
    root.set_readonly(Some(false));
    spec.set_root(Some(root));
    spec.set_process(Some(process(command)));
    edit(&mut spec);
    volume::share(sandbox.dir(), id, &mut spec, |_| None)?;
    let wanted = Wanted {
        stdin: true,
        terminal: None,
    };
    let (stdio, pending) = stdio::listen(&sandbox.dir().sockets(), wanted)?;
    let (_, streams) = tokio::try_join!(sandbox.create(id, &spec, stdio), pending.accept())?;
    Ok(streams)
}

/// The root file system of the container `id`, as the host has it.
pub(super) fn rootfs(sandbox: &Sandbox, id: &str) -> PathBuf {
    sandbox.dir().path().join(format!("rootfs-{id}"))
}

/// A process of that container.
pub(super) fn process(command: &[&str]) -> Process {
    let mut process = Process::default();
    process.set_args(Some(command.iter().map(|&word| word.to_owned()).collect()));
    process.set_terminal(Some(false));
    process
}

/// A root file system with busybox alone, mounted in the sandbox's shared directory under `id`.
fn busybox_rootfs(sandbox: &Sandbox, id: &str, busybox: &Path) -> Result<(), Error> {
    let files = rootfs(sandbox, id);
    let copy = || {
        for dir in ["bin", "proc", "dev", "sys", "tmp"] {
            fs::create_dir_all(files.join(dir))?;
        }
        fs::copy(busybox, files.join("bin/busybox")).map(drop)
    };
    copy().map_err(|e| {
        Error::host(
            format!(
                "making a container of {} (Debian: busybox-static)",
                busybox.display()
            ),
            e,
        )
    })?;
    let place = sandbox.dir().container_share(id).join("rootfs");
    // There from an earlier container of the id.
    if !place.exists() {
        volume::bind(&files, &place, volume::Bound::default())?;
    }
    Ok(())
}
