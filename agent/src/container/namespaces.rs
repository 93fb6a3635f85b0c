//! Namespaces: which a container gets new, which it joins, and in what way each is made at the least cost.

use std::ffi::CString;
use std::fmt::Write;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use oci_spec::runtime as oci;
use oci_spec::runtime::LinuxNamespaceType as Type;

pub use super::pid_holder::PidHolder;
use super::report::{At, ChildResult, Step};
use super::sys;
use super::{Error, Result};

/// What a namespace of the spec without a path means in this pod.
#[derive(Clone, Debug, Default)]
pub enum Shared {
    /// The container gets a new one.
    #[default]
    None,
    /// The agent's own, that is the guest's, is kept. It costs nothing.
    Guest,
    /// This one is joined.
    Fd(Arc<OwnedFd>),
}

/// The namespaces that the containers of a pod share. They replace namespaces that the spec lists without a path; a
/// kind that the spec does not list stays the agent's.
#[derive(Clone, Debug)]
pub struct SharedNamespaces {
    /// Network: never new, since the guest's is the pod's; `None` counts as `Guest`.
    pub network: Shared,
    /// System V IPC and POSIX queues.
    pub ipc: Shared,
    /// Host name.
    pub uts: Shared,
    /// Process ids.
    pub pid: Shared,
    /// User and group ids: with `pid` if that belongs to a user namespace, since only who is in it may mount a /proc of it.
    pub user: Shared,
}

impl Default for SharedNamespaces {
    fn default() -> Self {
        Self {
            network: Shared::Guest,
            ipc: Shared::Guest,
            uts: Shared::Guest,
            pid: Shared::None,
            user: Shared::None,
        }
    }
}

/// A namespace the child joins by itself.
#[derive(Debug)]
pub(super) struct Join {
    fd: Arc<OwnedFd>,
    kind: i32,
    name: String,
}

/// Mappings of a new user namespace, as /proc/PID/uid_map and gid_map take them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdMaps {
    uid: String,
    gid: String,
}

impl IdMaps {
    /// Those of the user namespace that a container is to have, if it is to have a new one.
    ///
    /// # Errors
    /// They are not ones that the kernel takes.
    pub fn of(spec: &oci::Spec) -> Result<Option<Self>> {
        let Some(linux) = spec.linux() else {
            return Ok(None);
        };
        let mut namespaces = linux.namespaces().iter().flatten();
        let new = namespaces.any(|one| one.typ() == Type::User && one.path().is_none());
        new.then(|| Self::new(linux)).transpose()
    }

    fn new(linux: &oci::Linux) -> Result<Self> {
        let uid = linux.uid_mappings().as_deref().unwrap_or_default();
        let gid = linux.gid_mappings().as_deref().unwrap_or_default();
        Ok(Self {
            uid: id_map("linux.uidMappings", uid)?,
            gid: id_map("linux.gidMappings", gid)?,
        })
    }

    /// Gives them to the namespace of process `pid`, which has none yet.
    pub(super) fn write(&self, pid: u32) -> Result<()> {
        for (name, map) in [("uid_map", &self.uid), ("gid_map", &self.gid)] {
            let path = format!("/proc/{pid}/{name}");
            std::fs::write(&path, map).map_err(|source| Error::Namespace {
                step: format!("writing {path}"),
                source,
            })?;
        }
        Ok(())
    }
}

/// What is made how.
#[derive(Debug, Default)]
pub(super) struct NamespacePlan {
    /// For `clone3`: CLONE_NEW* that it makes itself.
    pub clone: i32,
    /// For `unshare` in the child: those that `clone3` would root in the agent's cgroup (cgroup), close for offsets
    /// (time), or make in the wrong user namespace (all, if one is joined).
    unshare: i32,
    joins: Vec<Join>,
    /// Joined by the agent around `clone3`, since a process's own pid namespace never changes.
    pub pid: Option<Arc<OwnedFd>>,
    /// Every kind in which the container is not where the agent is.
    pub own: i32,
    pub id_maps: Option<IdMaps>,
    time_offsets: Option<CString>,
}

impl NamespacePlan {
    /// From the spec.
    pub(super) fn new(linux: &oci::Linux, shared: &SharedNamespaces) -> Result<Self> {
        let mut plan = Self::default();
        let mut user_joined = false;
        for namespace in linux.namespaces().iter().flatten() {
            let kind = kind(namespace.typ());
            if plan.own & kind != 0 {
                return Err(Error::invalid(
                    "linux.namespaces",
                    format!("{} is listed twice", namespace.typ()),
                ));
            }
            let joined = match namespace.path() {
                Some(path) if !path.as_os_str().is_empty() => {
                    Shared::Fd(Arc::new(open(path, namespace.typ())?))
                }
                _ => shared.of(namespace.typ()),
            };
            match joined {
                Shared::None => plan.make(namespace.typ(), kind),
                Shared::Guest => continue,
                Shared::Fd(fd) if kind == libc::CLONE_NEWPID => plan.pid = Some(fd),
                Shared::Fd(fd) => {
                    user_joined |= kind == libc::CLONE_NEWUSER;
                    let name = namespace.typ().to_string();
                    plan.joins.push(Join { fd, kind, name });
                }
            }
            plan.own |= kind;
        }
        if user_joined {
            plan.move_into_joined_user()?;
        }
        plan.set_maps(linux)?;
        plan.set_time_offsets(linux)?;
        Ok(plan)
    }

    fn make(&mut self, typ: Type, kind: i32) {
        match typ {
            Type::Cgroup | Type::Time => self.unshare |= kind,
            _ => self.clone |= kind,
        }
    }

    /// New namespaces must belong to a joined user namespace: so they are made after joining it.
    fn move_into_joined_user(&mut self) -> Result<()> {
        if self.clone & libc::CLONE_NEWPID != 0 {
            return Err(Error::unsupported(
                "linux.namespaces",
                "a new pid namespace in a user namespace joined by path would take a second fork",
            ));
        }
        self.unshare |= std::mem::take(&mut self.clone);
        // Joined first: it gives the rights to join what it owns.
        self.joins
            .sort_by_key(|join| join.kind != libc::CLONE_NEWUSER);
        Ok(())
    }

    fn set_maps(&mut self, linux: &oci::Linux) -> Result<()> {
        let uid = linux.uid_mappings().as_deref().unwrap_or_default();
        let gid = linux.gid_mappings().as_deref().unwrap_or_default();
        if self.clone & libc::CLONE_NEWUSER == 0 {
            if self.own & libc::CLONE_NEWUSER == 0 && !(uid.is_empty() && gid.is_empty()) {
                return Err(Error::invalid(
                    "linux.uidMappings",
                    "there are mappings but no user namespace",
                ));
            }
            return Ok(());
        }
        self.id_maps = Some(IdMaps::new(linux)?);
        Ok(())
    }

    fn set_time_offsets(&mut self, linux: &oci::Linux) -> Result<()> {
        let Some(offsets) = linux
            .time_offsets()
            .as_ref()
            .filter(|offsets| !offsets.is_empty())
        else {
            return Ok(());
        };
        if self.unshare & libc::CLONE_NEWTIME == 0 {
            return Err(Error::invalid(
                "linux.timeOffsets",
                "there are offsets but no new time namespace",
            ));
        }
        let mut content = String::new();
        for (clock, offset) in offsets {
            if clock != "monotonic" && clock != "boottime" {
                return Err(Error::invalid(
                    "linux.timeOffsets",
                    format!("no clock {clock:?}"),
                ));
            }
            let nanoseconds = offset.nanosecs().unwrap_or(0);
            // Writing to a String cannot fail.
            let _ = writeln!(
                content,
                "{clock} {} {nanoseconds}",
                offset.secs().unwrap_or(0)
            );
        }
        self.time_offsets = Some(super::command::c_string(
            "linux.timeOffsets",
            content.as_bytes(),
        )?);
        Ok(())
    }

    /// Whether the container has a new namespace of `kind` or joins one.
    pub(super) fn owns(&self, kind: i32) -> bool {
        self.own & kind != 0
    }

    /// Whether a new namespace of `kind` is made.
    pub(super) fn makes(&self, kind: i32) -> bool {
        (self.clone | self.unshare) & kind != 0
    }

    /// Descriptors that must stay open in the child.
    pub(super) fn keep(&self, keep: &mut Vec<RawFd>) {
        keep.extend(self.joins.iter().map(|join| join.fd.as_raw_fd()));
    }

    /// Name of join `index`, for errors.
    pub(super) fn join_name(&self, index: u32) -> &str {
        self.joins
            .get(index as usize)
            .map_or("?", |join| &join.name)
    }

    /// In the child: joins and makes what `clone3` did not.
    pub(super) fn enter(&self) -> ChildResult {
        for (index, join) in self.joins.iter().enumerate() {
            sys::setns(join.fd.as_raw_fd(), join.kind).at_index(Step::JoinNamespace, index)?;
            if join.kind == libc::CLONE_NEWUSER {
                become_namespace_root()?;
            }
        }
        if self.unshare != 0 {
            sys::unshare(self.unshare).at(Step::UnshareNamespaces)?;
        }
        match &self.time_offsets {
            // They count from the execve on, which moves the process into the new namespace.
            Some(offsets) => sys::write_file(c"/proc/self/timens_offsets", offsets.as_bytes())
                .at(Step::TimeOffsets),
            None => Ok(()),
        }
    }
}

/// In the child: takes on the ids that own the user namespace it is in.
pub(super) fn become_namespace_root() -> ChildResult {
    sys::setgid(0).at(Step::UserNamespaceRoot)?;
    sys::setuid(0).at(Step::UserNamespaceRoot)?;
    sys::prctl(libc::PR_SET_DUMPABLE, 0, 0).at(Step::UserNamespaceRoot)
}

impl SharedNamespaces {
    fn of(&self, typ: Type) -> Shared {
        match typ {
            Type::Network => match &self.network {
                Shared::None => Shared::Guest,
                other => other.clone(),
            },
            Type::Ipc => self.ipc.clone(),
            Type::Uts => self.uts.clone(),
            Type::Pid => self.pid.clone(),
            Type::User => self.user.clone(),
            Type::Mount | Type::Cgroup | Type::Time => Shared::None,
        }
    }
}

fn kind(typ: Type) -> i32 {
    match typ {
        Type::Mount => libc::CLONE_NEWNS,
        Type::Cgroup => libc::CLONE_NEWCGROUP,
        Type::Uts => libc::CLONE_NEWUTS,
        Type::Ipc => libc::CLONE_NEWIPC,
        Type::User => libc::CLONE_NEWUSER,
        Type::Pid => libc::CLONE_NEWPID,
        Type::Network => libc::CLONE_NEWNET,
        Type::Time => libc::CLONE_NEWTIME,
    }
}

/// Opens a namespace's file.
pub(super) fn open(path: &std::path::Path, typ: Type) -> Result<OwnedFd> {
    rustix::fs::open(
        path,
        rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )
    .map_err(|e| Error::Namespace {
        step: format!("opening {typ} namespace {}", path.display()),
        source: e.into(),
    })
}

/// The lines of a map, checked: at least one, none empty, no overflow.
fn id_map(field: &str, mappings: &[oci::LinuxIdMapping]) -> Result<String> {
    if mappings.is_empty() || mappings.len() > 340 {
        return Err(Error::invalid(
            field,
            "a new user namespace needs 1 to 340 mappings",
        ));
    }
    let mut map = String::new();
    for mapping in mappings {
        let fits = |start: u32| start.checked_add(mapping.size()).is_some();
        if mapping.size() == 0 || !fits(mapping.container_id()) || !fits(mapping.host_id()) {
            return Err(Error::invalid(
                field,
                format!("{mapping:?} is empty or out of range"),
            ));
        }
        // Writing to a String cannot fail.
        let _ = writeln!(
            map,
            "{} {} {}",
            mapping.container_id(),
            mapping.host_id(),
            mapping.size()
        );
    }
    Ok(map)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(json: &str) -> Result<NamespacePlan> {
        let linux: oci::Linux = serde_json::from_str(json).unwrap();
        NamespacePlan::new(&linux, &SharedNamespaces::default())
    }

    #[test]
    fn shared_kinds_stay_the_guests() {
        let plan = plan(
            r#"{"namespaces":[{"type":"pid"},{"type":"network"},{"type":"ipc"},{"type":"uts"},
            {"type":"mount"},{"type":"cgroup"}]}"#,
        )
        .unwrap();
        assert_eq!(plan.clone, libc::CLONE_NEWPID | libc::CLONE_NEWNS);
        assert_eq!(plan.unshare, libc::CLONE_NEWCGROUP);
        assert_eq!(plan.own, plan.clone | plan.unshare);
    }

    #[test]
    fn contradictions_are_refused() {
        for json in [
            r#"{"namespaces":[{"type":"pid"},{"type":"pid"}]}"#,
            r#"{"namespaces":[{"type":"user"}]}"#,
            r#"{"namespaces":[{"type":"user"}],"uidMappings":[{"hostID":0,"containerID":0,"size":0}],"gidMappings":[{"hostID":0,"containerID":0,"size":1}]}"#,
            r#"{"namespaces":[],"uidMappings":[{"hostID":0,"containerID":0,"size":1}]}"#,
            r#"{"namespaces":[{"type":"user"}],"uidMappings":[{"hostID":4294967295,"containerID":0,"size":2}],"gidMappings":[{"hostID":0,"containerID":0,"size":1}]}"#,
            r#"{"namespaces":[],"timeOffsets":{"monotonic":{"secs":1}}}"#,
            r#"{"namespaces":[{"type":"time"}],"timeOffsets":{"realtime":{"secs":1}}}"#,
            r#"{"namespaces":[{"type":"ipc","path":"/nonexistent/ipc"}]}"#,
        ] {
            assert!(plan(json).is_err(), "{json}");
        }
    }
}
