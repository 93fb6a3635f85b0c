//! A disk of the guest's, as a container that may use it has it.

use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};

use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities, LinuxDeviceCgroup, Spec};
use rustix::fs::{Mode, OFlags};
use serde_json::{Value, json};

use super::container::container_with;
use super::process::pattern;
use super::{Context, Error, Options, sandbox_with, steps};
use crate::hypervisor::Disk;
use crate::timeline::Timeline;

/// Small reads, one after the other.
const READS: u32 = 256;

/// Measures with a disk of `mib` MiB, in a file without a name in the directory of unpacked images. The guest never saw what is
/// read; what is written is on the host's disk before the clock stops.
pub async fn block(context: &Context, options: &Options, mib: u32) -> Result<Value, Error> {
    let dir = &context.paths.lib_dir;
    let action = || format!("making a disk in {}", dir.display());
    let made = fs::create_dir_all(dir).and_then(|()| {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let mut image = File::from(rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR)?);
        let piece = pattern(1 << 20);
        (0..mib).try_for_each(|_| image.write_all(&piece))?;
        Ok(image)
    });
    let image = made.map_err(|e| Error::host(action(), e))?;
    let disk = Disk {
        image: image.try_clone().map_err(|e| Error::host(action(), e))?,
        read_only: false,
    };
    let sandbox = sandbox_with(context, options, vec![disk], &Timeline::new()).await?;
    // The second step is what the others have in common: a program's start.
    let script = format!(
        "cd /bin && ./busybox mknod /dev/disk b $(./busybox sed 's/:/ /' /sys/block/vda/dev) && echo || exit
        ./busybox dd if=/dev/disk of=/dev/null bs=1M || exit; echo
        ./busybox dd if=/dev/null of=/dev/null || exit; echo
        ./busybox dd if=/dev/disk of=/dev/null bs=4k count={READS} iflag=direct || exit; echo
        ./busybox dd if=/dev/zero of=/dev/disk bs=1M count={mib} conv=fsync || exit; echo"
    );
    let command = ["/bin/busybox", "sh", "-c", &script];
    let streams = container_with(&sandbox, "c", options, &command, allow_disks).await?;
    sandbox.start("c", "").await?;
    let [read, start, small, write] = steps::listen(streams, "measuring a disk").await?;
    sandbox.stop().await?;
    let zeros = is_zero(image).map_err(|e| Error::host("reading the disk", e))?;
    let rate = |seconds: f64| f64::from(mib) / (seconds - start).max(1e-6);
    Ok(json!({
        "mib": mib,
        "intact": zeros,
        "read_mib_per_s": rate(read),
        "write_mib_per_s": rate(write),
        "read_4k_us": (small - start).max(0.0) * 1e6 / f64::from(READS),
    }))
}

/// Lets the container's programs make files of devices, and use them.
fn allow_disks(spec: &mut Spec) {
    let capabilities: Capabilities = [Capability::Mknod].into_iter().collect();
    let mut all = LinuxCapabilities::default();
    all.set_bounding(Some(capabilities.clone()))
        .set_effective(Some(capabilities.clone()))
        .set_permitted(Some(capabilities))
        .set_inheritable(None)
        .set_ambient(None);
    if let Some(process) = spec.process_mut() {
        process.set_capabilities(Some(all));
    }
    let mut rule = LinuxDeviceCgroup::default();
    rule.set_allow(true).set_access(Some("rwm".to_owned()));
    if let Some(linux) = spec.linux_mut() {
        let mut resources = linux.resources().clone().unwrap_or_default();
        resources.set_devices(Some(vec![rule]));
        linux.set_resources(Some(resources));
    }
}

/// What the guest wrote is what is there.
fn is_zero(mut image: File) -> io::Result<bool> {
    image.rewind()?;
    let mut piece = vec![0; 1 << 20];
    loop {
        let len = image.read(&mut piece)?;
        let Some(read) = piece.get(..len).filter(|read| !read.is_empty()) else {
            return Ok(true);
        };
        if read.iter().any(|&byte| byte != 0) {
            return Ok(false);
        }
    }
}
