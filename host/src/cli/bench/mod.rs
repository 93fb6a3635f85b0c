//! `cella bench`: figures of this host, each by the command that a reader can repeat.

mod boot;
mod process;
mod template;

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::pod::{self, MachineArgs};
use super::{Context, Error};
use crate::config::Config;
use crate::container;
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
    Stdio {
        #[command(flatten)]
        options: Options,
        /// How many MiB
        #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=4096))]
        mib: u32,
    },
}

#[derive(Debug, clap::Args)]
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
    let (options, figures) = match args.what {
        What::Boot(options) => {
            let figures = boot::boot(context, &options).await?;
            (options, figures)
        }
        What::Memory(options) => {
            let figures = boot::memory(context, &options).await?;
            (options, figures)
        }
        What::Start(options) => {
            let mut figures = process::start(context, &options).await?;
            if let (Value::Object(all), Some(Value::Object(clones))) =
                (&mut figures, template::clones(context, &options).await?)
            {
                all.extend(clones);
            }
            (options, figures)
        }
        What::Exec(options) => {
            let figures = process::exec(context, &options).await?;
            (options, figures)
        }
        What::Stdio { options, mib } => {
            let figures = process::stdio(context, &options, mib).await?;
            (options, figures)
        }
    };
    match (options.json, figures) {
        (false, Value::Object(figures)) => {
            for (name, figure) in figures {
                println!("{name:<24} {figure}");
            }
        }
        (_, figures) => println!("{figures}"),
    }
    Ok(0)
}

/// A sandbox of its own for one measurement.
async fn sandbox(
    context: &Context,
    options: &Options,
    timeline: &Timeline,
) -> Result<Sandbox, Error> {
    let config = Config {
        template: false,
        ..Config::load(&context.paths)?
    };
    let id = format!("bench-{}", container::new_id()?);
    pod::boot(context, &config, &id, false, &options.machine, timeline).await
}

/// A root file system with busybox alone, in the sandbox's shared directory under `id`.
fn busybox_rootfs(sandbox: &Sandbox, id: &str, busybox: &Path) -> Result<(), Error> {
    let rootfs = sandbox.dir().container_share(id).join("rootfs");
    let copy = || {
        for dir in ["bin", "proc", "dev", "sys", "tmp"] {
            fs::create_dir_all(rootfs.join(dir))?;
        }
        fs::copy(busybox, rootfs.join("bin/busybox")).map(drop)
    };
    copy().map_err(|e| {
        Error::host(
            format!(
                "making a container of {} (Debian: busybox-static)",
                busybox.display()
            ),
            e,
        )
    })
}
