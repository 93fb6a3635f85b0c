//! `cella template`: booted guests saved once, from which sandboxes are cloned.

use std::time::Instant;

use super::pod::{self, MachineArgs};
use super::{Context, Error};
use crate::config::Config;
use crate::error::ErrorKind;
use crate::hypervisor;
use crate::template::{self, Built, Key, Shape, Store};

/// Booted guests saved once, from which sandboxes are cloned
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  cella template build --memory 512M\n  cella template list")]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Build the template for sandboxes of this shape, unless there is one
    #[command(after_help = "Example:\n  cella template build --memory 512M --cpus 2 --network")]
    Build {
        #[command(flatten)]
        machine: MachineArgs,
        /// For sandboxes with a network: all pods of Kubernetes
        #[arg(long)]
        network: bool,
    },
    /// The templates of this host
    #[command(after_help = "Example:\n  cella template list --json")]
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove templates; sandboxes cloned from them go on
    #[command(after_help = "Example:\n  cella template rm --all")]
    Rm {
        /// The templates
        #[arg(value_name = "TEMPLATE", required_unless_present = "all")]
        keys: Vec<String>,
        /// All of them
        #[arg(long, conflicts_with = "keys")]
        all: bool,
    },
}

/// Runs the subcommand.
pub async fn main(context: &Context, args: Args) -> Result<u8, Error> {
    let store = Store::new(&context.paths);
    match args.what {
        What::Build { machine, network } => {
            build(context, &machine, network || machine.netns.is_some()).await?
        }
        What::List { json } => list(&store, json)?,
        What::Rm { keys, all } => {
            let keys = match all {
                true => store.list()?.into_iter().map(|one| one.key).collect(),
                false => keys,
            };
            for text in keys {
                let key = Key::parse(&text).ok_or(template::Error::NotFound(text))?;
                store.remove(&key)?;
            }
        }
    }
    Ok(0)
}

async fn build(context: &Context, machine: &MachineArgs, network: bool) -> Result<(), Error> {
    let config = Config::load(&context.paths)?;
    let name = machine.hypervisor.as_deref().unwrap_or(&config.hypervisor);
    let choice =
        hypervisor::choose(name, &context.paths.qemu).map_err(crate::sandbox::Error::from)?;
    if !choice.hypervisor.saves() {
        return Err(Error::Usage {
            kind: ErrorKind::Unimplemented,
            message: format!(
                "hypervisor {} has no templates: its machines cannot be saved",
                choice.hypervisor.name()
            ),
        });
    }
    let (vcpus, memory_bytes) = pod::size_up(&config, machine)?;
    let shape = Shape::serving(vcpus, memory_bytes, network, &config.kernel_params);
    let begin = Instant::now();
    let limit = config.template_limit;
    let (key, built) =
        template::build(&context.paths, choice.hypervisor.as_ref(), &shape, limit).await?;
    let what = match built {
        Built::New => format!("built in {:.1} s", begin.elapsed().as_secs_f64()),
        Built::Known => "there already".to_owned(),
        Built::Busy => "being built by another process".to_owned(),
    };
    println!("{} {what}", key.as_str());
    Ok(())
}

fn list(store: &Store, json: bool) -> Result<(), Error> {
    let listed = store.list()?;
    if json {
        let text = serde_json::to_string(&listed)
            .map_err(|e| Error::host("writing the list of templates", e))?;
        println!("{text}");
        return Ok(());
    }
    println!(
        "{:<32} {:>6} {:>9} {:>7} {:>9}",
        "TEMPLATE", "CPUS", "MEMORY", "NETWORK", "ON DISK"
    );
    for one in listed {
        let unknown = || "?".to_owned();
        let (count, memory, network) = match one.shape {
            None => (unknown(), unknown(), unknown()),
            Some(shape) => {
                let network = if shape.nics > 0 { "yes" } else { "no" };
                (cpus(&shape), mib(shape.memory_bytes), network.to_owned())
            }
        };
        println!(
            "{:<32} {count:>6} {memory:>9} {network:>7} {:>9}",
            one.key,
            mib(one.bytes)
        );
    }
    Ok(())
}

/// The numbers of CPUs that its clones may have.
fn cpus(shape: &Shape) -> String {
    match (shape.vcpus, shape.possible_vcpus) {
        (least, most) if least < most => format!("{least}-{most}"),
        (all, _) => all.to_string(),
    }
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}
