//! OCI containers, made inside the agent: a synchronous library.
//!
//! One `clone3` makes a container's init, and one makes each further process; whatever can be parsed, opened or
//! computed is so before it, in the agent. The child then makes raw system calls only (`init`, `exec`) and reports
//! over a socket what failed, as a step and an errno, from which the agent makes a typed [`Error`].

mod error;
mod lifecycle;
pub mod namespaces;
pub mod terminal;

pub use error::{Error, Kind, Result};
pub use lifecycle::{Container, Created, OomWatch, Process, Runtime, RuntimeConfig, Status, Stdio};
pub use namespaces::{Shared, SharedNamespaces};
