//! `cella exec`: one more process in a running container.

use oci_spec::runtime::Process;

use super::session::{Session, wanted};
use super::streams::Output;
use super::{Context, Error};
use crate::container::{self, Record};
use crate::error::ErrorKind;
use crate::sandbox::dir::SandboxDir;
use crate::sandbox::state::Status;
use crate::sandbox::{Sandbox, stdio};

/// Run a command in a running container
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  cella exec web ps\n  cella exec -it web sh")]
pub struct Args {
    /// Pass standard input on
    #[arg(short, long)]
    interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    tty: bool,
    /// Set an environment variable
    #[arg(long, short, value_name = "K=V")]
    env: Vec<String>,
    /// The container
    id: String,
    /// The command
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// Runs the command.
pub async fn main(context: &Context, args: Args) -> Result<u8, Error> {
    let record = Record::open(&context.paths, &args.id)?;
    let state = record.read()?;
    if state.status != Status::Running {
        return Err(Error::Usage {
            kind: ErrorKind::FailedPrecondition,
            message: format!("container {} is not running", args.id),
        });
    }
    let process = process(&record, &args)?;
    let sandbox = Sandbox::attach(SandboxDir::new(&context.paths, &state.sandbox)?).await?;
    let exec = container::new_id()?;
    let (streams_for_agent, pending) =
        stdio::listen(&sandbox.dir().sockets(), wanted(args.interactive, args.tty))?;
    let container = state.guest_id();
    let made = sandbox.exec(container, &exec, &process, streams_for_agent);
    let ((), streams) = tokio::try_join!(made, pending.accept())?;
    let session = Session {
        sandbox: &sandbox,
        container,
        exec: &exec,
        terminal: args.tty,
        output: Output::Own,
        timeline: None,
    };
    let exit = session.run(streams, |_pid| ()).await?;
    sandbox.delete(container, &exec).await?;
    Ok(u8::try_from(exit.exit_status).unwrap_or(super::EXIT_FAILURE))
}

/// The container's own process with another command: the same user, rights and environment.
fn process(record: &Record, args: &Args) -> Result<Process, Error> {
    let spec = record.read_spec()?;
    let mut process = spec.process().clone().unwrap_or_default();
    process.set_args(Some(args.command.clone()));
    process.set_terminal(Some(args.tty));
    let mut env = process.env().clone().unwrap_or_default();
    crate::spec::set_env(&mut env, &args.env, "--env")?;
    if args.tty && !crate::spec::has_env(&env, "TERM") {
        env.push("TERM=xterm".into());
    }
    process.set_env(Some(env));
    Ok(process)
}
