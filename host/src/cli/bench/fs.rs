//! Files of the shared directory, as a container's programs have them: read, written, looked up.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use serde_json::{Value, json};

use super::container::{container, rootfs};
use super::process::pattern;
use super::{Context, Error, Options, sandbox, steps};
use crate::timeline::Timeline;

/// How many files are looked up.
const FILES: usize = 1000;

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
    let [lookups, start, read, write] = steps::listen(streams, "measuring files").await?;
    let written = data.join("written");
    let len = fs::metadata(&written)
        .map_err(|e| Error::host(format!("looking at {}", written.display()), e))?
        .len();
    sandbox.stop().await?;
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
