//! The guest's PID 1 (in the making).

pub mod container;
