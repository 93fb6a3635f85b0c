//! The device with a mock driver and real Unix sockets.

mod flow;
mod guest;
mod hostile;
