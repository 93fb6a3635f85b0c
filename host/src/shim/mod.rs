//! `containerd-shim-cella-v2`: containerd's runtime shim. One shim, and one sandbox, for each pod; containers without a pod
//! have a sandbox of their own.
//!
//! | file | what lives there |
//! | --- | --- |
//! | `args`, `bootstrap`, `start`, `delete`, `info` | how containerd runs the shim |
//! | `serve`, `orphan` | the shim itself, and whether containerd still knows of it |
//! | `task` | the task service (v2 and v3) |
//! | `sandbox_service`, `pod_files` | the sandbox service, and what containerd leaves to it |
//! | `pod`, `container`, `process` | what is known of the sandbox and what is in it |
//! | `create`, `lifecycle` | how containers and processes come, run and end |
//! | `prepare`, `bundle`, `spec`, `rootfs` | a bundle made the guest's |
//! | `settings` | what a sandbox shall be |
//! | `io`, `logger` | standard streams |
//! | `events`, `log` | what containerd is told |
//! | `stats`, `pids`, `time`, `error` | values as containerd has them |

mod args;
mod bootstrap;
mod bundle;
mod container;
mod create;
mod delete;
mod error;
mod events;
mod info;
mod io;
mod lifecycle;
mod log;
mod logger;
mod orphan;
mod pids;
mod pod;
mod pod_files;
mod prepare;
mod process;
mod rootfs;
mod sandbox_service;
mod serve;
mod settings;
mod spec;
mod start;
mod stats;
mod task;
mod time;

use std::ffi::OsString;
use std::process::ExitCode;

use self::args::{Action, Args};
use crate::error::chain;
use crate::paths::Paths;
use crate::sandbox::Error;
use crate::template;

/// This program.
const PROGRAM: &str = "containerd-shim-cella-v2";
/// The runtime's name in containerd's configuration.
const NAME: &str = "io.containerd.cella.v2";

/// Runs the shim with containerd's `arguments`, the program's name among them.
pub fn main(arguments: impl Iterator<Item = String>) -> ExitCode {
    let arguments: Vec<_> = arguments.collect();
    if let Some(code) = template::background::obey(arguments.iter().map(OsString::from)) {
        return code;
    }
    let outcome = Args::parse(arguments.into_iter().skip(1)).and_then(|args| run(&args));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{PROGRAM}: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<(), Error> {
    let paths = Paths::from_environment();
    match args.action {
        Action::Start => start::main(&paths, args),
        Action::Delete => delete::main(&paths, args),
        Action::Serve => serve::main(paths, args),
        Action::Version => print(format!("{NAME} {}\n", env!("CARGO_PKG_VERSION")).as_bytes()),
        // The options on standard input change nothing of it.
        Action::Info => print(&info::encode()?),
    }
}

fn print(bytes: &[u8]) -> Result<(), Error> {
    bootstrap::print(bytes).map_err(|e| Error::host("writing to standard output", e))
}
