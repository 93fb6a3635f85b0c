//! What is written down of sandboxes and containers, for whoever comes after the process that made them.

use std::fs;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

use cella_proto::agent::Exit;
use oci_spec::runtime::Mount;
use rustix::process::{Pid, PidfdFlags, Signal};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::error::Error;
use crate::error::ErrorKind;

/// The largest state file that is read, bytes.
const MAX_FILE: u64 = 1 << 20;

/// A process by its id and its start, so that a reused id is not taken for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// On the host.
    pub pid: u32,
    /// Clock ticks since the host's boot (field 22 of /proc/PID/stat).
    pub start_ticks: u64,
}

impl ProcessId {
    /// The process that has `pid` now; `None` if there is none, or it has ended and nobody has taken notice yet.
    pub fn of(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The second field, the command in parentheses, may hold anything.
        let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
        if matches!(fields.next()?, "Z" | "X") {
            return None;
        }
        let start_ticks = fields.nth(18)?.parse().ok()?;
        Some(Self { pid, start_ticks })
    }

    /// The calling process.
    pub fn own() -> Self {
        let pid = std::process::id();
        Self::of(pid).unwrap_or(Self {
            pid,
            start_ticks: 0,
        })
    }

    /// Whether it still exists.
    pub fn is_alive(&self) -> bool {
        Self::of(self.pid) == Some(*self)
    }

    /// A descriptor of it, which is never another process's.
    ///
    /// # Errors
    /// It has ended.
    pub fn pidfd(&self) -> io::Result<OwnedFd> {
        let gone = || io::Error::from(rustix::io::Errno::SRCH);
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
        // The descriptor pins the process before its identity is checked.
        let pidfd = rustix::process::pidfd_open(pid.ok_or_else(gone)?, PidfdFlags::empty())?;
        if self.is_alive() {
            Ok(pidfd)
        } else {
            Err(gone())
        }
    }

    /// Sends `signal`, if it still exists; says whether it did.
    pub fn signal(&self, signal: Signal) -> bool {
        self.pidfd()
            .is_ok_and(|pidfd| rustix::process::pidfd_send_signal(&pidfd, signal).is_ok())
    }

    /// Kills it, if it still exists; says whether it did.
    pub fn kill(&self) -> bool {
        self.signal(Signal::KILL)
    }
}

/// A sandbox, as its owner wrote it down.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SandboxState {
    /// Its id.
    pub id: String,
    /// Made by `--pod`: it outlives its containers until it is stopped.
    pub pod: bool,
    /// The hypervisor's name.
    pub hypervisor: String,
    /// The process that holds the lock.
    pub owner: ProcessId,
    /// The VMM.
    pub vmm: ProcessId,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Guest RAM.
    pub memory_bytes: u64,
    /// The agent keeps a resolv.conf for its containers.
    #[serde(default)]
    pub resolv_conf: bool,
    /// Seconds since the epoch.
    pub created: u64,
}

/// Where a container is in its life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Made, not started.
    Created,
    /// Its init runs.
    Running,
    /// Its init has ended.
    Exited {
        /// 0..255, 128+N for signal N.
        code: u32,
        /// The kernel killed for memory in it.
        oom_killed: bool,
    },
}

impl Status {
    /// After `exit`; with none, its runner does not know how it ended.
    pub fn exited(exit: Option<&Exit>) -> Self {
        Self::Exited {
            code: exit.map_or(255, |exit| exit.exit_status),
            oom_killed: exit.is_some_and(|exit| exit.oom_killed),
        }
    }
}

/// A container, as its runner wrote it down.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ContainerState {
    /// Its id.
    pub id: String,
    /// The sandbox that it is in.
    pub sandbox: String,
    /// As given on the command line.
    pub image: String,
    /// Its init's arguments.
    pub command: Vec<String>,
    /// Where it is in its life.
    pub status: Status,
    /// Made by `-d`: its record stays when it has ended.
    pub detached: bool,
    /// Its id in the guest, if that is another: the guest was restored from a snapshot.
    #[serde(default)]
    pub in_guest: Option<String>,
    /// The digests of its image's layers, the lowest first; none of a directory or a bundle.
    #[serde(default)]
    pub layers: Vec<String>,
    /// What it has of the host.
    #[serde(default)]
    pub volumes: Vec<Mount>,
    /// The process that takes its output and writes its end.
    pub runner: ProcessId,
    /// Seconds since the epoch.
    pub created: u64,
}

impl ContainerState {
    /// Its id, as its sandbox's agent knows it.
    pub fn guest_id(&self) -> &str {
        self.in_guest.as_deref().unwrap_or(&self.id)
    }
}

/// Reads a state file.
///
/// # Errors
/// It cannot be read, is too large or is no `T`.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<T, Error> {
    let action = || format!("reading {}", path.display());
    let meta = fs::metadata(path).map_err(|e| Error::host(action(), e))?;
    if meta.len() > MAX_FILE {
        return Err(Error::state(
            ErrorKind::InvalidArgument,
            format!("{}: {} bytes are too many", action(), meta.len()),
        ));
    }
    let text = fs::read(path).map_err(|e| Error::host(action(), e))?;
    serde_json::from_slice(&text).map_err(|e| Error::host(action(), e))
}

/// Writes a state file, whole or not at all.
///
/// # Errors
/// It cannot be written.
pub fn write<T: Serialize>(path: &Path, value: &T) -> Result<(), Error> {
    let action = || format!("writing {}", path.display());
    let text = serde_json::to_vec_pretty(value).map_err(|e| Error::host(action(), e))?;
    let temporary = path.with_extension("new");
    let written = fs::File::create(&temporary)
        .and_then(|mut file| file.write_all(&text))
        .and_then(|()| fs::rename(&temporary, path));
    written.map_err(|e| Error::host(action(), e))
}

/// Seconds since the epoch.
pub fn now() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_start_as_well() {
        let own = ProcessId::own();
        assert!(own.is_alive());
        let reused = ProcessId {
            start_ticks: own.start_ticks + 1,
            ..own
        };
        assert!(!reused.is_alive());
        assert!(!reused.kill(), "would have ended this test");
    }

    #[test]
    fn a_process_that_has_ended_is_none_though_its_parent_does_not_know() {
        let mut child = std::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let id = ProcessId::of(child.id()).unwrap();
        assert!(id.kill());
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while id.is_alive() {
            assert!(
                std::time::Instant::now() < deadline,
                "it is taken for alive"
            );
        }
        child.wait().unwrap();
    }

    #[test]
    fn a_damaged_state_file_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sandbox.json");
        fs::write(&path, "{\"id\":").unwrap();
        let error = read::<SandboxState>(&path).unwrap_err();
        assert!(error.to_string().contains("sandbox.json"), "{error}");
    }
}
