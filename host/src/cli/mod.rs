//! The `cella` command: a pod in a virtual machine of its own, for a person or a CI job.
//!
//! Exit status: the command's own; 125 Cella's failure, 126 a command that cannot be executed, 127 one that is not
//! found, 128+N a death by signal N.

mod background;
mod bench;
mod check;
mod dns;
mod exec;
mod lifecycle;
mod list;
mod logs;
mod pod;
mod run;
mod session;
mod snapshot;
mod source;
mod stats;
mod streams;
mod template;
mod terminal;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use crate::error::{ErrorKind, chain};
use crate::paths::Paths;
use crate::{config, image, sandbox};

/// Cella's own failure.
pub const EXIT_FAILURE: u8 = 125;
/// A command that cannot be executed.
pub const EXIT_NOT_EXECUTABLE: u8 = 126;
/// A command that is not found.
pub const EXIT_NOT_FOUND: u8 = 127;

/// Runs containers of a pod in a virtual machine of their own
#[derive(Debug, Parser)]
#[command(
    name = "cella",
    version,
    after_help = "Example:\n  cella run oci:busybox -- echo hello\n  cella run --pod demo -d --name web oci:web && cella exec web ps"
)]
pub struct Cli {
    #[command(flatten)]
    paths: Paths,
    /// Show the whole chain of an error and the guest's console
    #[arg(long, global = true)]
    debug: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(run::Args),
    Exec(exec::Args),
    Ps(list::Args),
    Stop(lifecycle::StopArgs),
    Kill(lifecycle::KillArgs),
    Rm(lifecycle::RmArgs),
    Logs(logs::Args),
    Stats(stats::Args),
    Check(check::Args),
    Template(template::Args),
    Snapshot(snapshot::Args),
    /// Remove whatever dead processes left behind, and say what it was
    #[command(after_help = "Example:\n  cella gc")]
    Gc,
    Bench(bench::Args),
    /// Print the completions of a shell
    #[command(after_help = "Example:\n  cella completions bash > /etc/bash_completion.d/cella")]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the man pages into a directory
    #[command(after_help = "Example:\n  cella man /usr/local/share/man/man1")]
    Man {
        /// The directory
        dir: std::path::PathBuf,
    },
    #[command(name = "pod-owner", hide = true)]
    PodOwner(pod::Args),
    #[command(name = "restored-owner", hide = true)]
    RestoredOwner(snapshot::OwnerArgs),
}

/// Why the command failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// In the sandbox.
    #[error(transparent)]
    Sandbox(#[from] sandbox::Error),
    /// In the image.
    #[error(transparent)]
    Image(#[from] image::Error),
    /// In a template.
    #[error(transparent)]
    Template(#[from] crate::template::Error),
    /// In the configuration.
    #[error(transparent)]
    Config(#[from] config::Error),
    /// On the host.
    #[error("{action}: {source}")]
    Host {
        /// What was being done, on what.
        action: String,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// What was asked for makes no sense, or cannot be done now.
    #[error("{message}")]
    Usage {
        /// Its kind.
        kind: ErrorKind,
        /// Why.
        message: String,
    },
    /// A process in the background has failed and said so.
    #[error("{message}")]
    Background {
        /// The exit status that it would have had.
        status: u8,
        /// Its error.
        message: String,
    },
}

impl Error {
    fn host(action: impl Into<String>, source: impl Into<std::io::Error>) -> Self {
        Self::Host {
            action: action.into(),
            source: source.into(),
        }
    }

    fn usage(message: impl Into<String>) -> Self {
        Self::Usage {
            kind: ErrorKind::InvalidArgument,
            message: message.into(),
        }
    }

    fn status(&self) -> u8 {
        match self {
            Self::Sandbox(error) => {
                error
                    .start_failure()
                    .map_or(EXIT_FAILURE, |failure| match failure {
                        sandbox::StartFailure::NotFound => EXIT_NOT_FOUND,
                        sandbox::StartFailure::NotExecutable => EXIT_NOT_EXECUTABLE,
                    })
            }
            Self::Background { status, .. } => *status,
            _ => EXIT_FAILURE,
        }
    }
}

/// What a subcommand works with.
struct Context {
    paths: Paths,
    debug: bool,
}

/// Runs the command that `arguments` ask for, and gives its exit status. Errors go to stderr as one line.
pub fn main(arguments: impl Iterator<Item = std::ffi::OsString>) -> ExitCode {
    let arguments: Vec<_> = arguments.collect();
    if let Some(code) = crate::template::background::obey(arguments.iter().cloned()) {
        return code;
    }
    background::adopt();
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return match error.use_stderr() {
                true => ExitCode::from(EXIT_FAILURE),
                false => ExitCode::SUCCESS,
            };
        }
    };
    let level = match cli.debug {
        true => tracing::Level::DEBUG,
        false => tracing::Level::WARN,
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .without_time()
        .with_target(false)
        .init();
    let debug = cli.debug;
    match dispatch(cli) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            let text = match debug {
                true => chain(&error),
                false => error.to_string(),
            };
            let status = error.status();
            background::report_failure(status, &text);
            eprintln!("cella: {}", text.replace('\n', " "));
            ExitCode::from(status)
        }
    }
}

fn dispatch(cli: Cli) -> Result<u8, Error> {
    let context = Context {
        paths: cli.paths,
        debug: cli.debug,
    };
    match cli.command {
        Command::Run(args) => run::main(&context, args),
        Command::Exec(args) => with_runtime(exec::main(&context, args)),
        Command::Ps(args) => list::main(&context, &args),
        Command::Stop(args) => with_runtime(lifecycle::stop(&context, args)),
        Command::Kill(args) => with_runtime(lifecycle::kill(&context, args)),
        Command::Rm(args) => with_runtime(lifecycle::rm(&context, args)),
        Command::Logs(args) => logs::main(&context, &args),
        Command::Stats(args) => with_runtime(stats::main(&context, args)),
        Command::Template(args) => with_runtime(template::main(&context, args)),
        Command::Snapshot(args) => with_runtime(snapshot::main(&context, args)),
        Command::Check(args) => check::main(&context, &args),
        Command::Gc => lifecycle::gc(&context),
        Command::Bench(args) => with_runtime(bench::main(&context, args)),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "cella", &mut std::io::stdout());
            Ok(0)
        }
        Command::Man { dir } => {
            clap_mangen::generate_to(Cli::command(), &dir)
                .map_err(|e| Error::host(format!("writing man pages to {}", dir.display()), e))?;
            Ok(0)
        }
        Command::PodOwner(args) => with_runtime(pod::main(&context, args)),
        Command::RestoredOwner(args) => with_runtime(snapshot::own(&context, args)),
    }
}

fn with_runtime(command: impl Future<Output = Result<u8, Error>>) -> Result<u8, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Error::host("making the event loop", e))?;
    let outcome = runtime.block_on(command);
    // A thread that waits for this process's own input never ends; the process does.
    runtime.shutdown_background();
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(command: &clap::Command, path: &str) {
        for command in command.get_subcommands().filter(|c| !c.is_hide_set()) {
            let path = format!("{path} {}", command.get_name());
            let after = command.get_after_help().map(ToString::to_string);
            let example =
                after.is_some_and(|text| text.contains("Example:\n") && text.contains(&path));
            assert!(
                example || command.has_subcommands(),
                "{path} has no example of its own"
            );
            assert!(
                command.get_about().is_some(),
                "{path} does not say what it does"
            );
            check(command, &path);
        }
    }

    #[test]
    fn every_command_has_an_example_in_its_help() {
        check(&Cli::command(), "cella");
        Cli::command().debug_assert();
    }
}
