//! The container's init between `clone3` and `execve`.

use std::ffi::CString;
use std::os::fd::RawFd;

use super::namespaces::{NamespacePlan, become_namespace_root};
use super::process::ProcessPlan;
use super::report::{At, ChildResult, Failure, Message, Step, wait_for_agent};
use super::rootfs::RootPlan;
use super::spawn;
use super::sys;

/// Everything the init needs, made by the agent before it exists.
#[derive(Debug)]
pub(super) struct InitPlan {
    pub namespaces: NamespacePlan,
    /// None in a mount namespace joined by path.
    pub root: Option<RootPlan>,
    pub hostname: Option<CString>,
    pub domainname: Option<CString>,
    /// Path below /proc/sys of the agent, value.
    pub sysctls: Vec<(CString, CString)>,
    pub process: ProcessPlan,
    /// Descriptors that stay open until `execve` is near, sorted.
    pub keep: Vec<RawFd>,
}

impl InitPlan {
    /// In the agent, once the child has its copy: closes what only the child needs.
    pub(super) fn release(&mut self) {
        self.keep.clear();
        self.process.release();
        if let Some(root) = &mut self.root {
            root.release();
        }
    }

    /// In the child: all of it. Returns never.
    pub(super) fn run(&self, socket: RawFd) -> ! {
        let failure = match self.prepare(socket) {
            Ok(terminal) => self.process.become_it(socket, terminal, true),
            Err(failure) => failure,
        };
        fail(socket, failure)
    }

    fn prepare(&self, socket: RawFd) -> ChildResult<Option<RawFd>> {
        begin(&self.keep)?;
        if self.namespaces.id_maps.is_some() {
            wait_for_agent(socket);
            become_namespace_root()?;
        } else {
            self.process.adjust_oom_score()?;
        }
        self.namespaces.enter()?;
        for (index, (path, value)) in self.sysctls.iter().enumerate() {
            sys::write_file(path, value.as_bytes()).at_index(Step::Sysctl, index)?;
        }
        if let Some(name) = &self.hostname {
            sys::set_uts_name(libc::SYS_sethostname, name.as_bytes()).at_index(Step::UtsName, 0)?;
        }
        if let Some(name) = &self.domainname {
            sys::set_uts_name(libc::SYS_setdomainname, name.as_bytes())
                .at_index(Step::UtsName, 1)?;
        }
        match &self.root {
            Some(root) => root.build(socket),
            None => Ok(None),
        }
    }
}

/// First thing in any child: nobody may look into this copy of the agent, and it holds nothing it does not need.
pub(super) fn begin(keep: &[RawFd]) -> ChildResult {
    sys::prctl(libc::PR_SET_DUMPABLE, 0, 0).at(Step::Prepare)?;
    spawn::close_others(keep).at(Step::Prepare)?;
    sys::setsid().at(Step::Prepare)
}

/// Last thing in a child that failed: says why. The socket may have moved to descriptor 3 meanwhile.
pub(super) fn fail(socket: RawFd, failure: Failure) -> ! {
    let message = Message::Failed(failure);
    if message.send(socket).is_err() {
        let _ = message.send(3);
    }
    sys::exit(1)
}
