//! What containers, processes and their streams cost in a running sandbox.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::time::Instant;

use serde_json::{Value, json};

use super::container::{container, process};
use super::{Context, Error, Options, sandbox};
use crate::sandbox::stdio::{self, Streams, Wanted};
use crate::timeline::Timeline;

/// How often a repeated measurement is made; the median counts.
const ROUNDS: usize = 5;

/// Create and start of a container that ends at once, and a cold boot beside it.
pub async fn start(context: &Context, options: &Options) -> Result<Value, Error> {
    let cold = Instant::now();
    let sandbox = sandbox(context, options, &Timeline::new()).await?;
    let cold_ms = cold.elapsed().as_secs_f64() * 1e3;
    let mut rounds = Vec::new();
    for round in 0..ROUNDS {
        let id = format!("c{round}");
        let begin = Instant::now();
        let _streams = container(&sandbox, &id, options, &["/bin/busybox", "true"]).await?;
        sandbox.start(&id, "").await?;
        rounds.push(begin.elapsed().as_secs_f64() * 1e3);
        sandbox.wait(&id, "").await?;
        sandbox.delete(&id, "").await?;
    }
    sandbox.stop().await?;
    Ok(json!({ "cold_ms": cold_ms, "create_start_ms": median(rounds) }))
}

/// A process in a running container, from the call to its exit.
pub async fn exec(context: &Context, options: &Options) -> Result<Value, Error> {
    let sandbox = sandbox(context, options, &Timeline::new()).await?;
    let streams = container(
        &sandbox,
        "c",
        options,
        &["/bin/busybox", "sleep", "1000000"],
    )
    .await?;
    sandbox.start("c", "").await?;
    let process = process(&["/bin/busybox", "true"]);
    let mut rounds = Vec::new();
    for round in 0..ROUNDS {
        let exec = format!("e{round}");
        let begin = Instant::now();
        let (stdio, pending) = stdio::listen(&sandbox.dir().sockets(), Wanted::default())?;
        tokio::try_join!(sandbox.exec("c", &exec, &process, stdio), pending.accept())?;
        sandbox.start("c", &exec).await?;
        sandbox.wait("c", &exec).await?;
        rounds.push(begin.elapsed().as_secs_f64() * 1e3);
        sandbox.delete("c", &exec).await?;
    }
    drop(streams);
    sandbox.stop().await?;
    Ok(json!({ "exec_ms": median(rounds) }))
}

/// `mib` MiB through `cat`, compared at the end.
pub async fn stdio(context: &Context, options: &Options, mib: u32) -> Result<Value, Error> {
    let sandbox = sandbox(context, options, &Timeline::new()).await?;
    let streams = container(&sandbox, "c", options, &["/bin/busybox", "cat"]).await?;
    sandbox.start("c", "").await?;
    let sent: Vec<u8> = pattern(usize::try_from(mib).unwrap_or(0) << 20);
    let begin = Instant::now();
    let received = echo(streams, sent.clone()).await?;
    let seconds = begin.elapsed().as_secs_f64();
    let exit = sandbox.wait("c", "").await?;
    sandbox.stop().await?;
    Ok(json!({
        "mib": mib,
        "intact": received == sent,
        "exit_status": exit.exit_status,
        "seconds": seconds,
        "mib_per_s": f64::from(mib) / seconds,
    }))
}

/// Writes `sent` to a process that echoes it, and reads what comes back to its end.
async fn echo(streams: Streams, sent: Vec<u8>) -> Result<Vec<u8>, Error> {
    let (Some(mut stdin), Some(mut stdout)) = (streams.stdin, streams.stdout) else {
        return Err(Error::usage("the container has no streams"));
    };
    let writer = std::thread::spawn(move || {
        stdin
            .write_all(&sent)
            .and_then(|()| stdin.shutdown(Shutdown::Write))
    });
    let read = tokio::task::spawn_blocking(move || {
        let mut received = Vec::new();
        stdout.read_to_end(&mut received).map(|_| received)
    });
    let failed = |e: std::io::Error| Error::host("streaming through a container", e);
    let received = read
        .await
        .map_err(|e| failed(std::io::Error::other(e)))?
        .map_err(failed)?;
    match writer.join() {
        Ok(written) => written.map_err(failed)?,
        Err(_) => return Err(Error::usage("the writing thread panicked")),
    }
    Ok(received)
}

/// Bytes that repeat only after a long while, so that a lost or doubled piece shows.
pub(super) fn pattern(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_u32;
    let step = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..len).map(step).collect()
}

pub(super) fn median(mut rounds: Vec<f64>) -> f64 {
    rounds.sort_by(f64::total_cmp);
    rounds.get(rounds.len() / 2).copied().unwrap_or(f64::NAN)
}
