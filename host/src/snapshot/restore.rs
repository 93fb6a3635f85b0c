//! How a sandbox goes on from a snapshot: files and volumes are put where they were, the machine is restored and gets its identity,
//! and each container other connections, before any of them runs.

use std::path::Path;

use super::save::copy_tree;
use super::{SavedContainer, Snapshot, refuse, rootfs};
use crate::container::Record;
use crate::hypervisor::{Hypervisor, Mounted, VmSpec};
use crate::image::{ImageRef, Store, upper};
use crate::paths::Paths;
use crate::sandbox::dir::SandboxDir;
use crate::sandbox::state::{ContainerState, ProcessId, Status, now};
use crate::sandbox::stdio::{self, Streams, Wanted};
use crate::sandbox::{Error, Restoration, Sandbox, volume};

/// A container of a restored sandbox.
#[derive(Debug)]
pub struct RestoredContainer {
    /// Its new record: it is running.
    pub record: Record,
    /// What stands in it.
    pub state: ContainerState,
    /// Its output from now on.
    pub streams: Streams,
}

/// Has a sandbox `id` go on from `snapshot`. The containers' ids on the host are new: that of a container which was called as its
/// sandbox is `id`, that of another is `id-<its own>`. Its interfaces become those of the network namespace at `netns`.
///
/// # Errors
/// `AlreadyExists`: an id is taken. `FailedPrecondition`: an image is another one, or the snapshot of another VMM or processor;
/// the namespace has other interfaces than the saved sandbox had.
/// Nothing is left then.
pub async fn restore(
    paths: &Paths,
    hypervisor: &dyn Hypervisor,
    snapshot: &Snapshot,
    id: &str,
    netns: Option<&Path>,
) -> Result<(Sandbox, Vec<RestoredContainer>), Error> {
    let about = &snapshot.about;
    let dir = SandboxDir::new(paths, id)?;
    let mut restoration = Restoration::begin(paths, dir.clone())?;
    connect(&mut restoration, &about.interfaces, netns).await?;
    let mut records = Records::default();
    let mut states = Vec::new();
    let mut mounts = Vec::new();
    for container in &about.containers {
        let state = state_of(container, id);
        let record = Record::create(paths, &state.id)?;
        records.0.push(record.clone());
        record.write(&state)?;
        record.write_spec(&container.spec)?;
        states.push(state);
        mounts.extend(put_files(paths, snapshot, container, &dir)?);
    }
    let spec = VmSpec {
        vcpus: about.vcpus,
        memory_bytes: about.memory_bytes,
        mounts,
        ..restoration.vm_spec()
    };
    let sandbox = restoration
        .finish(hypervisor, spec, &snapshot.files, about.pod)
        .await?;
    let mut restored = Vec::new();
    let made = records.0.iter().zip(states);
    for ((record, mut state), container) in made.zip(&about.containers) {
        let streams = attach(&sandbox, container).await?;
        sandbox.resume(&container.id).await?;
        state.status = Status::Running;
        record.write(&state)?;
        restored.push(RestoredContainer {
            record: record.clone(),
            state,
            streams,
        });
    }
    records.0.clear();
    Ok((sandbox, restored))
}

/// Gives the guest, which has `interfaces`, those of the same names in the namespace at `netns`.
async fn connect(
    restoration: &mut Restoration,
    interfaces: &[String],
    netns: Option<&Path>,
) -> Result<(), Error> {
    let list = |names: &[String]| match names {
        [] => "no interfaces".to_owned(),
        names => format!("the interfaces {}", names.join(", ")),
    };
    let (there, whose) = match netns {
        Some(netns) => (
            restoration.connect(netns).await?,
            netns.display().to_string(),
        ),
        None => (
            Vec::new(),
            "a sandbox without a network namespace".to_owned(),
        ),
    };
    match there == interfaces {
        true => Ok(()),
        false => Err(refuse(format!(
            "the saved sandbox had {}, and {whose} has {}",
            list(interfaces),
            list(&there)
        ))),
    }
}

/// The records of containers that are not restored yet. Dropping it removes them.
#[derive(Default)]
struct Records(Vec<Record>);

impl Drop for Records {
    fn drop(&mut self) {
        for record in self.0.drain(..) {
            let id = record.id().to_owned();
            if let Err(error) = record.remove() {
                tracing::warn!("removing container {id}: {error}");
            }
        }
    }
}

fn state_of(container: &SavedContainer, sandbox: &str) -> ContainerState {
    let id = match container.as_sandbox {
        true => sandbox.to_owned(),
        false => format!("{sandbox}-{}", container.id),
    };
    ContainerState {
        id,
        sandbox: sandbox.to_owned(),
        image: container.image.clone(),
        command: container.command.clone(),
        status: Status::Created,
        detached: true,
        in_guest: Some(container.id.clone()),
        layers: container.layers.clone(),
        volumes: container.volumes.clone(),
        runner: ProcessId::own(),
        created: now(),
    }
}

/// Puts a container's root file system where it was, and makes the mounts of its volumes.
fn put_files(
    paths: &Paths,
    snapshot: &Snapshot,
    container: &SavedContainer,
    dir: &SandboxDir,
) -> Result<Vec<Mounted>, Error> {
    let id = &container.id;
    let image = Store::open(&paths.lib_dir)?.prepare(&ImageRef::parse(&container.image)?)?;
    if image.digests() != container.layers {
        return Err(refuse(format!(
            "container {id} was made of another image {} than there is now",
            container.image
        )));
    }
    let share = dir.container_share(id);
    std::fs::create_dir_all(&share)
        .map_err(|e| Error::host(format!("making {}", share.display()), e))?;
    let scratch = dir.container_scratch(id);
    copy_tree(&snapshot.path.join(rootfs(id)), &upper(&scratch))?;
    // Whoever removes the sandbox's directory unmounts it.
    image.mount(&share.join("rootfs"), &scratch)?.keep();
    let mut spec = container.spec.clone();
    spec.set_mounts(Some(container.volumes.clone()));
    volume::copies(dir, id, &mut spec, |_| None)
}

async fn attach(sandbox: &Sandbox, container: &SavedContainer) -> Result<Streams, Error> {
    let process = container.spec.process().as_ref();
    let terminal = process.and_then(|process| process.terminal());
    let wanted = Wanted {
        stdin: false,
        // Its size is the guest's to keep.
        terminal: terminal.unwrap_or(false).then_some((0, 0)),
    };
    let (stdio, pending) = stdio::listen(&sandbox.dir().sockets(), wanted)?;
    let attached = sandbox.attach_streams(&container.id, stdio);
    let ((), streams) = tokio::try_join!(attached, pending.accept())?;
    Ok(streams)
}
