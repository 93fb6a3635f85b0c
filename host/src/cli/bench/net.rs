//! TCP from a container through the tap: to a listener in a network namespace that is the measurement's own.

use std::net::TcpStream;
use std::time::Duration;

use serde_json::Value;

use super::container::container;
use super::netns::{PORT, Pair, THERE};
use super::wire::{self, Way, Wire};
use super::{Context, Error, Options, sandbox};
use crate::cli::pod::MachineArgs;
use crate::sandbox::Sandbox;
use crate::timeline::Timeline;

/// How long a container may take to connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(60);

/// Measures with `mib` MiB each way.
pub async fn net(context: &Context, options: &Options, mib: u32) -> Result<Value, Error> {
    if options.machine.netns.is_some() {
        return Err(Error::usage(
            "bench net makes the network namespace itself: leave --netns out",
        ));
    }
    let pair = Pair::make()?;
    let options = Options {
        machine: MachineArgs {
            netns: Some(pair.netns()),
            ..options.machine.clone()
        },
        ..options.clone()
    };
    let listener = pair
        .listener()
        .and_then(tokio::net::TcpListener::from_std)
        .map_err(|e| Error::host("listening for the container", e))?;
    let sandbox = sandbox(context, &options, &Timeline::new()).await?;
    let open = async |way| connect(&sandbox, &options, way, &listener).await;
    let figures = wire::measure(mib, open).await?;
    sandbox.stop().await?;
    Ok(figures)
}

async fn connect(
    sandbox: &Sandbox,
    options: &Options,
    way: Way,
    listener: &tokio::net::TcpListener,
) -> Result<Wire, Error> {
    let (there, port, command) = (THERE.to_string(), PORT.to_string(), way.command());
    let mut words = vec!["/bin/busybox", "nc", &there, &port, "-e"];
    words.extend(command.iter().map(String::as_str));
    let _streams = container(sandbox, way.name(), options, &words).await?;
    sandbox.start(way.name(), "").await?;
    let failed = |e| Error::host("waiting for the container to connect", e);
    let (stream, _) = tokio::time::timeout(CONNECT_TIMEOUT, listener.accept())
        .await
        .map_err(|_| failed(std::io::ErrorKind::TimedOut.into()))?
        .map_err(failed)?;
    let halves = || {
        let stream = stream.into_std()?;
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        Ok((stream.try_clone()?, stream))
    };
    let (from, to): (TcpStream, TcpStream) = halves().map_err(failed)?;
    Ok(Wire {
        to: Box::new(to),
        from: Box::new(from),
    })
}
