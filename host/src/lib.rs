//! The host side of Cella: a sandbox is one virtual machine and the agent in it.
//!
//! | module | what lives there |
//! | --- | --- |
//! | [`error`] | the kinds of errors |
//! | [`image`] | images: OCI layouts, archives, root file system directories, bundles; layers and their overlay mounts |
//! | [`spec`] | the OCI runtime specification made for a plain image |

pub mod error;
pub mod image;
pub mod spec;
