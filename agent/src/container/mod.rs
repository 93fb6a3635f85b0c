//! OCI containers, made inside the agent: a synchronous library.
//!
//! One `clone3` makes a container's init, and one makes each further process; whatever can be parsed, opened or
//! computed is so before it, in the agent. The child then makes raw system calls only (`init`, `exec`) and reports
//! over a socket what failed, as a step and an errno, from which the agent makes a typed [`Error`].
//!
//! Every child is known to the agent's reaper from its birth, and told of at its end; the library itself waits for a
//! child only when it returns an error for it, and for hooks. Its calls may take as long as hooks, mounts and files do:
//! they are for threads of their own, and any of them may be under way for several containers, or for one, at once.

mod capabilities;
mod cgroup;
mod command;
#[allow(clippy::module_inception, reason = "it is the container's own type")]
mod container;
mod device_filter;
mod devices;
mod error;
mod exec;
mod hooks;
mod init;
mod kept;
mod life;
mod mounts;
pub mod namespaces;
mod options;
mod paths;
mod pid_holder;
mod plan;
mod process;
mod report;
mod rootfs;
mod runtime;
mod seccomp;
mod spawn;
mod sys;
pub mod terminal;
mod translate;
mod validate;

pub use cgroup::OomWatch;
pub use container::{Container, Executed, Process};
pub use error::{Error, Kind, Result};
pub use life::Status;
pub use namespaces::{PidHolder, Shared, SharedNamespaces};
pub use runtime::{Created, Runtime, RuntimeConfig, Stdio};
pub use spawn::Birth;

#[cfg(test)]
mod tests;
