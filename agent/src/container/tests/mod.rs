//! Real containers, as root on the host: each test makes its own in a child process of fresh mount and pid
//! namespaces, with busybox for a root filesystem, and prints `SKIPPED` where it cannot.

mod errors;
mod lifecycle;
mod mounts;
mod namespaces;
mod process;
mod support;
mod terminals;
