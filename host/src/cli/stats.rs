//! `cella stats`: what a container uses.

use serde_json::json;

use super::{Context, Error};
use crate::container::Record;
use crate::sandbox::Sandbox;
use crate::sandbox::dir::SandboxDir;

/// Show what a running container uses
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  cella stats web --json")]
pub struct Args {
    /// The container
    id: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Prints the statistics.
pub async fn main(context: &Context, args: Args) -> Result<u8, Error> {
    let record = Record::open(&context.paths, &args.id)?;
    let state = record.read()?;
    let sandbox = Sandbox::attach(SandboxDir::new(&context.paths, &state.sandbox)?).await?;
    let stats = sandbox.stats(state.guest_id()).await?;
    if args.json {
        let json = json!({
            "id": args.id,
            "cpu_usage_usec": stats.cpu_usage_usec,
            "cpu_user_usec": stats.cpu_user_usec,
            "cpu_system_usec": stats.cpu_system_usec,
            "memory_current": stats.memory_current,
            "memory_max": stats.memory_max,
            "memory_stat": stats.memory_stat,
            "memory_events": stats.memory_events,
            "pids_current": stats.pids_current,
            "pids_max": stats.pids_max,
        });
        println!("{json}");
    } else {
        println!("cpu       {:.3} s", stats.cpu_usage_usec as f64 / 1e6);
        println!(
            "memory    {:.1} MiB",
            stats.memory_current as f64 / f64::from(1 << 20)
        );
        println!("processes {}", stats.pids_current);
    }
    Ok(0)
}
