//! The container's root, built by the child in its own mount namespace. Image content is hostile: until the root is
//! changed, every path in it is resolved by `openat2` so that nothing can lead outside.

use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::PathBuf;

use super::devices::DevicePlan;
use super::mounts::{MountKind, MountPlan};
use super::options::Propagation;
use super::paths::{ensure_directory, ensure_file};
use super::report::{At, ChildResult, Message, Step, wait_for_agent};
use super::sys::{self, Errno, FdPath, MountAttr, SysResult};
use super::terminal;

const RDONLY: u64 = 1;

/// What the child needs to build the root.
#[derive(Debug)]
pub(super) struct RootPlan {
    /// The root filesystem, a detached tree.
    pub tree: Option<OwnedFd>,
    /// Where it comes from, for errors.
    pub path: PathBuf,
    pub mounts: Vec<MountPlan>,
    pub devices: DevicePlan,
    pub masked: Vec<CString>,
    pub readonly_paths: Vec<CString>,
    pub readonly: bool,
    pub propagation: Option<Propagation>,
    /// The agent runs hooks before pivot_root.
    pub hooks: bool,
    /// A terminal of this size, if one is wanted.
    pub terminal: Option<Option<(u16, u16)>>,
}

impl RootPlan {
    /// Descriptors that must stay open in the child.
    pub(super) fn keep(&self, keep: &mut Vec<RawFd>) {
        keep.extend(self.tree.as_ref().map(AsRawFd::as_raw_fd));
        keep.extend(self.mounts.iter().filter_map(|mount| match &mount.kind {
            MountKind::Tree(tree) => Some(tree.as_raw_fd()),
            MountKind::New { .. } => None,
        }));
        self.devices.keep(keep);
    }

    /// In the agent, once the child has its copy: lets go of everything that holds a mount.
    pub(super) fn release(&mut self) {
        self.tree = None;
        self.devices = DevicePlan::default();
        self.mounts.clear();
    }

    /// In the child: builds the root and changes to it. Returns the terminal's slave.
    pub(super) fn build(&self, socket: RawFd) -> ChildResult<Option<RawFd>> {
        sys::umask(0);
        sys::mount(c"", c"/", c"", libc::MS_REC | libc::MS_PRIVATE, c"").at(Step::PrivateMounts)?;
        let tree = self
            .tree
            .as_ref()
            .ok_or(Errno(libc::EBADF))
            .at(Step::AttachRoot)?;
        let root = tree.as_raw_fd();
        // On top of the root, which every user may reach, as the directory it comes from need not be. What looks for
        // absolute paths meanwhile still starts below, in the guest's root.
        sys::attach_tree(root, libc::AT_FDCWD, c"/").at(Step::AttachRoot)?;
        for (index, mount) in self.mounts.iter().enumerate() {
            attach(root, mount, index)?;
        }
        self.devices.make(root)?;
        let slave = match self.terminal {
            Some(size) => Some(self.make_terminal(root, size, socket)?),
            None => None,
        };
        for (index, path) in self.masked.iter().enumerate() {
            mask(root, path).at_index(Step::MaskPath, index)?;
        }
        if self.hooks {
            Message::Hooks.send(socket).at(Step::Prepare)?;
            wait_for_agent(socket);
        }
        self.set_root_attributes(root)?;
        change_root(root).at(Step::Pivot)?;
        for (index, path) in self.readonly_paths.iter().enumerate() {
            make_readonly(path).at_index(Step::ReadonlyPath, index)?;
        }
        Ok(slave)
    }

    fn make_terminal(
        &self,
        root: RawFd,
        size: Option<(u16, u16)>,
        socket: RawFd,
    ) -> ChildResult<RawFd> {
        let slave = terminal::make(root, size, socket)?;
        // /dev/console is the terminal, as in every other runtime.
        let console = ensure_file(root, c"/dev/console").at_index(Step::Terminal, 3)?;
        let tree = sys::clone_tree(slave, c"", false).at_index(Step::Terminal, 3)?;
        sys::attach_tree(tree, console, c"").at_index(Step::Terminal, 3)?;
        Ok(slave)
    }

    fn set_root_attributes(&self, root: RawFd) -> ChildResult {
        if let Some(propagation) = self.propagation {
            let (attr, recursive) = propagation.attribute();
            sys::mount_setattr(root, &attr, recursive).at(Step::RootAttributes)?;
        }
        if self.readonly {
            let attr = MountAttr {
                set: RDONLY,
                ..MountAttr::default()
            };
            sys::mount_setattr(root, &attr, false).at(Step::RootAttributes)?;
        }
        Ok(())
    }
}

fn attach(root: RawFd, mount: &MountPlan, index: usize) -> ChildResult {
    let target = if mount.directory {
        ensure_directory(root, &mount.destination)
    } else {
        ensure_file(root, &mount.destination)
    };
    let target = target.at_index(Step::MountTarget, index)?;
    match &mount.kind {
        MountKind::Tree(tree) => {
            sys::attach_tree(tree.as_raw_fd(), target, c"").at_index(Step::MountAttach, index)?;
        }
        MountKind::New {
            source,
            fstype,
            flags,
            data,
        } => {
            let path = FdPath::new(target);
            sys::mount(source, path.as_c_str(), fstype, *flags, data)
                .at_index(Step::MountAttach, index)?;
            if let Some(propagation) = mount.propagation {
                // Opened again: the descriptor is of what the mount now covers.
                let mounted = sys::open_in_root(root, &mount.destination, libc::O_PATH, 0)
                    .at_index(Step::MountPropagation, index)?;
                let path = FdPath::new(mounted);
                sys::mount(c"", path.as_c_str(), c"", propagation, c"")
                    .at_index(Step::MountPropagation, index)?;
            }
        }
    }
    Ok(())
}

/// Hides a path: a file behind /dev/null, a directory behind an empty read-only tmpfs. What is not there needs none.
fn mask(root: RawFd, path: &CStr) -> SysResult {
    let target = match sys::open_in_root(root, path, libc::O_PATH, 0) {
        Err(Errno(libc::ENOENT | libc::ENOTDIR)) => return Ok(()),
        other => other?,
    };
    let target = FdPath::new(target);
    match sys::mount(c"/dev/null", target.as_c_str(), c"", libc::MS_BIND, c"") {
        Err(Errno(libc::ENOTDIR)) => sys::mount(
            c"tmpfs",
            target.as_c_str(),
            c"tmpfs",
            libc::MS_RDONLY,
            c"size=0,nr_inodes=2,mode=755",
        ),
        other => other,
    }
}

/// Makes the tree at `path` read-only. The process is inside its root by now, which no path leaves.
fn make_readonly(path: &CStr) -> SysResult {
    let tree = match sys::clone_tree(libc::AT_FDCWD, path, true) {
        Err(Errno(libc::ENOENT | libc::ENOTDIR)) => return Ok(()),
        other => other?,
    };
    let attr = MountAttr {
        set: RDONLY,
        ..MountAttr::default()
    };
    sys::mount_setattr(tree, &attr, true)?;
    sys::attach_tree(tree, libc::AT_FDCWD, path)
}

/// Makes `root` the root and lets go of the old one. A guest that runs from its initial ramfs cannot pivot: there the
/// container's root stays on top of the old one, which no path from it reaches.
fn change_root(root: RawFd) -> SysResult {
    sys::fchdir(root)?;
    match sys::pivot_root() {
        // Both roots are "/" now, the old one on top; "." is the new one and names what covers it.
        Ok(()) => sys::detach(c".")?,
        Err(Errno(libc::EINVAL)) => sys::chroot(c".")?,
        Err(errno) => return Err(errno),
    }
    sys::chdir(c"/")
}
