//! `cella stop`, `kill`, `rm` and `gc`: how containers and pods end.

use std::time::Duration;

use rustix::process::Signal;

use super::{Context, Error};
use crate::container::{self, Record};
use crate::error::ErrorKind;
use crate::image::Store;
use crate::sandbox::Sandbox;
use crate::sandbox::dir::SandboxDir;
use crate::sandbox::gc;
use crate::sandbox::state::{ContainerState, Status};
use crate::spec::{self, parse_signal};
use crate::{pool, template};

/// How long a container's runner may take to settle its end after it was killed.
const SETTLE: Duration = Duration::from_secs(10);
/// How often a record is looked at while its end is waited for.
const LOOK: Duration = Duration::from_millis(50);

/// Stop a container, or a pod with all its containers
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  cella stop web --timeout 5\n  cella stop demo")]
pub struct StopArgs {
    /// The container or pod
    id: String,
    /// Seconds from the stop signal to the kill
    #[arg(long, short, value_name = "S", default_value_t = 10)]
    timeout: u64,
}

/// Send a signal to a container
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  cella kill web HUP")]
pub struct KillArgs {
    /// The container
    id: String,
    /// The signal's name or number
    #[arg(default_value = "KILL")]
    signal: String,
}

/// Forget a stopped container, or stop and forget a pod
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  cella rm web")]
pub struct RmArgs {
    /// The container or pod
    id: String,
}

/// Stops a container or a pod.
pub async fn stop(context: &Context, args: StopArgs) -> Result<u8, Error> {
    let timeout = Duration::from_secs(args.timeout);
    match Record::open(&context.paths, &args.id) {
        Ok(record) => stop_container(context, &record, timeout).await?,
        Err(not_found) => {
            let dir = SandboxDir::new(&context.paths, &args.id)?;
            if !dir.is_owned() {
                return Err(not_found.into());
            }
            stop_pod(context, &dir, timeout).await?;
        }
    }
    Ok(0)
}

/// Sends a signal to a container's init.
pub async fn kill(context: &Context, args: KillArgs) -> Result<u8, Error> {
    let number = parse_signal(&args.signal)
        .ok_or_else(|| Error::usage(format!("'{}' is no signal", args.signal)))?;
    let record = Record::open(&context.paths, &args.id)?;
    let state = running(&record)?;
    attach(context, &state)
        .await?
        .signal(state.guest_id(), "", number, false)
        .await?;
    Ok(0)
}

/// Forgets a container that has ended, or ends a pod.
pub async fn rm(context: &Context, args: RmArgs) -> Result<u8, Error> {
    match Record::open(&context.paths, &args.id) {
        Ok(record) => {
            let state = record.read()?;
            if !matches!(state.status, Status::Exited { .. }) && state.runner.is_alive() {
                return Err(Error::Usage {
                    kind: ErrorKind::FailedPrecondition,
                    message: format!("container {} is running: stop it first", args.id),
                });
            }
            let dir = SandboxDir::new(&context.paths, &state.sandbox)?;
            dir.remove_container_files(state.guest_id())?;
            record.remove()?;
            Ok(0)
        }
        Err(_) => {
            let stop_args = StopArgs {
                id: args.id,
                timeout: 10,
            };
            stop(context, stop_args).await
        }
    }
}

/// Removes what dead processes left, and prints what it was.
pub fn gc(context: &Context) -> Result<u8, Error> {
    for line in gc::collect(&context.paths)? {
        println!("{line}");
    }
    if pool::keeper::collect(&context.paths)
        .map_err(|e| Error::host("removing what a dead pool's keeper left", e))?
    {
        println!("pool: its keeper is dead");
    }
    for line in template::Store::new(&context.paths).collect()? {
        println!("{line}");
    }
    for path in Store::open(&context.paths.lib_dir)?.gc()? {
        println!("unfinished layer {}", path.display());
    }
    Ok(0)
}

async fn stop_container(
    context: &Context,
    record: &Record,
    timeout: Duration,
) -> Result<(), Error> {
    let state = record.read()?;
    if matches!(state.status, Status::Exited { .. }) {
        return Ok(());
    }
    let sandbox = attach(context, &state).await?;
    let signal = spec::stop_signal(&record.read_spec()?)?;
    let container = state.guest_id();
    sandbox.signal(container, "", signal, false).await?;
    if ended(record, timeout).await {
        return Ok(());
    }
    let kill = libc::SIGKILL.unsigned_abs();
    sandbox.signal(container, "", kill, true).await?;
    if ended(record, SETTLE).await {
        return Ok(());
    }
    Err(Error::Usage {
        kind: ErrorKind::DeadlineExceeded,
        message: format!(
            "container {} was killed, but its end was not reported",
            record.id()
        ),
    })
}

async fn stop_pod(context: &Context, dir: &SandboxDir, timeout: Duration) -> Result<(), Error> {
    for record in container::list(&context.paths)? {
        let Ok(state) = record.read() else { continue };
        if state.sandbox == dir.id() && matches!(state.status, Status::Running) {
            stop_container(context, &record, timeout).await?;
        }
    }
    let owner = dir.read_state()?.owner;
    owner.signal(Signal::TERM);
    let gone = tokio::time::timeout(SETTLE, async {
        while dir.path().exists() {
            tokio::time::sleep(LOOK).await;
        }
    });
    gone.await.map_err(|_| Error::Usage {
        kind: ErrorKind::DeadlineExceeded,
        message: format!(
            "pod {}: its owner, process {}, does not end",
            dir.id(),
            owner.pid
        ),
    })
}

/// Whether the container's runner has written its end within `timeout`. The runner is another process: its record is
/// all there is to look at.
async fn ended(record: &Record, timeout: Duration) -> bool {
    let gone = async {
        loop {
            match record.read() {
                Ok(state) if !matches!(state.status, Status::Exited { .. }) => {
                    tokio::time::sleep(LOOK).await;
                }
                _ => break,
            }
        }
    };
    tokio::time::timeout(timeout, gone).await.is_ok()
}

fn running(record: &Record) -> Result<ContainerState, Error> {
    let state = record.read()?;
    match state.status {
        Status::Running => Ok(state),
        _ => Err(Error::Usage {
            kind: ErrorKind::FailedPrecondition,
            message: format!("container {} is not running", record.id()),
        }),
    }
}

async fn attach(context: &Context, state: &ContainerState) -> Result<Sandbox, Error> {
    let dir = SandboxDir::new(&context.paths, &state.sandbox)?;
    Ok(Sandbox::attach(dir).await?)
}
