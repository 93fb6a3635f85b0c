//! A container's counters as containerd reads them: the metrics of the host's cgroup version, filled from the guest's.

use cella_proto::agent::StatsResponse;
use containerd_shim_protos::cgroups::metrics as v1;
use containerd_shim_protos::cgroups_v2::metrics as v2;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};

use crate::sandbox::Error;

/// Whether containerd on this host expects the metrics of cgroup v2.
pub fn host_has_v2() -> bool {
    std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

/// The counters in an Any of the type that containerd expects.
///
/// # Errors
/// They cannot be encoded.
pub fn encode(stats: &StatsResponse, v2: bool) -> Result<Any, Error> {
    if v2 {
        any("v2", &metrics_v2(stats))
    } else {
        any("v1", &metrics_v1(stats))
    }
}

/// Adds a container's counters to its pod's. The network's are the pod's already.
pub fn add(sum: &mut StatsResponse, stats: &StatsResponse) {
    let add = |a: &mut u64, b: u64| *a = a.saturating_add(b);
    add(&mut sum.cpu_usage_usec, stats.cpu_usage_usec);
    add(&mut sum.cpu_user_usec, stats.cpu_user_usec);
    add(&mut sum.cpu_system_usec, stats.cpu_system_usec);
    add(&mut sum.memory_current, stats.memory_current);
    add(&mut sum.memory_max, stats.memory_max);
    add(&mut sum.pids_current, stats.pids_current);
    add(&mut sum.pids_max, stats.pids_max);
    for (name, value) in &stats.memory_stat {
        add(sum.memory_stat.entry(name.clone()).or_default(), *value);
    }
    sum.interfaces.clone_from(&stats.interfaces);
}

fn any(version: &str, metrics: &impl Message) -> Result<Any, Error> {
    let value = metrics
        .write_to_bytes()
        .map_err(|e| Error::host("encoding statistics", e))?;
    Ok(Any {
        type_url: format!("io.containerd.cgroups.{version}.Metrics"),
        value,
        ..Default::default()
    })
}

fn metrics_v2(stats: &StatsResponse) -> v2::Metrics {
    let io = stats.io.iter().map(|disk| v2::IOEntry {
        major: disk.major,
        minor: disk.minor,
        rbytes: disk.read_bytes,
        wbytes: disk.write_bytes,
        rios: disk.read_ios,
        wios: disk.write_ios,
        ..Default::default()
    });
    let network = stats.interfaces.iter().map(|interface| v2::NetworkStat {
        name: interface.name.clone(),
        rx_bytes: interface.rx_bytes,
        rx_packets: interface.rx_packets,
        rx_errors: interface.rx_errors,
        rx_dropped: interface.rx_dropped,
        tx_bytes: interface.tx_bytes,
        tx_packets: interface.tx_packets,
        tx_errors: interface.tx_errors,
        tx_dropped: interface.tx_dropped,
        ..Default::default()
    });
    let event = |name: &str| stats.memory_events.get(name).copied().unwrap_or(0);
    v2::Metrics {
        pids: MessageField::some(v2::PidsStat {
            current: stats.pids_current,
            limit: stats.pids_max,
            ..Default::default()
        }),
        cpu: MessageField::some(v2::CPUStat {
            usage_usec: stats.cpu_usage_usec,
            user_usec: stats.cpu_user_usec,
            system_usec: stats.cpu_system_usec,
            nr_periods: stats.cpu_nr_periods,
            nr_throttled: stats.cpu_nr_throttled,
            throttled_usec: stats.cpu_throttled_usec,
            ..Default::default()
        }),
        memory: MessageField::some(memory_v2(stats)),
        memory_events: MessageField::some(v2::MemoryEvents {
            low: event("low"),
            high: event("high"),
            max: event("max"),
            oom: event("oom"),
            oom_kill: event("oom_kill"),
            oom_group_kill: event("oom_group_kill"),
            ..Default::default()
        }),
        io: MessageField::some(v2::IOStat {
            usage: io.collect(),
            ..Default::default()
        }),
        network: network.collect(),
        ..Default::default()
    }
}

fn memory_v2(stats: &StatsResponse) -> v2::MemoryStat {
    let stat = |name: &str| stats.memory_stat.get(name).copied().unwrap_or(0);
    v2::MemoryStat {
        usage: stats.memory_current,
        usage_limit: stats.memory_max,
        swap_usage: stats.memory_swap_current,
        anon: stat("anon"),
        file: stat("file"),
        kernel_stack: stat("kernel_stack"),
        slab: stat("slab"),
        sock: stat("sock"),
        shmem: stat("shmem"),
        file_mapped: stat("file_mapped"),
        file_dirty: stat("file_dirty"),
        file_writeback: stat("file_writeback"),
        anon_thp: stat("anon_thp"),
        inactive_anon: stat("inactive_anon"),
        active_anon: stat("active_anon"),
        inactive_file: stat("inactive_file"),
        active_file: stat("active_file"),
        unevictable: stat("unevictable"),
        slab_reclaimable: stat("slab_reclaimable"),
        slab_unreclaimable: stat("slab_unreclaimable"),
        pgfault: stat("pgfault"),
        pgmajfault: stat("pgmajfault"),
        ..Default::default()
    }
}

/// The same in the words of cgroup v1: nanoseconds for microseconds, and its older names.
fn metrics_v1(stats: &StatsResponse) -> v1::Metrics {
    let ns = |usec: u64| usec.saturating_mul(1000);
    let network = stats.interfaces.iter().map(|interface| v1::NetworkStat {
        name: interface.name.clone(),
        rx_bytes: interface.rx_bytes,
        rx_packets: interface.rx_packets,
        rx_errors: interface.rx_errors,
        rx_dropped: interface.rx_dropped,
        tx_bytes: interface.tx_bytes,
        tx_packets: interface.tx_packets,
        tx_errors: interface.tx_errors,
        tx_dropped: interface.tx_dropped,
        ..Default::default()
    });
    let blocks = stats.io.iter().flat_map(|disk| {
        [("Read", disk.read_bytes), ("Write", disk.write_bytes)].map(|(op, value)| v1::BlkIOEntry {
            op: op.to_owned(),
            major: disk.major,
            minor: disk.minor,
            value,
            ..Default::default()
        })
    });
    v1::Metrics {
        pids: MessageField::some(v1::PidsStat {
            current: stats.pids_current,
            limit: stats.pids_max,
            ..Default::default()
        }),
        cpu: MessageField::some(v1::CPUStat {
            usage: MessageField::some(v1::CPUUsage {
                total: ns(stats.cpu_usage_usec),
                kernel: ns(stats.cpu_system_usec),
                user: ns(stats.cpu_user_usec),
                ..Default::default()
            }),
            throttling: MessageField::some(v1::Throttle {
                periods: stats.cpu_nr_periods,
                throttled_periods: stats.cpu_nr_throttled,
                throttled_time: ns(stats.cpu_throttled_usec),
                ..Default::default()
            }),
            ..Default::default()
        }),
        memory: MessageField::some(memory_v1(stats)),
        memory_oom_control: MessageField::some(v1::MemoryOomControl {
            oom_kill: stats.memory_events.get("oom_kill").copied().unwrap_or(0),
            ..Default::default()
        }),
        blkio: MessageField::some(v1::BlkIOStat {
            io_service_bytes_recursive: blocks.collect(),
            ..Default::default()
        }),
        network: network.collect(),
        ..Default::default()
    }
}

fn memory_v1(stats: &StatsResponse) -> v1::MemoryStat {
    let stat = |name: &str| stats.memory_stat.get(name).copied().unwrap_or(0);
    v1::MemoryStat {
        cache: stat("file"),
        rss: stat("anon"),
        mapped_file: stat("file_mapped"),
        dirty: stat("file_dirty"),
        writeback: stat("file_writeback"),
        pg_fault: stat("pgfault"),
        pg_maj_fault: stat("pgmajfault"),
        inactive_anon: stat("inactive_anon"),
        active_anon: stat("active_anon"),
        inactive_file: stat("inactive_file"),
        active_file: stat("active_file"),
        unevictable: stat("unevictable"),
        hierarchical_memory_limit: stats.memory_max,
        total_cache: stat("file"),
        total_rss: stat("anon"),
        total_mapped_file: stat("file_mapped"),
        total_pg_fault: stat("pgfault"),
        total_pg_maj_fault: stat("pgmajfault"),
        total_inactive_anon: stat("inactive_anon"),
        total_active_anon: stat("active_anon"),
        total_inactive_file: stat("inactive_file"),
        total_active_file: stat("active_file"),
        total_unevictable: stat("unevictable"),
        usage: MessageField::some(v1::MemoryEntry {
            limit: stats.memory_max,
            usage: stats.memory_current,
            ..Default::default()
        }),
        swap: MessageField::some(v1::MemoryEntry {
            usage: stats.memory_swap_current,
            ..Default::default()
        }),
        kernel: MessageField::some(v1::MemoryEntry {
            usage: stat("kernel"),
            ..Default::default()
        }),
        kernel_tcp: MessageField::some(v1::MemoryEntry {
            usage: stat("sock"),
            ..Default::default()
        }),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_version_has_its_url_and_units() {
        let stats = StatsResponse {
            cpu_usage_usec: 5,
            memory_current: 4096,
            memory_events: [("oom_kill".to_owned(), 2)].into(),
            ..Default::default()
        };
        let v1 = encode(&stats, false).unwrap();
        assert_eq!(v1.type_url, "io.containerd.cgroups.v1.Metrics");
        assert_eq!(metrics_v1(&stats).cpu.usage.total, 5000);
        assert_eq!(metrics_v1(&stats).memory_oom_control.oom_kill, 2);
        let v2 = encode(&stats, true).unwrap();
        assert_eq!(v2.type_url, "io.containerd.cgroups.v2.Metrics");
        assert_eq!(metrics_v2(&stats).memory.usage, 4096);
    }
}
