//! What dead processes left behind: sandboxes without an owner, containers without a sandbox.

use super::dir::{self, SandboxDir};
use super::error::Error;
use super::state::Status;
use crate::container;
use crate::paths::Paths;

/// The exit status of a container whose end nobody saw.
const UNKNOWN_EXIT: u32 = 255;

/// Removes what is left of sandboxes whose owner is dead, and settles the records of their containers. Each line of
/// the answer says what one thing was.
///
/// # Errors
/// Something could not be removed. What could be is gone.
pub fn collect(paths: &Paths) -> Result<Vec<String>, Error> {
    let mut removed = Vec::new();
    for dir in dir::list(paths)? {
        if !dir.is_owned() {
            removed.push(remove(&dir)?);
        }
    }
    for record in container::list(paths)? {
        removed.extend(settle(paths, record)?);
    }
    removed.extend(orphan_scratch(paths)?);
    Ok(removed)
}

/// Removes one sandbox whose owner is dead and says what it was.
fn remove(dir: &SandboxDir) -> Result<String, Error> {
    let what = match dir.read_state() {
        Ok(state) => {
            let vmm = if state.vmm.is_alive() {
                format!("VMM {} killed", state.vmm.pid)
            } else {
                format!("VMM {} dead", state.vmm.pid)
            };
            format!("owner {} dead, {vmm}", state.owner.pid)
        }
        Err(_) => "unfinished".to_owned(),
    };
    dir.remove()?;
    Ok(format!("sandbox {}: {what}", dir.id()))
}

/// A container that seems to run, or to come, in a sandbox that is gone has ended, nobody knows how.
fn settle(paths: &Paths, record: container::Record) -> Result<Option<String>, Error> {
    let mut state = match record.read() {
        Ok(state) => state,
        Err(_) if record.is_unfinished() => return Ok(None),
        Err(_) => {
            let id = record.id().to_owned();
            record.remove()?;
            return Ok(Some(format!("container {id}: no readable record")));
        }
    };
    if matches!(state.status, Status::Exited { .. }) || state.runner.is_alive() {
        return Ok(None);
    }
    let sandbox = SandboxDir::new(paths, &state.sandbox)?;
    if sandbox.is_owned() {
        sandbox.remove_container_files(&state.id)?;
    }
    let id = state.id.clone();
    if !state.detached {
        record.remove()?;
        return Ok(Some(format!("container {id}: its `cella run` is dead")));
    }
    state.status = Status::Exited {
        code: UNKNOWN_EXIT,
        oom_killed: false,
    };
    record.write(&state)?;
    Ok(Some(format!(
        "container {id}: its runner is dead, marked as exited with {UNKNOWN_EXIT}"
    )))
}

/// What containers wrote in sandboxes that are gone.
fn orphan_scratch(paths: &Paths) -> Result<Vec<String>, Error> {
    let scratch = paths.lib_dir.join("scratch");
    let Ok(entries) = std::fs::read_dir(&scratch) else {
        return Ok(Vec::new());
    };
    let mut removed = Vec::new();
    for entry in entries.filter_map(Result::ok) {
        let Ok(id) = entry.file_name().into_string() else {
            continue;
        };
        let Ok(dir) = SandboxDir::new(paths, &id) else {
            continue;
        };
        if !dir.path().exists() {
            dir.remove()?;
            removed.push(format!("scratch space of sandbox {id}"));
        }
    }
    Ok(removed)
}
