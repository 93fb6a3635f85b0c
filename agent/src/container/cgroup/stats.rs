//! A container's counters, as the wire has them.

use std::collections::BTreeMap;

use cella_proto::agent::{BlockStats, StatsResponse};

use super::Cgroup;
use crate::container::Result;

impl Cgroup {
    /// All counters. Those of a controller that is off are 0, limits that are "max" are `u64::MAX`.
    pub(in crate::container) fn stats(&self, id: &str) -> Result<StatsResponse> {
        let mut stats = StatsResponse::new();
        stats.container_id = id.into();
        let cpu = self.table("cpu.stat")?;
        let of = |name: &str| cpu.get(name).copied().unwrap_or(0);
        stats.cpu_usage_usec = of("usage_usec");
        stats.cpu_user_usec = of("user_usec");
        stats.cpu_system_usec = of("system_usec");
        stats.cpu_nr_periods = of("nr_periods");
        stats.cpu_nr_throttled = of("nr_throttled");
        stats.cpu_throttled_usec = of("throttled_usec");
        stats.memory_current = self.number("memory.current")?;
        stats.memory_max = self.number("memory.max")?;
        stats.memory_swap_current = self.number("memory.swap.current")?;
        stats.memory_stat = self.table("memory.stat")?.into_iter().collect();
        stats.memory_events = self.table("memory.events")?.into_iter().collect();
        stats.pids_current = self.number("pids.current")?;
        stats.pids_max = self.number("pids.max")?;
        stats.io = parse_io(&self.read("io.stat")?.unwrap_or_default());
        Ok(stats)
    }

    fn number(&self, name: &str) -> Result<u64> {
        let text = self.read(name)?.unwrap_or_default();
        Ok(match text.trim() {
            "max" => u64::MAX,
            number => number.parse().unwrap_or(0),
        })
    }

    fn table(&self, name: &str) -> Result<BTreeMap<String, u64>> {
        Ok(parse_table(&self.read(name)?.unwrap_or_default()))
    }
}

fn parse_table(text: &str) -> BTreeMap<String, u64> {
    text.lines()
        .filter_map(|line| {
            let (name, value) = line.split_once(' ')?;
            Some((name.to_owned(), value.trim().parse().ok()?))
        })
        .collect()
}

/// Lines of "MAJOR:MINOR rbytes=N wbytes=N rios=N wios=N ...".
fn parse_io(text: &str) -> Vec<BlockStats> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let (major, minor) = words.next()?.split_once(':')?;
            let mut stats = BlockStats::new();
            stats.major = major.parse().ok()?;
            stats.minor = minor.parse().ok()?;
            for (name, value) in words.filter_map(|word| word.split_once('=')) {
                let value = value.parse().unwrap_or(0);
                match name {
                    "rbytes" => stats.read_bytes = value,
                    "wbytes" => stats.write_bytes = value,
                    "rios" => stats.read_ios = value,
                    "wios" => stats.write_ios = value,
                    _ => {}
                }
            }
            Some(stats)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn io_lines() {
        let io = parse_io("8:16 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n\nbad\n254:0\n");
        assert_eq!(io.len(), 2);
        assert_eq!((io[0].major, io[0].minor), (8, 16));
        assert_eq!((io[0].read_bytes, io[0].write_bytes), (1, 2));
        assert_eq!((io[0].read_ios, io[0].write_ios), (3, 4));
        assert_eq!(io[1].read_bytes, 0);
    }

    #[test]
    fn tables_skip_what_they_do_not_understand() {
        let table = parse_table("a 1\nb x\nc\nd 18446744073709551615\n");
        assert_eq!(table.len(), 2);
        assert_eq!(table.get("d"), Some(&u64::MAX));
    }
}
