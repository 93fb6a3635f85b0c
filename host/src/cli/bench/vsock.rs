//! A container's standard streams, each a vsock connection of its own: their delay, and their speed each way.

use serde_json::Value;

use super::container::container;
use super::wire::{self, Way, Wire};
use super::{Context, Error, Options, sandbox};
use crate::sandbox::Sandbox;
use crate::timeline::Timeline;

/// Measures with `mib` MiB each way.
pub async fn vsock(context: &Context, options: &Options, mib: u32) -> Result<Value, Error> {
    let sandbox = sandbox(context, options, &Timeline::new()).await?;
    let open = async |way| streams(&sandbox, options, way).await;
    let figures = wire::measure(mib, open).await?;
    sandbox.stop().await?;
    Ok(figures)
}

async fn streams(sandbox: &Sandbox, options: &Options, way: Way) -> Result<Wire, Error> {
    let command = way.command();
    let command: Vec<_> = command.iter().map(String::as_str).collect();
    let streams = container(sandbox, way.name(), options, &command).await?;
    sandbox.start(way.name(), "").await?;
    match (streams.stdin, streams.stdout) {
        (Some(to), Some(from)) => Ok(Wire {
            to: Box::new(to),
            from: Box::new(from),
        }),
        _ => Err(Error::usage("the container has no streams")),
    }
}
