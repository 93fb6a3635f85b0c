//! How a template is made: a guest is booted whose agent prepares everything that needs no identity, waits, and is saved.

use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::UnixListener;

use super::rehearsal::rehearse;
use super::{Error, Key, Shape, Store};
use crate::hypervisor::{Hypervisor, Nic, Vm, VmSpec};
use crate::network;
use crate::paths::Paths;
use crate::sandbox::agent::AGENT_PORT;
use crate::sandbox::dir::{self, SandboxDir};
use crate::sandbox::state::{self, ProcessId, SandboxState};
use crate::sandbox::{self, Sandbox, plain_vm_spec};

/// The word that tells the agent what it is for.
const WORD: &str = "cella_template=1";
/// Empty places for what a clone has beyond its template: eight network interfaces, added memory.
pub const SPARE_SLOTS: u32 = 9;
/// How long the guest may take to the agent's word.
const BOOT_TIMEOUT: Duration = Duration::from_secs(180);
/// How long the guest gets to end the last connection and what it does some time after a container. Nothing depends on
/// it but the time that a clone would take for it instead.
const SETTLE: Duration = Duration::from_secs(1);

/// What became of a template.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Built {
    /// It is new.
    New,
    /// It was there.
    Known,
    /// Somebody else is building it.
    Busy,
}

/// Builds the template of `shape`, unless it is there or somebody builds it, and keeps all templates within `limit` bytes.
///
/// # Errors
/// The guest does not boot or cannot be saved, or the template cannot be written. Nothing is left then.
pub async fn build(
    paths: &Paths,
    hypervisor: &dyn Hypervisor,
    shape: &Shape,
    limit: u64,
) -> Result<(Key, Built), Error> {
    let key = Key::of(paths, shape)?;
    let store = Store::new(paths);
    let Some(lock) = store.lock(&key)? else {
        return Ok((key, Built::Busy));
    };
    if store.has(&key) {
        return Ok((key, Built::Known));
    }
    let draft = store.draft(&key, shape.memory_bytes, &lock)?;
    let name: String = key.as_str().chars().take(12).collect();
    let dir = SandboxDir::new(paths, &format!("template-{name}"))?;
    let saved = save(paths, hypervisor, shape, &dir, &draft.files).await;
    let removed = dir.remove();
    saved?;
    removed?;
    draft.commit(shape)?;
    store.keep_within(limit)?;
    Ok((key, Built::New))
}

/// Boots a guest in `dir` and saves it to `files`.
async fn save(
    paths: &Paths,
    hypervisor: &dyn Hypervisor,
    shape: &Shape,
    dir: &SandboxDir,
    files: &crate::hypervisor::SavedVm,
) -> Result<(), Error> {
    let (_lock, booting) = dir.create()?;
    let path = dir.sockets().join(AGENT_PORT.to_string());
    let listener = UnixListener::bind(&path).map_err(Error::file("binding", &path))?;
    dir::open_to_vmm(&path)?;
    let mut state = SandboxState {
        id: dir.id().to_owned(),
        pod: true,
        hypervisor: hypervisor.name().to_owned(),
        owner: ProcessId::own(),
        vmm: ProcessId::own(),
        vcpus: shape.vcpus,
        memory_bytes: shape.memory_bytes,
        resolv_conf: false,
        created: state::now(),
    };
    let nics = network::spares(shape.nics).await;
    let spec = vm_spec(paths, shape, dir, nics.map_err(sandbox::Error::from)?);
    let vm = hypervisor.boot(spec).await?;
    state.vmm = ProcessId::of(vm.pid()).unwrap_or(state.vmm);
    dir.write_state(&state)?;
    tokio::select! {
        word = wait_for_word(&listener) => word?,
        ended = vm.wait() => {
            return Err(Error::Guest(format!("the guest ended: {}", ended.message)));
        }
    }
    drop(booting);
    rehearse(&Sandbox::attach(dir.clone()).await?).await?;
    tokio::time::sleep(SETTLE).await;
    save_and_stop(vm.as_ref(), files).await
}

async fn save_and_stop(vm: &dyn Vm, files: &crate::hypervisor::SavedVm) -> Result<(), Error> {
    vm.pause().await?;
    vm.snapshot(files).await?;
    Ok(vm.stop().await?)
}

/// The agent calls and ends the call at once.
async fn wait_for_word(listener: &UnixListener) -> Result<(), Error> {
    let word = async {
        let (mut call, _) = listener.accept().await?;
        call.read_to_end(&mut Vec::new()).await
    };
    match tokio::time::timeout(BOOT_TIMEOUT, word).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(Error::Guest(format!("taking the agent's call: {error}"))),
        Err(_) => Err(Error::Guest(format!(
            "the agent did not call within {} s",
            BOOT_TIMEOUT.as_secs()
        ))),
    }
}

fn vm_spec(paths: &Paths, shape: &Shape, dir: &SandboxDir, nics: Vec<Nic>) -> VmSpec {
    VmSpec {
        vcpus: shape.vcpus,
        possible_vcpus: shape.possible_vcpus,
        memory_bytes: shape.memory_bytes,
        cmdline: match shape.cmdline.as_str() {
            "" => WORD.to_owned(),
            words => format!("{words} {WORD}"),
        },
        spare_slots: SPARE_SLOTS,
        nics,
        ..plain_vm_spec(paths, dir)
    }
}
