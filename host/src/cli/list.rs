//! `cella ps`: the containers and the pods that exist.

use std::io::Write;

use serde::Serialize;

use super::{Context, Error};
use crate::container;
use crate::paths::Paths;
use crate::sandbox::dir;
use crate::sandbox::state::{ContainerState, SandboxState, Status};

/// List containers and pods
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  cella ps\n  cella ps --json")]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Listing {
    pods: Vec<SandboxState>,
    containers: Vec<ContainerState>,
}

/// Prints the list.
pub fn main(context: &Context, args: &Args) -> Result<u8, Error> {
    let listing = gather(&context.paths)?;
    let mut out = std::io::stdout().lock();
    let text = match args.json {
        true => format!("{}\n", serde_json::json!(listing)),
        false => table(&listing),
    };
    match out.write_all(text.as_bytes()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::host("printing the list", e))
        }
        _ => Ok(0),
    }
}

fn gather(paths: &Paths) -> Result<Listing, Error> {
    let mut pods = Vec::new();
    for dir in dir::list(paths)? {
        if let (true, Ok(state)) = (dir.is_owned(), dir.read_state())
            && state.pod
        {
            pods.push(state);
        }
    }
    let records = container::list(paths)?;
    let containers = records.iter().filter_map(|record| record.read().ok());
    Ok(Listing {
        pods,
        containers: containers.collect(),
    })
}

fn table(listing: &Listing) -> String {
    let mut rows = vec![["ID", "POD", "STATUS", "IMAGE", "COMMAND"].map(str::to_owned)];
    for pod in &listing.pods {
        let machine = format!("{} CPU, {} MiB", pod.vcpus, pod.memory_bytes >> 20);
        rows.push([
            pod.id.clone(),
            pod.id.clone(),
            "pod".into(),
            format!("({}, {machine})", pod.hypervisor),
            String::new(),
        ]);
    }
    for container in &listing.containers {
        let status = match &container.status {
            Status::Created => "created".to_owned(),
            Status::Running => "running".to_owned(),
            Status::Exited {
                oom_killed: true,
                code,
            } => format!("exited ({code}, out of memory)"),
            Status::Exited { code, .. } => format!("exited ({code})"),
        };
        rows.push([
            container.id.clone(),
            container.sandbox.clone(),
            status,
            container.image.clone(),
            container.command.join(" "),
        ]);
    }
    let mut widths = [0; 5];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let lines = rows.iter().map(|row| {
        let cells = row.iter().zip(widths);
        let line: String = cells
            .map(|(cell, width)| format!("{cell:width$}  "))
            .collect();
        format!("{}\n", line.trim_end())
    });
    lines.collect()
}
