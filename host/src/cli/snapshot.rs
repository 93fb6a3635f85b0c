//! `cella snapshot`: a running sandbox saved with its containers, and others that go on from there.

use std::path::{Path, PathBuf};

use futures::future::join_all;

use super::session::follow;
use super::streams::Output;
use super::{Context, Error, background, pod};
use crate::config::Config;
use crate::container::{self, Record};
use crate::hypervisor;
use crate::sandbox::Sandbox;
use crate::sandbox::dir::SandboxDir;
use crate::sandbox::state::Status;
use crate::snapshot::{self, RestoredContainer, owner};

/// Running sandboxes saved with their containers, from which others go on
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  cella snapshot save web /var/lib/web.snapshot\n  cella snapshot restore /var/lib/web.snapshot --name web-2"
)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Save the sandbox of a container or pod, which goes on
    #[command(after_help = "Example:\n  cella snapshot save web /var/lib/web.snapshot")]
    Save {
        /// The container or pod
        id: String,
        /// The directory to be made: it holds all of the guest's memory
        dir: PathBuf,
    },
    /// Have another sandbox go on from a snapshot, in the background, and print its id
    #[command(after_help = "Example:\n  cella snapshot restore /var/lib/web.snapshot --name web-2")]
    Restore {
        /// The snapshot
        dir: PathBuf,
        /// The sandbox's id, and its container's [default: a random one]
        #[arg(long, value_name = "ID")]
        name: Option<String>,
        /// The network namespace whose interfaces become the sandbox's: of the same names as it had when it was saved
        #[arg(long, value_name = "PATH")]
        netns: Option<PathBuf>,
        /// What runs the virtual machine: auto, kvm or qemu [default: auto]
        #[arg(long, value_name = "NAME", value_parser = ["auto", "kvm", "qemu"])]
        hypervisor: Option<String>,
    },
}

/// The process that owns a restored sandbox
#[derive(Debug, clap::Args)]
pub struct OwnerArgs {
    id: String,
    dir: PathBuf,
    #[arg(long)]
    netns: Option<PathBuf>,
    #[arg(long)]
    hypervisor: Option<String>,
}

/// Runs the subcommand.
pub async fn main(context: &Context, args: Args) -> Result<u8, Error> {
    match args.what {
        What::Save { id, dir } => {
            // The owner is in another directory.
            let target = absolute(&dir)?;
            let sandbox = match Record::open(&context.paths, &id) {
                Ok(record) => record.read()?.sandbox,
                Err(_) => id,
            };
            let sandbox_dir = SandboxDir::new(&context.paths, &sandbox)?;
            sandbox_dir.wait_booted().await?;
            owner::ask(&sandbox_dir, &target).await?;
        }
        What::Restore {
            dir,
            name,
            netns,
            hypervisor,
        } => {
            let id = name.map_or_else(container::new_id, Ok)?;
            let mut arguments = vec!["restored-owner".into()];
            pod::add_paths(&mut arguments, &context.paths);
            if let Some(hypervisor) = hypervisor {
                arguments.extend(["--hypervisor".into(), hypervisor.into()]);
            }
            if let Some(netns) = netns {
                arguments.extend(["--netns".into(), absolute(&netns)?.into()]);
            }
            arguments.extend(["--".into(), (&id).into(), absolute(&dir)?.into()]);
            background::spawn(&arguments, &[])?;
            println!("{id}");
        }
    }
    Ok(0)
}

fn absolute(path: &Path) -> Result<PathBuf, Error> {
    std::path::absolute(path).map_err(|e| Error::host(format!("finding {}", path.display()), e))
}

/// Restores a sandbox and owns it: until it is told to end (SIGTERM), its machine has ended or, if it is no pod's, its containers
/// have.
pub async fn own(context: &Context, args: OwnerArgs) -> Result<u8, Error> {
    use tokio::signal::unix::{SignalKind, signal};
    let config = Config::load(&context.paths)?;
    let mut term =
        signal(SignalKind::terminate()).map_err(|e| Error::host("watching for signals", e))?;
    let name = args.hypervisor.as_deref().unwrap_or(&config.hypervisor);
    let choice =
        hypervisor::choose(name, &context.paths.qemu).map_err(crate::sandbox::Error::from)?;
    let saved = snapshot::open(&args.dir)?;
    let hypervisor = choice.hypervisor.as_ref();
    let netns = args.netns.as_deref();
    let (sandbox, containers) =
        snapshot::restore(&context.paths, hypervisor, &saved, &args.id, netns).await?;
    let pod = saved.about.pod;
    drop(saved);
    background::report_ready();
    let all = async {
        join_all(containers.into_iter().map(|one| run(&sandbox, one))).await;
        if pod {
            sandbox.ended().await;
        }
    };
    tokio::select! {
        _ = term.recv() => {}
        _ = all => {}
        served = owner::serve(&context.paths, &sandbox) => served.map(drop)?,
    }
    sandbox.stop().await?;
    Ok(0)
}

/// Takes a container's output, and writes its end down.
async fn run(sandbox: &Sandbox, container: RestoredContainer) {
    let RestoredContainer {
        record,
        mut state,
        streams,
    } = container;
    let ended = async {
        let output = Output::log(&record.log())?;
        follow(sandbox, state.guest_id(), streams, &output).await
    };
    let ended = ended.await;
    if let Err(error) = &ended {
        tracing::warn!("container {}: {error}", record.id());
    }
    state.status = Status::exited(ended.as_ref().ok());
    if let Err(error) = record.write(&state) {
        tracing::warn!("{error}");
    }
}
