//! The device with a mock driver and real directories.

mod client;
mod hostile;
mod ordinary;
mod restore;
mod states;
