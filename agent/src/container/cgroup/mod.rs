//! A container's cgroup (version 2).

mod events;
mod resources;
mod stats;

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};

use super::{Error, Result};
pub use events::OomWatch;

/// How long processes have to vanish after they were killed, or to freeze.
const PATIENCE: Duration = Duration::from_secs(10);
/// Pause between looks at something without notification.
const PAUSE: Duration = Duration::from_millis(5);
/// No control file that is read is longer.
const MAX_FILE: usize = 1 << 20;

/// Where cgroups are made, and what has been prepared there.
#[derive(Debug)]
pub(super) struct Hierarchy {
    root: PathBuf,
    parent: String,
    /// The controllers of the guest, as written to cgroup.subtree_control: "+cpu +memory".
    controllers: String,
    /// Directories that exist and hand the controllers on.
    prepared: Mutex<HashSet<PathBuf>>,
}

fn failed(step: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
    let path = path.into();
    move |source| Error::Cgroup { step, path, source }
}

impl Hierarchy {
    /// Of the cgroup2 mount at `root`; relative paths go below `parent`.
    pub(super) fn new(root: PathBuf, parent: String) -> Result<Self> {
        let file = root.join("cgroup.controllers");
        let controllers = std::fs::read_to_string(&file).map_err(failed("reading", file))?;
        let wanted = ["cpu", "cpuset", "memory", "io", "pids", "hugetlb", "misc"];
        let controllers = controllers
            .split_whitespace()
            .filter(|name| wanted.contains(name))
            .map(|name| format!("+{name}"))
            .collect::<Vec<_>>()
            .join(" ");
        Ok(Self {
            root,
            parent,
            controllers,
            prepared: Mutex::default(),
        })
    }

    /// The directory of `linux.cgroupsPath`, or of the container's id below the parent.
    fn path(&self, id: &str, cgroups_path: Option<&Path>) -> Result<PathBuf> {
        let below = match cgroups_path.filter(|path| !path.as_os_str().is_empty()) {
            None => Path::new(&self.parent).join(id),
            Some(path) => match systemd_name(path) {
                Some(name) => Path::new(&self.parent).join(name),
                None if path.is_absolute() => path.to_path_buf(),
                None => Path::new(&self.parent).join(path),
            },
        };
        let mut result = self.root.clone();
        let mut depth = 0usize;
        for component in below.components() {
            match component {
                Component::Normal(name) => {
                    result.push(name);
                    depth = depth.saturating_add(1);
                }
                Component::RootDir | Component::CurDir => {}
                _ => {
                    return Err(Error::invalid(
                        "linux.cgroupsPath",
                        format!("{} has '..'", below.display()),
                    ));
                }
            }
        }
        if depth == 0 {
            return Err(Error::invalid(
                "linux.cgroupsPath",
                "is the root of the hierarchy",
            ));
        }
        Ok(result)
    }

    /// Makes a container's cgroup, and the directories above it with their controllers handed on.
    pub(super) fn create(&self, id: &str, cgroups_path: Option<&Path>) -> Result<Cgroup> {
        let path = self.path(id, cgroups_path)?;
        if let Some(parent) = path.parent() {
            self.prepare(parent)?;
        }
        match std::fs::create_dir(&path) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                // Left by an agent's earlier try, or somebody else's: only an empty one is taken over.
                std::fs::remove_dir(&path)
                    .and_then(|()| std::fs::create_dir(&path))
                    .map_err(failed("making (one is there, in use)", &path))?;
            }
            Err(e) => return Err(failed("making", &path)(e)),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match rustix::fs::open(&path, flags, Mode::empty()) {
            Ok(dir) => Ok(Cgroup { path, dir }),
            Err(e) => {
                // Nothing is in it yet.
                let _ = std::fs::remove_dir(&path);
                Err(failed("opening", path)(e.into()))
            }
        }
    }

    /// Makes `directory` and those above it, and turns on the controllers for what is below. Once a directory.
    fn prepare(&self, directory: &Path) -> Result<()> {
        let known = |path: &Path| {
            self.prepared
                .lock()
                .unwrap_or_else(|e| e.into_inner())
                .contains(path)
        };
        if known(directory) && directory.exists() {
            return Ok(());
        }
        let mut above: Vec<&Path> = directory
            .ancestors()
            .take_while(|path| path.starts_with(&self.root))
            .collect();
        above.reverse();
        for path in above {
            if path != self.root {
                match std::fs::create_dir(path) {
                    Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                        return Err(failed("making", path)(e));
                    }
                    Err(_) if known(path) => continue,
                    _ => {}
                }
            } else if known(path) {
                continue;
            }
            if !self.controllers.is_empty() {
                let file = path.join("cgroup.subtree_control");
                std::fs::write(&file, &self.controllers)
                    .map_err(failed("turning on controllers in", file))?;
            }
            self.prepared
                .lock()
                .unwrap_or_else(|e| e.into_inner())
                .insert(path.to_path_buf());
        }
        Ok(())
    }
}

/// systemd's `slice:prefix:name`, which has no slash, as one name: there is no systemd in the guest.
fn systemd_name(path: &Path) -> Option<String> {
    let text = path.to_str().filter(|text| !text.contains('/'))?;
    let mut parts = text.split(':');
    let (_slice, prefix, name) = (parts.next()?, parts.next()?, parts.next()?);
    if parts.next().is_some() || name.is_empty() {
        return None;
    }
    Some(if prefix.is_empty() {
        name.to_owned()
    } else {
        format!("{prefix}-{name}")
    })
}

/// One container's cgroup. Dropping it removes nothing.
#[derive(Debug)]
pub(super) struct Cgroup {
    path: PathBuf,
    dir: OwnedFd,
}

impl Cgroup {
    /// For CLONE_INTO_CGROUP and BPF programs.
    pub(super) fn dir(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// In the agent's view.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    fn open(&self, name: &str, flags: OFlags) -> io::Result<OwnedFd> {
        Ok(rustix::fs::openat(
            &self.dir,
            name,
            flags | OFlags::CLOEXEC,
            Mode::empty(),
        )?)
    }

    /// Writes a control file.
    fn write(&self, name: &str, value: &str) -> Result<()> {
        self.open(name, OFlags::WRONLY)
            .and_then(|fd| Ok(rustix::io::write(&fd, value.as_bytes())?))
            .map(drop)
            .map_err(|source| Error::Cgroup {
                step: "writing",
                path: self.path.join(name),
                source: io::Error::new(
                    source.kind(),
                    CgroupWrite {
                        value: value.into(),
                        source,
                    },
                ),
            })
    }

    /// Reads a control file; None if the controller is off.
    fn read(&self, name: &str) -> Result<Option<String>> {
        let read = |fd: OwnedFd| {
            use std::io::Read;
            let mut text = String::new();
            std::fs::File::from(fd)
                .take(MAX_FILE as u64)
                .read_to_string(&mut text)?;
            Ok(text)
        };
        match self.open(name, OFlags::RDONLY).and_then(read) {
            Ok(text) => Ok(Some(text)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(None),
            Err(e) => Err(failed("reading", self.path.join(name))(e)),
        }
    }

    /// The processes in it and below it, in the agent's pid namespace.
    pub(super) fn processes(&self) -> Result<Vec<u32>> {
        let mut pids = self.read_pids("cgroup.procs")?;
        for below in self.subdirectories()? {
            let name = below.join("cgroup.procs");
            pids.extend(self.read_pids(&name.to_string_lossy())?);
        }
        Ok(pids)
    }

    fn read_pids(&self, name: &str) -> Result<Vec<u32>> {
        let text = self.read(name)?.unwrap_or_default();
        // 0 is a process outside of the agent's pid namespace: not the container's to see either.
        Ok(text
            .lines()
            .filter_map(|line| line.parse().ok())
            .filter(|pid| *pid != 0)
            .collect())
    }

    /// The cgroup below this one that a process is in.
    pub(super) fn of_process(&self, pid: u32) -> Result<OwnedFd> {
        let file = format!("/proc/{pid}/cgroup");
        let text = std::fs::read_to_string(&file).map_err(failed("reading", &file))?;
        let path = text
            .lines()
            .find_map(|line| line.strip_prefix("0::"))
            .unwrap_or("/");
        // The kernel's path starts at the hierarchy's root; this cgroup's name is in it once.
        let name = self.path.file_name().unwrap_or_default();
        let below: PathBuf = Path::new(path)
            .components()
            .skip_while(|component| component.as_os_str() != name)
            .skip(1)
            .collect();
        let path = self.path.join(below);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(&path, flags, Mode::empty()).map_err(|e| failed("opening", path)(e.into()))
    }

    /// Every directory below, relative, parents first. The kernel's own limit on depth bounds it.
    fn subdirectories(&self) -> Result<Vec<PathBuf>> {
        let mut found: Vec<PathBuf> = Vec::new();
        let mut next = vec![PathBuf::new()];
        while let Some(relative) = next.pop() {
            let path = self.path.join(&relative);
            let entries = match std::fs::read_dir(&path) {
                Ok(entries) => entries,
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(failed("listing", path)(e)),
            };
            for entry in entries.flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    let below = relative.join(entry.file_name());
                    found.push(below.clone());
                    next.push(below);
                }
            }
        }
        Ok(found)
    }

    /// Kills every process in it and below it, also such as are being forked.
    pub(super) fn kill(&self) -> Result<()> {
        self.write("cgroup.kill", "1")
    }

    /// Sends every process a signal.
    pub(super) fn signal(&self, signal: i32) -> Result<()> {
        for pid in self.processes()? {
            let pid = i32::try_from(pid).unwrap_or(i32::MAX);
            // SAFETY: a plain system call.
            let result = unsafe { libc::kill(pid, signal) };
            let error = io::Error::last_os_error();
            // One that has just ended needs no signal.
            if result < 0 && error.raw_os_error() != Some(libc::ESRCH) {
                let step = format!("sending signal {signal} to process {pid}");
                return Err(Error::Process {
                    step,
                    source: error,
                });
            }
        }
        Ok(())
    }

    /// Freezes or thaws everything in it, and waits until it is so.
    pub(super) fn set_frozen(&self, id: &str, frozen: bool) -> Result<()> {
        // Opened before the change, so that its notification cannot be missed.
        let events = self
            .open("cgroup.events", OFlags::RDONLY)
            .map_err(failed("opening", self.path.join("cgroup.events")))?;
        self.write("cgroup.freeze", if frozen { "1" } else { "0" })?;
        let deadline = Instant::now() + PATIENCE;
        while self.event("frozen")? != Some(u64::from(frozen)) {
            if !events::wait_for_change(&events, deadline) {
                // A thaw for a freeze that did not come about: half frozen is worse than not.
                if frozen {
                    let _ = self.write("cgroup.freeze", "0");
                }
                return Err(Error::Timeout {
                    id: id.into(),
                    action: if frozen { "freezing" } else { "thawing" },
                    limit_ms: PATIENCE.as_millis().try_into().unwrap_or(u64::MAX),
                });
            }
        }
        Ok(())
    }

    /// A counter or flag of cgroup.events.
    fn event(&self, name: &str) -> Result<Option<u64>> {
        let text = self.read("cgroup.events")?.unwrap_or_default();
        Ok(events::value(&text, name))
    }

    /// Kills what is left in it and removes it, with everything below.
    pub(super) fn remove(&self) -> Result<()> {
        let gone = |e: &io::Error| e.kind() == io::ErrorKind::NotFound;
        // The usual case: nothing is left and nothing below.
        match std::fs::remove_dir(&self.path) {
            Ok(()) => return Ok(()),
            Err(e) if gone(&e) => return Ok(()),
            Err(_) => {}
        }
        let deadline = Instant::now() + PATIENCE;
        // Frozen processes die too, once they are killed.
        self.kill()?;
        loop {
            for below in self.subdirectories()?.iter().rev() {
                // What is still in use fails now and is tried again.
                let _ = std::fs::remove_dir(self.path.join(below));
            }
            match std::fs::remove_dir(&self.path) {
                Ok(()) => return Ok(()),
                Err(e) if gone(&e) => return Ok(()),
                Err(_) if Instant::now() < deadline => std::thread::sleep(PAUSE),
                Err(e) => {
                    return Err(failed("removing (its processes do not end)", &self.path)(e));
                }
            }
        }
    }
}

/// A value the kernel would not take.
#[derive(Debug, thiserror::Error)]
#[error("the kernel refused {value:?}")]
struct CgroupWrite {
    value: String,
    source: io::Error,
}

#[cfg(test)]
mod tests;
