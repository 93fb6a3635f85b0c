//! The spec's resources as cgroup v2 control files.

use oci_spec::runtime as oci;

use super::Cgroup;
use crate::container::{Error, Result};

/// The longest list of `unified` entries, device limits and the like that is looked at.
const MAX_ENTRIES: usize = 256;

/// One control file and what to write to it.
type Setting = (String, String);

impl Cgroup {
    /// Sets what the spec sets; the rest stays as it is. Device rules are not here: they are a BPF program.
    pub(in crate::container) fn set_resources(
        &self,
        resources: &oci::LinuxResources,
    ) -> Result<()> {
        let memory = resources.memory().as_ref();
        if let Some(limit) = memory.and_then(oci::LinuxMemory::limit)
            && memory.and_then(oci::LinuxMemory::check_before_update) == Some(true)
            && limit >= 0
        {
            let current = self.read("memory.current")?.unwrap_or_default();
            let current: i64 = current.trim().parse().unwrap_or(0);
            if limit < current {
                return Err(Error::invalid(
                    "resources.memory.limit",
                    format!("{limit} is below the {current} bytes in use"),
                ));
            }
        }
        for (file, value) in settings(resources)? {
            self.write(&file, &value)?;
        }
        Ok(())
    }
}

/// All settings, in an order that the kernel takes.
fn settings(resources: &oci::LinuxResources) -> Result<Vec<Setting>> {
    let mut settings = Vec::new();
    if let Some(cpu) = resources.cpu() {
        cpu_settings(cpu, &mut settings)?;
    }
    if let Some(memory) = resources.memory() {
        memory_settings(memory, &mut settings)?;
    }
    if let Some(pids) = resources.pids() {
        // 0 and below have always meant "no limit".
        let limit = if pids.limit() > 0 {
            pids.limit().to_string()
        } else {
            "max".into()
        };
        settings.push(("pids.max".into(), limit));
    }
    if let Some(io) = resources.block_io() {
        io_settings(io, &mut settings)?;
    }
    for limit in resources
        .hugepage_limits()
        .iter()
        .flatten()
        .take(MAX_ENTRIES)
    {
        let size = limit.page_size();
        if size.is_empty() || !size.chars().all(|c| c.is_ascii_alphanumeric()) {
            return Err(Error::invalid(
                "resources.hugepageLimits",
                format!("size {size:?}"),
            ));
        }
        settings.push((format!("hugetlb.{size}.max"), limited(limit.limit())));
    }
    if resources
        .rdma()
        .as_ref()
        .is_some_and(|rdma| !rdma.is_empty())
    {
        return Err(Error::unsupported(
            "resources.rdma",
            "a sandbox has no RDMA devices",
        ));
    }
    // Last, since it is the most exact.
    for (file, value) in resources.unified().iter().flatten().take(MAX_ENTRIES) {
        if file.contains('/') || !file.contains('.') || file.starts_with("cgroup.") {
            return Err(Error::invalid(
                "resources.unified",
                format!("{file:?} is no controller's file"),
            ));
        }
        settings.push((file.clone(), value.clone()));
    }
    Ok(settings)
}

/// A limit in which -1 is none.
fn limited(limit: i64) -> String {
    if limit < 0 {
        "max".into()
    } else {
        limit.to_string()
    }
}

fn cpu_settings(cpu: &oci::LinuxCpu, settings: &mut Vec<Setting>) -> Result<()> {
    if cpu.realtime_period().is_some_and(|p| p != 0)
        || cpu.realtime_runtime().is_some_and(|r| r != 0)
    {
        return Err(Error::unsupported(
            "resources.cpu.realtimeRuntime",
            "not in cgroup v2",
        ));
    }
    if let Some(idle) = cpu.idle() {
        settings.push(("cpu.idle".into(), idle.to_string()));
    }
    if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
        settings.push(("cpu.weight".into(), weight_of_shares(shares).to_string()));
    }
    match (
        cpu.quota().filter(|q| *q != 0),
        cpu.period().filter(|p| *p != 0),
    ) {
        (None, None) => {}
        (quota, period) => {
            let quota = limited(quota.unwrap_or(-1));
            let value = match period {
                Some(period) => format!("{quota} {period}"),
                None => quota,
            };
            settings.push(("cpu.max".into(), value));
        }
    }
    if let Some(burst) = cpu.burst() {
        settings.push(("cpu.max.burst".into(), burst.to_string()));
    }
    for (file, list) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
        if let Some(list) = list.as_ref().filter(|list| !list.is_empty()) {
            settings.push((file.into(), list.clone()));
        }
    }
    Ok(())
}

/// cgroup v1 shares (2 to 262144, 1024 by default) to a v2 weight (1 to 10000, 100 by default), linearly between the
/// ends: what Kubernetes and its runtimes agreed on (KEP-2254).
fn weight_of_shares(shares: u64) -> u64 {
    let shares = shares.clamp(2, 262_144);
    1 + (shares - 2) * 9999 / 262_142
}

fn memory_settings(memory: &oci::LinuxMemory, settings: &mut Vec<Setting>) -> Result<()> {
    let limit = memory.limit().filter(|limit| *limit != 0);
    if let Some(swap) = memory.swap().filter(|swap| *swap != 0) {
        // v1's figure is of memory and swap together, v2's of swap alone.
        let value = match (swap, limit) {
            (swap, _) if swap < 0 => "max".to_owned(),
            (swap, Some(limit)) if limit > 0 => swap
                .checked_sub(limit)
                .filter(|swap| *swap >= 0)
                .ok_or_else(|| {
                    Error::invalid(
                        "resources.memory.swap",
                        format!("{swap} (memory and swap) is below the memory limit {limit}"),
                    )
                })?
                .to_string(),
            _ => {
                return Err(Error::invalid(
                    "resources.memory.swap",
                    "a limit of memory and swap needs a limit of memory",
                ));
            }
        };
        settings.push(("memory.swap.max".into(), value));
    }
    if let Some(limit) = limit {
        settings.push(("memory.max".into(), limited(limit)));
    }
    if let Some(reservation) = memory.reservation().filter(|reservation| *reservation != 0) {
        settings.push(("memory.low".into(), limited(reservation)));
    }
    // kernel, kernelTCP, swappiness, disableOOMKiller have no counterpart in v2 and are left out, as runc does.
    Ok(())
}

fn io_settings(io: &oci::LinuxBlockIo, settings: &mut Vec<Setting>) -> Result<()> {
    if let Some(weight) = io.weight().filter(|weight| *weight != 0) {
        settings.push((
            "io.weight".into(),
            format!("default {}", io_weight(weight)?),
        ));
    }
    for device in io.weight_device().iter().flatten().take(MAX_ENTRIES) {
        if let Some(weight) = device.weight().filter(|weight| *weight != 0) {
            let value = format!(
                "{}:{} {}",
                device.major(),
                device.minor(),
                io_weight(weight)?
            );
            settings.push(("io.weight".into(), value));
        }
    }
    let limits = [
        ("rbps", io.throttle_read_bps_device()),
        ("wbps", io.throttle_write_bps_device()),
        ("riops", io.throttle_read_iops_device()),
        ("wiops", io.throttle_write_iops_device()),
    ];
    for (key, devices) in limits {
        for device in devices.iter().flatten().take(MAX_ENTRIES) {
            let rate = if device.rate() == 0 {
                "max".to_owned()
            } else {
                device.rate().to_string()
            };
            let value = format!("{}:{} {key}={rate}", device.major(), device.minor());
            settings.push(("io.max".into(), value));
        }
    }
    Ok(())
}

/// blkio weights (10 to 1000) to io weights (1 to 10000), linearly.
fn io_weight(weight: u16) -> Result<u64> {
    if !(10..=1000).contains(&weight) {
        return Err(Error::invalid(
            "resources.blockIO.weight",
            format!("{weight} is not 10..1000"),
        ));
    }
    Ok(1 + (u64::from(weight) - 10) * 9999 / 990)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(json: &str) -> Result<Vec<(String, String)>> {
        settings(&serde_json::from_str(json).unwrap())
    }

    fn one(json: &str) -> (String, String) {
        let mut all = of(json).unwrap();
        assert_eq!(all.len(), 1, "{all:?}");
        all.remove(0)
    }

    fn pair(file: &str, value: &str) -> (String, String) {
        (file.into(), value.into())
    }

    #[test]
    fn cpu() {
        assert_eq!(one(r#"{"cpu":{"shares":1024}}"#), pair("cpu.weight", "39"));
        assert_eq!(one(r#"{"cpu":{"shares":2}}"#), pair("cpu.weight", "1"));
        assert_eq!(
            one(r#"{"cpu":{"shares":99999999}}"#),
            pair("cpu.weight", "10000")
        );
        assert_eq!(
            one(r#"{"cpu":{"quota":50000,"period":100000}}"#),
            pair("cpu.max", "50000 100000")
        );
        assert_eq!(one(r#"{"cpu":{"quota":-1}}"#), pair("cpu.max", "max"));
        assert_eq!(
            one(r#"{"cpu":{"period":1000}}"#),
            pair("cpu.max", "max 1000")
        );
        assert_eq!(one(r#"{"cpu":{"cpus":"0-1"}}"#), pair("cpuset.cpus", "0-1"));
        assert!(of(r#"{"cpu":{"shares":0,"quota":0}}"#).unwrap().is_empty());
        assert!(of(r#"{"cpu":{"realtimeRuntime":5}}"#).is_err());
    }

    #[test]
    fn memory() {
        assert_eq!(one(r#"{"memory":{"limit":-1}}"#), pair("memory.max", "max"));
        assert_eq!(
            of(r#"{"memory":{"limit":100,"swap":150,"reservation":50}}"#).unwrap(),
            [
                pair("memory.swap.max", "50"),
                pair("memory.max", "100"),
                pair("memory.low", "50")
            ]
        );
        assert_eq!(
            one(r#"{"memory":{"swap":-1}}"#),
            pair("memory.swap.max", "max")
        );
        assert!(of(r#"{"memory":{"limit":100,"swap":50}}"#).is_err());
        assert!(of(r#"{"memory":{"swap":50}}"#).is_err());
        assert!(
            of(r#"{"memory":{"limit":9223372036854775807,"swap":-9223372036854775808}}"#).is_ok()
        );
    }

    #[test]
    fn the_rest() {
        assert_eq!(one(r#"{"pids":{"limit":7}}"#), pair("pids.max", "7"));
        assert_eq!(one(r#"{"pids":{"limit":0}}"#), pair("pids.max", "max"));
        assert_eq!(
            one(r#"{"blockIO":{"weight":1000}}"#),
            pair("io.weight", "default 10000")
        );
        assert_eq!(
            one(r#"{"blockIO":{"weight":10}}"#),
            pair("io.weight", "default 1")
        );
        assert!(of(r#"{"blockIO":{"weight":9}}"#).is_err());
        assert_eq!(
            one(r#"{"blockIO":{"throttleReadBpsDevice":[{"major":8,"minor":0,"rate":1048576}]}}"#),
            pair("io.max", "8:0 rbps=1048576")
        );
        assert_eq!(
            one(r#"{"hugepageLimits":[{"pageSize":"2MB","limit":4194304}]}"#),
            pair("hugetlb.2MB.max", "4194304")
        );
        assert!(of(r#"{"hugepageLimits":[{"pageSize":"../x","limit":1}]}"#).is_err());
        assert_eq!(
            one(r#"{"unified":{"memory.high":"9"}}"#),
            pair("memory.high", "9")
        );
        for bad in ["../memory.max", "cgroup.procs", "cgroup.kill", "x"] {
            assert!(
                of(&format!(r#"{{"unified":{{"{bad}":"1"}}}}"#)).is_err(),
                "{bad}"
            );
        }
    }
}
