//! Files of the shared directory, as a container's programs have them: read, written, looked up.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
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

/// Measures with a file of `mib` MiB. What is read and looked up was never seen by the guest before; what is written is
/// on the host before the clock stops.
pub async fn fs(context: &Context, options: &Options, mib: u32) -> Result<Value, Error> {
    let sandbox = sandbox(context, options, &Timeline::new()).await?;
    let data = rootfs(&sandbox, "c").join("data");
    fill(&data, mib).map_err(|e| Error::host(format!("filling {}", data.display()), e))?;
    let script = format!(
        "cd /data; echo
        i=0; while [ $i -lt {FILES} ]; do [ -s $i ] || exit 1; i=$((i+1)); done; echo
        /bin/busybox dd if=large of=/dev/null bs=1M || exit
        /bin/busybox dd if=/dev/zero of=written bs=1M count={mib} conv=fsync"
    );
    let streams = container(
        &sandbox,
        "c",
        options,
        &["/bin/busybox", "sh", "-c", &script],
    )
    .await?;
    sandbox.start("c", "").await?;
    let said = tokio::task::spawn_blocking(move || listen(streams))
        .await
        .unwrap_or_else(|e| Err(io::Error::other(e)))
        .map_err(|e| Error::host("measuring files", e))?;
    let written = data.join("written");
    let len = fs::metadata(&written)
        .map_err(|e| Error::host(format!("looking at {}", written.display()), e))?
        .len();
    sandbox.stop().await?;
    let [read, write] = said.seconds.as_slice() else {
        return Err(Error::usage(format!(
            "the container did not measure: {}",
            said.words
        )));
    };
    Ok(json!({
        "mib": mib,
        "intact": len == u64::from(mib) << 20,
        "read_mib_per_s": f64::from(mib) / read,
        "write_mib_per_s": f64::from(mib) / write,
        "lookup_us": said.lookups_us / FILES as f64,
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

struct Said {
    /// From the line before the lookups to the line after.
    lookups_us: f64,
    /// By dd's own clock, which has its own start not in it.
    seconds: Vec<f64>,
    words: String,
}

fn listen(streams: Streams) -> io::Result<Said> {
    let missing = || io::Error::other("the container has no streams");
    let mut lines = BufReader::new(streams.stdout.ok_or_else(missing)?);
    lines.read_line(&mut String::new())?;
    let begin = Instant::now();
    lines.read_line(&mut String::new())?;
    let lookups_us = begin.elapsed().as_secs_f64() * 1e6;
    let words = io::read_to_string(streams.stderr.ok_or_else(missing)?)?;
    Ok(Said {
        lookups_us,
        seconds: words.lines().filter_map(seconds).collect(),
        words: words.replace('\n', "; "),
    })
}

/// The time in `104857600 bytes (100.0MB) copied, 0.012345 seconds, 7.9GB/s`.
fn seconds(line: &str) -> Option<f64> {
    let (_, rest) = line.split_once("copied, ")?;
    let (number, _) = rest.split_once(" seconds")?;
    number.parse().ok().filter(|seconds| *seconds > 0.0)
}

#[cfg(test)]
mod tests {
    use super::seconds;

    #[test]
    fn the_time_of_dd_is_found() {
        let line = "104857600 bytes (100.0MB) copied, 0.012345 seconds, 7.9GB/s";
        assert_eq!(seconds(line), Some(0.012345));
        for line in [
            "",
            "100+0 records in",
            "1 bytes copied, x seconds",
            "copied, 0.0 seconds",
        ] {
            assert_eq!(seconds(line), None, "{line}");
        }
    }
}
