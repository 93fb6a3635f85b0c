//! Files of the shared directory, as a container's programs have them: read, written, looked up.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::Path;
use std::time::Instant;

use serde_json::{Value, json};

use super::container::{container, rootfs};
use super::process::pattern;
use super::{Context, Error, Options, sandbox};
use crate::sandbox::stdio::Streams;
use crate::timeline::Timeline;

/// How many files are looked up.
const FILES: usize = 1000;

/// The steps of the container's script; it prints a line before the first and after each.
const STEPS: usize = 4;

/// Measures with a file of `mib` MiB. What is read and looked up was never seen by the guest before; what is written is
/// on the host before the clock stops.
pub async fn fs(context: &Context, options: &Options, mib: u32) -> Result<Value, Error> {
    let sandbox = sandbox(context, options, &Timeline::new()).await?;
    let data = rootfs(&sandbox, "c").join("data");
    fill(&data, mib).map_err(|e| Error::host(format!("filling {}", data.display()), e))?;
    // The third step is what the two after it have in common: a program's start.
    let script = format!(
        "cd /data && echo || exit
        i=0; while [ $i -lt {FILES} ]; do [ -s $i ] || exit; i=$((i+1)); done; echo
        /bin/busybox dd if=0 of=/dev/null || exit; echo
        /bin/busybox dd if=large of=/dev/null bs=1M || exit; echo
        /bin/busybox dd if=/dev/zero of=written bs=1M count={mib} conv=fsync || exit; echo"
    );
    let streams = container(
        &sandbox,
        "c",
        options,
        &["/bin/busybox", "sh", "-c", &script],
    )
    .await?;
    sandbox.start("c", "").await?;
    let steps = tokio::task::spawn_blocking(move || listen(streams))
        .await
        .unwrap_or_else(|e| Err(io::Error::other(e)))
        .map_err(|e| Error::host("measuring files", e))?;
    let written = data.join("written");
    let len = fs::metadata(&written)
        .map_err(|e| Error::host(format!("looking at {}", written.display()), e))?
        .len();
    sandbox.stop().await?;
    let [lookups, start, read, write] = steps;
    let rate = |seconds: f64| f64::from(mib) / (seconds - start).max(1e-6);
    Ok(json!({
        "mib": mib,
        "intact": len == u64::from(mib) << 20,
        "read_mib_per_s": rate(read),
        "write_mib_per_s": rate(write),
        "lookup_us": lookups * 1e6 / FILES as f64,
    }))
}

/// What is there when the container starts: a large file, and many small ones.
fn fill(data: &Path, mib: u32) -> io::Result<()> {
    fs::create_dir_all(data)?;
    let mut large = File::create(data.join("large"))?;
    let piece = pattern(1 << 20);
    (0..mib).try_for_each(|_| large.write_all(&piece))?;
    (0..FILES).try_for_each(|number| fs::write(data.join(number.to_string()), "x"))
}

/// How long each step took, in seconds.
fn listen(streams: Streams) -> io::Result<[f64; STEPS]> {
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
