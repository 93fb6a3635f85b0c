//! When each phase of a start began, from the command's exec to the container's first output: `--timeline`.

use std::sync::{Mutex, PoisonError};

use cella_proto::agent::Ready;
use serde::Serialize;

mod picture;

/// A phase and who spent it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Phase {
    /// host, vmm, kernel, agent or container.
    pub who: &'static str,
    /// What it was.
    pub name: &'static str,
    /// Microseconds since the command's exec.
    pub start_us: u64,
    /// Microseconds.
    pub duration_us: u64,
}

/// Collects moments, in microseconds of CLOCK_MONOTONIC.
pub struct Timeline {
    exec_us: u64,
    moments: Mutex<Vec<(&'static str, u64)>>,
}

/// Each phase ends at the moment of its name, and begins where the one before ended.
const PHASES: [(&str, &str, &str); 9] = [
    ("image-ready", "host", "image"),
    ("vm-spawning", "host", "sandbox directory"),
    ("vm-started", "vmm", "spawn, jail, machine"),
    ("kernel-done", "kernel", "boot"),
    ("agent-dialled", "agent", "start and dial"),
    ("sandbox-set-up", "agent", "sandbox set-up"),
    ("created", "agent", "container created"),
    ("started", "agent", "container started"),
    ("first-output", "container", "to first output"),
];

impl Default for Timeline {
    fn default() -> Self {
        Self::new()
    }
}

impl Timeline {
    /// Begins at the exec of this process, as far as the kernel tells it.
    pub fn new() -> Self {
        Self {
            exec_us: exec_us().unwrap_or_else(now_us),
            moments: Mutex::default(),
        }
    }

    /// Notes that `moment` is now; its first time counts.
    pub fn mark(&self, moment: &'static str) {
        self.mark_at(moment, now_us());
    }

    /// Notes the agent's readiness: what the guest says of its own clock is put on the host's.
    /// `started_us` is the first guest instruction, or 0.
    pub fn ready(&self, ready: Ready, started_us: u64) {
        let now = now_us();
        if started_us > 0 {
            self.mark_at("vm-started-exact", started_us);
        }
        // The agent's own phase is a difference of one clock; it ended when its call came, which is about now.
        let own = ready.agent_dial_ns.saturating_sub(ready.agent_entry_ns) / 1000;
        self.mark_at("kernel-done", now.saturating_sub(own));
        self.mark_at("agent-dialled", now);
    }

    /// The phases so far, each from the end of the one before.
    pub fn phases(&self) -> Vec<Phase> {
        let moments = self.moments.lock().unwrap_or_else(PoisonError::into_inner);
        let at = |name: &str| {
            let exact = moments
                .iter()
                .find(|(moment, _)| moment.strip_suffix("-exact") == Some(name));
            exact
                .or_else(|| moments.iter().find(|(moment, _)| *moment == name))
                .map(|(_, us)| *us)
        };
        let mut phases = Vec::new();
        let mut start = self.exec_us;
        for (moment, who, name) in PHASES {
            let Some(end) = at(moment) else { continue };
            let end = end.max(start);
            phases.push(Phase {
                who,
                name,
                start_us: start - self.exec_us,
                duration_us: end - start,
            });
            start = end;
        }
        phases
    }

    /// The phases as JSON.
    pub fn to_json(&self) -> String {
        let phases = self.phases();
        let total: u64 = phases.iter().map(|phase| phase.duration_us).sum();
        serde_json::json!({ "total_us": total, "phases": phases }).to_string()
    }

    /// Writes the phases to `path`: a picture if it ends in `.svg`, JSON otherwise.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, path: &std::path::Path) -> std::io::Result<()> {
        let svg = path.extension().is_some_and(|extension| extension == "svg");
        let text = if svg {
            picture::svg(&self.phases())
        } else {
            self.to_json()
        };
        std::fs::write(path, text)
    }

    fn mark_at(&self, moment: &'static str, us: u64) {
        let mut moments = self.moments.lock().unwrap_or_else(PoisonError::into_inner);
        if moments.iter().all(|(known, _)| *known != moment) {
            moments.push((moment, us));
        }
    }
}

/// CLOCK_MONOTONIC in microseconds, the clock that the VMM stamps with.
pub fn now_us() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let us = i128::from(now.tv_sec) * 1_000_000 + i128::from(now.tv_nsec) / 1000;
    us.try_into().unwrap_or(0)
}

/// When this process was made, from /proc: of the clock's tick, 10 ms. Later than now it cannot be.
fn exec_us() -> Option<u64> {
    let own = crate::sandbox::state::ProcessId::own();
    let ticks = rustix::param::clock_ticks_per_second();
    let since_boot = own.start_ticks.checked_mul(1_000_000)?.checked_div(ticks)?;
    let boot = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let boot_us = u64::try_from(boot.tv_sec).ok()?.checked_mul(1_000_000)?
        + u64::try_from(boot.tv_nsec).ok()? / 1000;
    now_us().checked_sub(boot_us.checked_sub(since_boot)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_follow_each_other_without_gaps() {
        let timeline = Timeline::new();
        timeline.mark("image-ready");
        timeline.mark("vm-spawning");
        timeline.mark("vm-started");
        let ready = Ready {
            agent_entry_ns: 1_000_000,
            agent_dial_ns: 3_000_000,
            ..Default::default()
        };
        std::thread::sleep(std::time::Duration::from_millis(5));
        timeline.ready(ready, 0);
        timeline.mark("first-output");
        let phases = timeline.phases();
        assert_eq!(phases.len(), 6);
        for pair in phases.windows(2) {
            assert_eq!(pair[0].start_us + pair[0].duration_us, pair[1].start_us);
        }
        let agent = phases.iter().find(|p| p.name == "start and dial").unwrap();
        assert_eq!(agent.duration_us, 2000);
        let json: serde_json::Value = serde_json::from_str(&timeline.to_json()).unwrap();
        assert!(json["total_us"].as_u64().unwrap() >= 2000);
    }

    #[test]
    fn the_picture_names_every_phase() {
        let timeline = Timeline::new();
        timeline.mark("image-ready");
        timeline.mark("first-output");
        let svg = picture::svg(&timeline.phases());
        assert!(
            svg.starts_with("<svg") && svg.contains("to first output"),
            "{svg}"
        );
    }
}
