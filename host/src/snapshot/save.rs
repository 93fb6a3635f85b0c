//! How a sandbox is saved: its containers are paused, its machine stands still, and everything that is its own is copied.

use std::path::Path;
use std::process::Command;

use cella_proto::agent::State;

use super::files::Draft;
use super::{About, SavedContainer, VERSION, refuse, rootfs};
use crate::container;
use crate::hypervisor::Hypervisor;
use crate::hypervisor::kvm::Kvm;
use crate::image::{ImageRef, upper};
use crate::paths::Paths;
use crate::sandbox::state::{Status, now};
use crate::sandbox::{Error, Sandbox};

/// Saves an owned sandbox to the directory `target`, which is made. The sandbox goes on, whatever comes of it.
///
/// # Errors
/// `AlreadyExists`: something is there. `FailedPrecondition`: the sandbox has something that cannot be saved. What of the
/// snapshot was written is removed.
pub async fn save(paths: &Paths, sandbox: &Sandbox, target: &Path) -> Result<(), Error> {
    let state = sandbox.dir().read_state()?;
    if state.hypervisor != Kvm.name() {
        return Err(refuse(format!(
            "sandbox {} runs on {}, which saves no machines",
            state.id, state.hypervisor
        )));
    }
    let network = sandbox.dir().read_network()?;
    let containers = containers(paths, sandbox).await?;
    let draft = Draft::new(target, state.memory_bytes)?;
    let ids: Vec<_> = containers.iter().map(|one| one.id.clone()).collect();
    let copy = || {
        ids.iter().try_for_each(|id| {
            let written = upper(&sandbox.dir().container_scratch(id));
            copy_tree(&written, &draft.path().join(rootfs(id)))
        })
    };
    let paused = pause(sandbox, &ids).await;
    let saved = match paused {
        Ok(()) => sandbox.save(&draft.files, copy).await,
        Err(error) => Err(error),
    };
    resume(sandbox, &ids).await;
    saved?;
    draft.commit(&About {
        version: VERSION,
        sandbox: state.id,
        pod: state.pod,
        vcpus: state.vcpus,
        memory_bytes: state.memory_bytes,
        interfaces: network.map(|joints| joints.names()).unwrap_or_default(),
        containers,
        created: now(),
    })
}

/// Those that run. Every other one of the guest's is in the way: nobody would know of it in the restored one.
async fn containers(paths: &Paths, sandbox: &Sandbox) -> Result<Vec<SavedContainer>, Error> {
    let mut saved = Vec::new();
    let mut records = Vec::new();
    for record in container::list(paths)? {
        match record.read() {
            Ok(state) if state.sandbox == sandbox.dir().id() => records.push((record, state)),
            _ => {}
        }
    }
    for info in sandbox.containers().await? {
        let id = &info.container_id;
        if info.state.enum_value() == Ok(State::STATE_STOPPED) {
            continue;
        }
        let known = records.iter().find(|(_, state)| state.guest_id() == id);
        let Some((record, state)) = known else {
            return Err(refuse(format!(
                "container {id} is not one of this command's"
            )));
        };
        if state.status != Status::Running {
            return Err(refuse(format!("container {id} is being made or ended")));
        }
        refuse_bundle(&state.image)?;
        saved.push(SavedContainer {
            id: id.clone(),
            as_sandbox: state.id == state.sandbox,
            image: state.image.clone(),
            layers: state.layers.clone(),
            command: state.command.clone(),
            volumes: state.volumes.clone(),
            spec: record.read_spec()?,
        });
    }
    Ok(saved)
}

fn refuse_bundle(image: &str) -> Result<(), Error> {
    match ImageRef::parse(image)? {
        ImageRef::Bundle(dir) => Err(refuse(format!(
            "a container of the bundle {} cannot be saved: its root file system is the host's",
            dir.display()
        ))),
        _ => Ok(()),
    }
}

/// Copies a directory with everything in it to `to`, which is made in its directory, which is made as well. Owners, modes, times, links
/// and extended attributes are kept (overlayfs has its own there), content is shared where the file system can. cp(1) does
/// all this, and no crate that we know does.
///
/// # Errors
/// Its last words.
pub(super) fn copy_tree(from: &Path, to: &Path) -> Result<(), Error> {
    let action = || format!("copying {} to {}", from.display(), to.display());
    if let Some(parent) = to.parent() {
        std::fs::create_dir_all(parent).map_err(|e| Error::host(action(), e))?;
    }
    let copied = Command::new("cp")
        .args(["--archive", "--reflink=auto", "--no-target-directory", "--"])
        .args([from, to])
        .output()
        .map_err(|e| Error::host(action(), e))?;
    match copied.status.success() {
        true => Ok(()),
        false => {
            let said = String::from_utf8_lossy(&copied.stderr);
            let last = said.lines().last().unwrap_or("cp failed").to_owned();
            Err(Error::host(action(), std::io::Error::other(last)))
        }
    }
}

async fn pause(sandbox: &Sandbox, ids: &[String]) -> Result<(), Error> {
    for id in ids {
        sandbox.pause(id).await?;
    }
    Ok(())
}

/// Whether they were paused or not.
async fn resume(sandbox: &Sandbox, ids: &[String]) {
    for id in ids {
        if let Err(error) = sandbox.resume(id).await {
            tracing::debug!("{error}");
        }
    }
}
