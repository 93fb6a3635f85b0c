//! The steps of a container's script: it prints a line before the first and after each.

use std::io::{self, BufRead, BufReader, Read};
use std::time::Instant;

use super::Error;
use crate::sandbox::stdio::Streams;

/// How long each step took, in seconds, when the container has come to its end; `action` says what is measured.
pub(super) async fn listen<const STEPS: usize>(
    streams: Streams,
    action: &str,
) -> Result<[f64; STEPS], Error> {
    tokio::task::spawn_blocking(move || take(streams))
        .await
        .unwrap_or_else(|e| Err(io::Error::other(e)))
        .map_err(|e| Error::host(action, e))
}

fn take<const STEPS: usize>(streams: Streams) -> io::Result<[f64; STEPS]> {
    let missing = || io::Error::other("the container has no streams");
    let (mut out, mut err) = (
        BufReader::new(streams.stdout.ok_or_else(missing)?),
        streams.stderr.ok_or_else(missing)?,
    );
    let mut line = || {
        let mut line = String::new();
        Ok::<_, io::Error>(out.read_line(&mut line)? > 0)
    };
    let mut steps = [0.0; STEPS];
    let mut going = line()?;
    for step in &mut steps {
        let begin = Instant::now();
        going = going && line()?;
        *step = begin.elapsed().as_secs_f64();
    }
    match going {
        true => Ok(steps),
        false => {
            let mut words = String::new();
            err.read_to_string(&mut words)?;
            let words = format!("the container did not come to its end: {}", words.trim());
            Err(io::Error::other(words.replace('\n', "; ")))
        }
    }
}
