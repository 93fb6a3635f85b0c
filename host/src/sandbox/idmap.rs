//! Id-mapped mounts, for containers with a user namespace: what root owns on the host is seen as owned by the id that the
//! container's root has in the guest. The host does the mapping; the guest sees the mapped ids alone.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use oci_spec::runtime::{LinuxIdMapping, Mount};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, WaitOptions};

use super::error::Error;
use crate::error::ErrorKind;

/// Mappings of one map at most: as the kernel has it.
const MAX_MAPPINGS: usize = 340;

/// Which ids become which: the lines of a `uid_map` and a `gid_map` (user_namespaces(7)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdMap {
    uid: String,
    gid: String,
}

impl IdMap {
    /// A mount's own mappings, if it has any.
    ///
    /// # Errors
    /// `InvalidArgument`: there is one for users or for groups alone, or there are too many.
    pub fn of_mount(mount: &Mount) -> Result<Option<Self>, Error> {
        let uids = mount.uid_mappings().as_deref().unwrap_or_default();
        let gids = mount.gid_mappings().as_deref().unwrap_or_default();
        if uids.is_empty() && gids.is_empty() {
            return Ok(None);
        }
        let what = format!("mount {}", mount.destination().display());
        let lines = |mappings: &[LinuxIdMapping]| {
            let mappings = mappings.iter();
            mappings
                .map(|one| (one.container_id(), one.host_id(), one.size()))
                .collect()
        };
        Self::new(&what, lines(uids), lines(gids)).map(Some)
    }

    /// Mappings as containerd writes them into a mount's options: `CONTAINER:HOST:SIZE,...`.
    ///
    /// # Errors
    /// `InvalidArgument`: they are not of that form.
    pub fn parse(uids: &str, gids: &str) -> Result<Self, Error> {
        let parse = |text: &str| {
            let triples = text.split(',').map(|triple| {
                let mut numbers = triple.split(':').map(|number| number.parse::<u32>().ok());
                let mut next = || numbers.next().flatten();
                let numbers_of = (next()?, next()?, next()?);
                numbers.next().is_none().then_some(numbers_of)
            });
            triples.collect::<Option<Vec<_>>>().ok_or_else(|| {
                let message = format!("id mapping '{text}' is not CONTAINER:HOST:SIZE,...");
                Error::state(ErrorKind::InvalidArgument, message)
            })
        };
        Self::new("a mount's options", parse(uids)?, parse(gids)?)
    }

    fn new(
        what: &str,
        uids: Vec<(u32, u32, u32)>,
        gids: Vec<(u32, u32, u32)>,
    ) -> Result<Self, Error> {
        let lines = |mappings: Vec<(u32, u32, u32)>| {
            if mappings.is_empty() || mappings.len() > MAX_MAPPINGS {
                let message = format!(
                    "{what}: ids are mapped by 1 to {MAX_MAPPINGS} mappings, both users and groups"
                );
                return Err(Error::state(ErrorKind::InvalidArgument, message));
            }
            let lines = mappings.into_iter();
            Ok(lines
                .map(|(inside, outside, size)| format!("{inside} {outside} {size}\n"))
                .collect())
        };
        Ok(Self {
            uid: lines(uids)?,
            gid: lines(gids)?,
        })
    }

    /// A user namespace of these mappings, which mount_setattr(2) wants: it has no process.
    ///
    /// # Errors
    /// `InvalidArgument`: the kernel does not take the mappings. Or it makes no namespace.
    pub fn user_namespace(&self) -> Result<OwnedFd, Error> {
        let action = "making a user namespace for an id-mapped mount";
        let host = |e: Errno| Error::host(action, e);
        let (wait_for, hold) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(host)?;
        let child = spawn_in_namespace(&wait_for, &hold).map_err(|e| Error::host(action, e))?;
        let made = self.map(child);
        drop(hold);
        // It ends by itself now; it does nothing that can fail.
        let wait = || rustix::process::waitpid(Some(child), WaitOptions::empty());
        while matches!(wait(), Err(Errno::INTR)) {}
        made
    }

    fn map(&self, child: Pid) -> Result<OwnedFd, Error> {
        let proc = |name: &str| format!("/proc/{}/{name}", child.as_raw_nonzero());
        for (name, lines) in [("uid_map", &self.uid), ("gid_map", &self.gid)] {
            fs::write(proc(name), lines).map_err(|e| {
                let lines = lines.trim_end().replace('\n', ", ");
                let message = format!("mapping the ids of a mount by '{lines}': {e}");
                Error::state(ErrorKind::InvalidArgument, message)
            })?;
        }
        let namespace = File::open(proc("ns/user"))
            .map_err(|e| Error::host("opening the user namespace of an id-mapped mount", e))?;
        Ok(namespace.into())
    }
}

/// A child in a user namespace of its own, which lives until `hold` is closed here, or this process dies.
fn spawn_in_namespace(wait_for: &OwnedFd, hold: &OwnedFd) -> io::Result<Pid> {
    let flags = libc::CLONE_NEWUSER | libc::SIGCHLD;
    // SAFETY: as fork(2): a null stack means a copy of the caller's, and the other arguments are not read for these flags.
    match unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            // SAFETY: the child of a process that may have threads: system calls alone, on descriptors of its own and a
            // byte on its stack.
            unsafe {
                libc::close(hold.as_raw_fd());
                let mut byte = 0_u8;
                libc::read(wait_for.as_raw_fd(), (&raw mut byte).cast(), 1);
                libc::_exit(0)
            }
        }
        pid => i32::try_from(pid)
            .ok()
            .and_then(Pid::from_raw)
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EOVERFLOW)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_parsed_and_nonsense_is_told() {
        let map = IdMap::parse("0:1000:100000,200000:5:1", "0:2000:100000").unwrap();
        assert_eq!(map.uid, "0 1000 100000\n200000 5 1\n");
        assert_eq!(map.gid, "0 2000 100000\n");
        for wrong in ["", "0:1", "0:1:2:3", "0:1:x", "0:1:2,"] {
            let error = IdMap::parse(wrong, "0:0:1").unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{wrong}");
        }
    }

    #[test]
    fn a_mount_maps_both_or_neither() {
        let mut mount = Mount::default();
        assert_eq!(IdMap::of_mount(&mount).unwrap(), None);
        let mapping: LinuxIdMapping =
            serde_json::from_str(r#"{"containerID":0,"hostID":1000,"size":10}"#).unwrap();
        mount.set_uid_mappings(Some(vec![mapping]));
        assert!(IdMap::of_mount(&mount).is_err());
        mount.set_gid_mappings(Some(vec![mapping]));
        let map = IdMap::of_mount(&mount).unwrap().unwrap();
        assert_eq!(map.uid, "0 1000 10\n");
    }

    #[test]
    fn a_namespace_outlives_the_process_that_made_it() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: root");
            return;
        }
        let map = IdMap::parse("0:1000:10", "0:1000:10").unwrap();
        let namespace = map.user_namespace().unwrap();
        let name = fs::read_link(format!("/proc/self/fd/{}", namespace.as_raw_fd())).unwrap();
        assert!(name.to_str().unwrap().starts_with("user:["), "{name:?}");
        // More ids than there are.
        let map = IdMap::parse("0:4294967295:2", "0:0:1").unwrap();
        let error = map.user_namespace().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    }
}
