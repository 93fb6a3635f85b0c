//! A sandbox's directory under the run directory: everything that another process needs to find, use or remove it.
//!
//! | path | what it is |
//! | --- | --- |
//! | `lock` | locked (flock) by the owner for as long as it lives; a free lock means a dead owner |
//! | `booting` | locked by the owner until the agent is ready: whoever wants to attach waits for it |
//! | `sandbox.json` | [`SandboxState`] |
//! | `network.json` | [`Joints`]: what was done to a network namespace |
//! | `owner` | unix socket to the owner, which saves the sandbox |
//! | `vsock` | unix socket into the guest: `CONNECT <port>` |
//! | `sockets/<port>` | where the guest's connections to the host's port go |
//! | `share/` | what virtiofs serves to the guest; a shared mount, so that what is mounted later reaches the VMM's jail |
//! | `share/<container>/` | its `rootfs`, and `volumes/<n>` |

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};

use super::error::Error;
use super::state::{self, SandboxState};
use crate::error::ErrorKind;
use crate::network::Joints;
use crate::own_files;
use crate::paths::{Paths, check_id, is_valid_id};

/// The directory of one sandbox; see the module.
#[derive(Clone, Debug)]
pub struct SandboxDir {
    id: String,
    path: PathBuf,
    scratch: PathBuf,
}

/// Held by a sandbox's owner.
#[derive(Debug)]
pub struct OwnerLock(File);

/// Held by a sandbox's owner until the sandbox has booted.
#[derive(Debug)]
pub struct BootLock(File);

impl OwnerLock {
    /// That which another process held and has handed over.
    pub(crate) fn of(file: File) -> Self {
        Self(file)
    }
}

impl BootLock {
    /// That which another process held and has handed over.
    pub(crate) fn of(file: File) -> Self {
        Self(file)
    }
}

impl AsFd for OwnerLock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsFd for BootLock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl SandboxDir {
    /// The directory of sandbox `id`, which need not exist.
    ///
    /// # Errors
    /// `InvalidArgument`: `id` is no id.
    pub fn new(paths: &Paths, id: &str) -> Result<Self, Error> {
        check_id(id)?;
        Ok(Self {
            id: id.to_owned(),
            path: paths.sandbox(id),
            scratch: paths.scratch(id),
        })
    }

    /// Makes the directory and becomes its owner; the second lock is to be dropped when the sandbox has booted. What a dead owner left under the same id is removed first.
    ///
    /// # Errors
    /// `AlreadyExists`: a living owner has it.
    pub fn create(&self) -> Result<(OwnerLock, BootLock), Error> {
        self.make_room()?;
        let make = |path: &Path, mode| {
            DirBuilder::new()
                .recursive(true)
                .mode(mode)
                .create(path)
                .map_err(|e| Error::host(format!("making {}", path.display()), e))
        };
        make(&self.path, 0o700)?;
        let booting = BootLock(self.lock("booting")?);
        let lock = OwnerLock(self.lock("lock")?);
        make(&self.share(), 0o755)?;
        make(&self.sockets(), 0o755)?;
        make(&self.scratch, 0o700)?;
        self.share_mount()?;
        Ok((lock, booting))
    }

    /// Makes `other`, whose locks the caller has, this one: its VMM knows its files by themselves, not by their names.
    ///
    /// # Errors
    /// `AlreadyExists`: a living owner has this one.
    pub(crate) fn adopt(&self, other: &Self) -> Result<(), Error> {
        self.make_room()?;
        for (from, to) in [(&other.scratch, &self.scratch), (&other.path, &self.path)] {
            let action = || format!("making {} {}", from.display(), to.display());
            // No directory is in the way that is not empty.
            fs::rename(from, to).map_err(|e| Error::host(action(), e))?;
        }
        Ok(())
    }

    /// Removes what a dead owner left.
    fn make_room(&self) -> Result<(), Error> {
        if !self.path.exists() {
            return Ok(());
        }
        if self.is_owned() {
            return Err(Error::state(
                ErrorKind::AlreadyExists,
                format!("sandbox {} exists already", self.id),
            ));
        }
        self.remove()
    }

    /// Returns when a sandbox that is booting has booted, or its owner has died.
    ///
    /// # Errors
    /// `NotFound`: there is no such sandbox.
    pub async fn wait_booted(&self) -> Result<(), Error> {
        let file = File::open(self.path.join("booting")).map_err(|_| {
            Error::state(
                ErrorKind::NotFound,
                format!("there is no sandbox {}", self.id),
            )
        })?;
        let waited = tokio::task::spawn_blocking(move || {
            rustix::fs::flock(&file, FlockOperation::LockShared)
        });
        match waited.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(e)) => Err(Error::host(format!("waiting for sandbox {}", self.id), e)),
            Err(e) => Err(Error::host(format!("waiting for sandbox {}", self.id), e)),
        }
    }

    /// The sandbox's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the guest sees by virtiofs.
    pub fn share(&self) -> PathBuf {
        self.path.join("share")
    }

    /// The guest's ways to the host.
    pub fn sockets(&self) -> PathBuf {
        self.path.join("sockets")
    }

    /// The way to the process that owns it (`snapshot::owner`).
    pub fn owner(&self) -> PathBuf {
        self.path.join("owner")
    }

    /// The host's way into the guest.
    pub fn vsock(&self) -> PathBuf {
        self.path.join("vsock")
    }

    /// The shared directory of one container.
    pub fn container_share(&self, id: &str) -> PathBuf {
        self.share().join(id)
    }

    /// Where one container's overlay keeps what it writes.
    pub fn container_scratch(&self, id: &str) -> PathBuf {
        self.scratch.join(id)
    }

    /// What the owner wrote of the sandbox.
    ///
    /// # Errors
    /// The file cannot be read or is no state.
    pub fn read_state(&self) -> Result<SandboxState, Error> {
        state::read(&self.path.join("sandbox.json"))
    }

    /// Writes the sandbox's state, whole or not at all.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_state(&self, sandbox: &SandboxState) -> Result<(), Error> {
        state::write(&self.path.join("sandbox.json"), sandbox)
    }

    /// Writes down what is about to be done to a network namespace.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_network(&self, joints: &Joints) -> Result<(), Error> {
        state::write(&self.network_file(), joints)
    }

    /// What was done to a network namespace for it, if something was.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn read_network(&self) -> Result<Option<Joints>, Error> {
        let file = self.network_file();
        file.exists().then(|| state::read(&file)).transpose()
    }

    /// Whether a living process owns the sandbox.
    pub fn is_owned(&self) -> bool {
        let Ok(file) = File::open(self.path.join("lock")) else {
            return false;
        };
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared).is_err()
    }

    /// Removes everything of the sandbox from the host: the VMM if it lives, mounts, files. Safe to repeat.
    ///
    /// # Errors
    /// Something could not be removed; what could be is gone.
    pub fn remove(&self) -> Result<(), Error> {
        if let Ok(state) = self.read_state() {
            state.vmm.kill();
        }
        unmount_below(&self.path)?;
        unmount_below(&self.scratch)?;
        // Before the file that says what is to be undone goes.
        self.undo_network()?;
        for dir in [&self.scratch, &self.path] {
            remove_files(dir)?;
        }
        Ok(())
    }

    /// Removes what one container has on the host, but for its state and log.
    ///
    /// # Errors
    /// Something could not be unmounted or removed.
    pub fn remove_container_files(&self, id: &str) -> Result<(), Error> {
        for dir in [self.container_share(id), self.container_scratch(id)] {
            unmount_below(&dir)?;
            remove_files(&dir)?;
        }
        Ok(())
    }

    /// Takes a network namespace back to what it was.
    fn undo_network(&self) -> Result<(), Error> {
        match self.read_network() {
            Ok(joints) => Ok(joints.map_or(Ok(()), |joints| joints.undo())?),
            // Written only in part: nothing was done yet.
            Err(error) => {
                tracing::debug!("{error}");
                Ok(())
            }
        }
    }

    fn network_file(&self) -> PathBuf {
        self.path.join("network.json")
    }

    fn lock(&self, name: &str) -> Result<File, Error> {
        let path = self.path.join(name);
        let file = File::create(&path)
            .map_err(|e| Error::host(format!("locking {}", path.display()), e))?;
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
            Error::state(
                ErrorKind::AlreadyExists,
                format!("sandbox {} exists already", self.id),
            )
        })?;
        Ok(file)
    }

    /// Makes `share` a mount of its own that hands on what is mounted below it.
    fn share_mount(&self) -> Result<(), Error> {
        let share = self.share();
        let action = || format!("making {} a shared mount", share.display());
        rustix::mount::mount_bind(&share, &share).map_err(|e| Error::host(action(), e))?;
        // A peer group of its own: private first, so that nothing goes back to the host's other mounts.
        rustix::mount::mount_change(&share, MountPropagationFlags::PRIVATE)
            .map_err(|e| Error::host(action(), e))?;
        rustix::mount::mount_change(&share, MountPropagationFlags::SHARED)
            .map_err(|e| Error::host(action(), e))?;
        rustix::mount::mount_remount(
            &share,
            MountFlags::BIND | MountFlags::NODEV | MountFlags::NOSUID,
            c"",
        )
        .map_err(|e| Error::host(action(), e))
    }
}

/// How often the mounts are looked at, at most: the kernel shows them in pieces, and may leave one out while another
/// process unmounts others.
const UNMOUNTINGS: usize = 4;

/// Every sandbox directory under the run directory, living or dead.
///
/// # Errors
/// The run directory exists but cannot be read.
pub fn list(paths: &Paths) -> Result<Vec<SandboxDir>, Error> {
    let entries = match fs::read_dir(&paths.run_dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => {
            return Err(Error::host(
                format!("listing {}", paths.run_dir.display()),
                e,
            ));
        }
    };
    let mut ids: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|id| is_valid_id(id))
        .collect();
    ids.sort();
    ids.iter().map(|id| SandboxDir::new(paths, id)).collect()
}

/// Removes a directory with everything in it, if it is there.
///
/// # Errors
/// Something could not be removed.
pub(crate) fn remove_files(dir: &Path) -> Result<(), Error> {
    own_files::remove_dir(dir).map_err(|e| Error::host(format!("removing {}", dir.display()), e))
}

/// Where something is mounted at or below `path`, in the order of mounting.
///
/// # Errors
/// `/proc/self/mountinfo` cannot be read.
pub(crate) fn mounts_below(path: &Path) -> Result<Vec<PathBuf>, Error> {
    let path = crate::paths::canonical(path);
    let table = fs::read_to_string("/proc/self/mountinfo")
        .map_err(|e| Error::host("reading /proc/self/mountinfo", e))?;
    let points = table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|field| PathBuf::from(unescape(field)));
    Ok(points.filter(|point| point.starts_with(&path)).collect())
}

/// Unmounts everything mounted at or below `path`, the last mounted first.
///
/// # Errors
/// `/proc/self/mountinfo` cannot be read, or a mount cannot be detached.
pub fn unmount_below(path: &Path) -> Result<(), Error> {
    for _ in 0..UNMOUNTINGS {
        let points = mounts_below(path)?;
        if points.is_empty() {
            break;
        }
        for point in points.iter().rev() {
            let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
            match rustix::mount::unmount(point, flags) {
                // A peer's unmounting has taken it along.
                Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
                Err(e) => return Err(Error::host(format!("unmounting {}", point.display()), e)),
            }
        }
    }
    Ok(())
}

/// Undoes mountinfo's octal escapes of space, tab, newline and backslash (proc(5)).
fn unescape(field: &str) -> String {
    [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ]
    .iter()
    .fold(field.to_owned(), |text, (escape, plain)| {
        text.replace(escape, plain)
    })
}

/// Opens a unix socket's path to the VMM's user, which reaches it through its jail alone.
pub(crate) fn open_to_vmm(path: &Path) -> Result<(), Error> {
    fs::set_permissions(path, fs::Permissions::from_mode(0o666))
        .map_err(|e| Error::host(format!("opening {} to the VMM", path.display()), e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_escapes_are_undone() {
        assert_eq!(unescape("/a\\040b\\011c\\134d"), "/a b\tc\\d");
        assert_eq!(unescape("/plain"), "/plain");
    }
}
