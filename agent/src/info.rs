//! Facts about the guest and the agent, from /proc.

use cella_proto::agent::InfoResponse;

use crate::error::Error;

/// The agent's version, which is the workspace's.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The running kernel's release.
pub fn kernel_release() -> String {
    let name = rustix::system::uname();
    name.release().to_string_lossy().into_owned()
}

/// What Info answers. Needs /proc and /sys.
///
/// # Errors
///
/// [`Error::System`] when /proc cannot be read.
pub fn info() -> Result<InfoResponse, Error> {
    let status = read("/proc/self/status")?;
    let memory = read("/proc/meminfo")?;
    let online = read("/sys/devices/system/cpu/online")?;
    Ok(InfoResponse {
        agent_version: VERSION.to_owned(),
        kernel_release: kernel_release(),
        agent_rss_kib: field(&status, "VmRSS:"),
        memory_total_kib: field(&memory, "MemTotal:"),
        memory_available_kib: field(&memory, "MemAvailable:"),
        cpus_online: count(&online),
        ..Default::default()
    })
}

fn read(path: &str) -> Result<String, Error> {
    std::fs::read_to_string(path).map_err(|source| Error::System {
        what: format!("reading {path}"),
        source,
    })
}

/// The number after `name` at the start of a line; 0 if there is none.
fn field(text: &str, name: &str) -> u64 {
    text.lines()
        .find_map(|line| line.strip_prefix(name))
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|number| number.parse().ok())
        .unwrap_or(0)
}

/// How many CPUs a list like `0-3,8` names.
pub(crate) fn count(list: &str) -> u32 {
    let ranges = list.trim().split(',').filter_map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        last.checked_sub(first)?.checked_add(1)
    });
    ranges.fold(0, u32::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_and_lists_are_read() {
        let text = "Name:\tagent\nVmRSS:\t    1234 kB\nVmRSSx: 1\n";
        assert_eq!(field(text, "VmRSS:"), 1234);
        assert_eq!(field(text, "MemTotal:"), 0);
        assert_eq!(count("0\n"), 1);
        assert_eq!(count("0-3,8,10-11\n"), 7);
        assert_eq!(count("4-2,x"), 0);
    }
}
