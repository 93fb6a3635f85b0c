//! The host side of Cella: a sandbox is one virtual machine and the agent in it.
//!
//! | module | what lives there |
//! | --- | --- |
//! | [`paths`] | where things are on a host |
//! | [`own_files`] | files that nobody but this user can have written |
//! | [`error`] | the kinds that errors keep |
//! | [`image`] | images: OCI layouts, archives, root file system directories, bundles; layers and their overlay mounts |
//! | [`spec`] | the OCI runtime specification made for a plain image |
//! | [`hypervisor`] | the virtual machine behind one narrow trait |
//! | [`network`] | a pod's network: the interfaces of a network namespace become the guest's |
//! | [`sandbox`] | one virtual machine, its agent, and the containers in it |
//! | [`template`] | booted guests saved once, from which sandboxes are cloned |
//! | [`snapshot`] | running sandboxes saved, and restored |
//! | [`pool`] | idle clones that wait for whoever needs one |
//! | [`container`] | the records of the command line's containers |
//! | [`timeline`] | when each phase of a start began |
//! | [`cli`] | the `cella` command |
//! | [`shim`] | `containerd-shim-cella-v2`, containerd's way to all this |

pub mod cli;
pub mod config;
pub mod container;
pub mod error;
pub mod hypervisor;
pub mod image;
pub mod network;
pub mod own_files;
pub mod paths;
pub mod pool;
pub mod sandbox;
pub mod shim;
pub mod size;
pub mod snapshot;
pub mod spec;
pub mod template;
pub mod timeline;
