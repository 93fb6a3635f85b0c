//! `cella bench`: figures of this host, each by the command that a reader can repeat.

mod block;
mod boot;
mod container;
mod fs;
mod net;
mod netns;
mod process;
mod steps;
mod template;
mod vsock;
mod wire;

use std::path::PathBuf;

use serde_json::Value;

use super::pod::{self, MachineArgs};
use super::{Context, Error};
use crate::config::Config;
use crate::container as record;
use crate::hypervisor::Disk;
use crate::sandbox::Sandbox;
use crate::timeline::Timeline;

/// Measure this host
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  cella bench boot --json\n  cella bench stdio --mib 64")]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// A cold boot: VM exits by reason, and phases
    #[command(after_help = "Example:\n  cella bench boot --json")]
    Boot(Options),
    /// Resident memory of the VMM, without the guest's, and of the agent
    #[command(after_help = "Example:\n  cella bench memory --json")]
    Memory(Options),
    /// A sandbox cold and from a template, and a container in it
    #[command(after_help = "Example:\n  cella bench start --json")]
    Start(Options),
    /// A process in a running container
    #[command(after_help = "Example:\n  cella bench exec --json")]
    Exec(Options),
    /// Bytes through a container's standard input to its standard output
    #[command(after_help = "Example:\n  cella bench stdio --mib 64 --json")]
    Stdio(Amount),
    /// Files of the shared directory, over virtiofs: reading, writing, looking up
    #[command(after_help = "Example:\n  cella bench fs --mib 64 --json")]
    Fs(Amount),
    /// A disk of the guest's, in a file of the host's: reading, writing, the delay of a small read
    #[command(after_help = "Example:\n  cella bench block --mib 64 --json")]
    Block(Amount),
    /// TCP through the guest's network interface, to a network namespace made for it by ip (iproute2)
    #[command(after_help = "Example:\n  cella bench net --mib 64 --json")]
    Net(Amount),
    /// Connections out of the guest, as standard streams are: a message's delay, and bytes each way
    #[command(after_help = "Example:\n  cella bench vsock --mib 64 --json")]
    Vsock(Amount),
}

#[derive(Debug, clap::Args)]
struct Amount {
    #[command(flatten)]
    options: Options,
    /// How many MiB each way
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=4096))]
    mib: u32,
}

#[derive(Clone, Debug, clap::Args)]
struct Options {
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    machine: MachineArgs,
    /// A static busybox of this host, of which the containers of these measurements are made
    #[arg(long, value_name = "FILE", default_value = "/bin/busybox")]
    busybox: PathBuf,
}

/// Measures and prints.
pub async fn main(context: &Context, args: Args) -> Result<u8, Error> {
    let (json, figures) = match &args.what {
        What::Boot(options) => (options.json, boot::boot(context, options).await?),
        What::Memory(options) => (options.json, boot::memory(context, options).await?),
        What::Start(options) => (options.json, start(context, options).await?),
        What::Exec(options) => (options.json, process::exec(context, options).await?),
        What::Stdio(Amount { options, mib }) => {
            (options.json, process::stdio(context, options, *mib).await?)
        }
        What::Fs(Amount { options, mib }) => (options.json, fs::fs(context, options, *mib).await?),
        What::Block(Amount { options, mib }) => {
            (options.json, block::block(context, options, *mib).await?)
        }
        What::Net(Amount { options, mib }) => {
            (options.json, net::net(context, options, *mib).await?)
        }
        What::Vsock(Amount { options, mib }) => {
            (options.json, vsock::vsock(context, options, *mib).await?)
        }
    };
    match (json, figures) {
        (false, Value::Object(figures)) => {
            for (name, figure) in figures {
                println!("{name:<24} {figure}");
            }
        }
        (_, figures) => println!("{figures}"),
    }
    Ok(0)
}

/// A cold start, and clones where machines can be saved.
async fn start(context: &Context, options: &Options) -> Result<Value, Error> {
    let mut figures = process::start(context, options).await?;
    if let (Value::Object(all), Some(Value::Object(clones))) =
        (&mut figures, template::clones(context, options).await?)
    {
        all.extend(clones);
    }
    Ok(figures)
}

/// A sandbox of its own for one measurement.
async fn sandbox(
    context: &Context,
    options: &Options,
    timeline: &Timeline,
) -> Result<Sandbox, Error> {
    sandbox_with(context, options, Vec::new(), timeline).await
}

/// One with disks.
async fn sandbox_with(
    context: &Context,
    options: &Options,
    disks: Vec<Disk>,
    timeline: &Timeline,
) -> Result<Sandbox, Error> {
    let config = Config {
        template: false,
        ..Config::load(&context.paths)?
    };
    let id = format!("bench-{}", record::new_id()?);
    let machine = &options.machine;
    pod::boot_with_disks(context, &config, &id, false, machine, timeline, disks).await
}
