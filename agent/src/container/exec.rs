//! A further process in a running container, between `clone3` and `execve`.

use std::os::fd::RawFd;

use super::init::{begin, fail};
use super::process::{ProcessPlan, StreamPlan};
use super::report::{At, ChildResult, Step};
use super::sys;
use super::terminal;

/// Everything the process needs, made by the agent before it exists.
#[derive(Debug)]
pub(super) struct ExecPlan {
    pub process: ProcessPlan,
    /// Of the container's init.
    pub pidfd: RawFd,
    /// Namespaces to join: those the container does not share with the agent, but for pid, which `clone3` made right.
    pub namespaces: i32,
    /// Descriptors that stay open until `execve` is near, sorted.
    pub keep: Vec<RawFd>,
}

impl ExecPlan {
    /// In the child: all of it. Returns never.
    pub(super) fn run(&self, socket: RawFd) -> ! {
        let failure = match self.prepare(socket) {
            Ok(terminal) => self.process.become_it(socket, terminal, false),
            Err(failure) => failure,
        };
        fail(socket, failure)
    }

    fn prepare(&self, socket: RawFd) -> ChildResult<Option<RawFd>> {
        begin(&self.keep)?;
        self.process.adjust_oom_score()?;
        if self.namespaces != 0 {
            sys::setns(self.pidfd, self.namespaces).at(Step::JoinNamespace)?;
        }
        if self.namespaces & libc::CLONE_NEWUSER != 0 {
            super::namespaces::become_namespace_root()?;
        }
        match &self.process.streams {
            StreamPlan::Terminal { size } => {
                let root = sys::openat(libc::AT_FDCWD, c"/", libc::O_PATH | libc::O_DIRECTORY, 0)
                    .at_index(Step::Terminal, 0)?;
                terminal::make(root, *size, socket).map(Some)
            }
            StreamPlan::Files { .. } | StreamPlan::HandedOver => Ok(None),
        }
    }
}
