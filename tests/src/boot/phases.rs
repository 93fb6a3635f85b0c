//! The phases of a boot, from the marks that the counting plugin made.

use std::collections::{BTreeMap, BTreeSet};

use super::count::Mark;
use super::{Error, Phase};

/// An initcall that costs as much has a phase of its own.
const COSTLY: u64 = 100_000;
/// Entered before each initcall.
const INITCALL: &str = "do_one_initcall";
/// The agent's first step: the boot is over.
const READY: &str = "ready";
/// The other initcalls together.
const OTHERS: &str = "initcalls-other";

/// What ran before all of [`BOUNDARIES`].
const FIRST: (&str, &str) = ("firmware", "firmware");

/// What begins where a function is entered: its symbol, who it is, the phase's name. docs/boot.md says what is in them.
const BOUNDARIES: [(&str, &str, &str); 15] = [
    ("pvh_start_xen", "kernel", "entry"),
    ("start_kernel", "kernel", "setup"),
    ("free_area_init", "kernel", "memory-map"),
    ("setup_per_cpu_areas", "kernel", "parameters"),
    ("mm_core_init", "kernel", "mm"),
    ("sched_init", "kernel", "core"),
    ("arch_cpu_finalize_init", "kernel", "alternatives"),
    ("pid_idr_init", "kernel", "caches"),
    ("rest_init", "kernel", "threads"),
    ("smp_init", "kernel", "smp"),
    ("driver_init", "kernel", "driver-core"),
    ("do_populate_rootfs", "kernel", "rootfs"),
    ("console_on_rootfs", "kernel", "protection"),
    ("run_init_process", "kernel", "exec"),
    ("(user)", "agent", "agent"),
];

/// The functions to mark.
pub fn marks(symbols: &str) -> BTreeSet<&str> {
    let mut marks: BTreeSet<&str> = BOUNDARIES.iter().map(|(symbol, _, _)| *symbol).collect();
    marks.insert(INITCALL);
    marks.extend(initcalls(symbols));
    marks
}

/// The functions that are initcalls. Their table's entries have symbols: `__initcall__kmod_MODULE__NUMBER_LINE_FUNCTIONLEVEL`.
fn initcalls(symbols: &str) -> BTreeSet<&str> {
    symbols
        .lines()
        .filter_map(|line| line.split(' ').nth(2)?.strip_prefix("__initcall__kmod_"))
        .filter_map(|entry| entry.split_once("__").map(|(_, rest)| rest))
        .filter_map(|rest| {
            // Number and line, then the function's own name.
            let mut parts = rest.splitn(3, '_');
            let numbers = [parts.next()?, parts.next()?];
            let all_digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
            let name = numbers
                .iter()
                .all(|part| all_digits(part))
                .then(|| parts.next())??;
            let level = [
                "early", "rootfs", "0s", "1s", "2s", "3s", "4s", "5s", "6s", "7s", "0", "1", "2",
                "3", "4", "5", "6", "7",
            ];
            level.iter().find_map(|level| name.strip_suffix(level))
        })
        .collect()
}

/// The phases up to the agent's readiness, in the order of their beginnings.
///
/// # Errors
/// A boundary is missing: the kernel no longer has the function, or it was not entered.
pub fn phases(marks: &[Mark], symbols: &str) -> Result<Vec<Phase>, Error> {
    let initcalls = initcalls(symbols);
    let mut found = Phases::default();
    for (index, mark) in marks.iter().enumerate() {
        found.until(mark);
        if mark.name == READY {
            found.check()?;
            return Ok(found.fold());
        }
        let next = marks.get(index + 1).map(|next| next.name.as_str());
        let initcall = next.filter(|next| mark.name == INITCALL && initcalls.contains(next));
        let boundary = BOUNDARIES
            .iter()
            .find(|(symbol, _, _)| *symbol == mark.name);
        if let Some(name) = initcall {
            found.begin("kernel", &format!("initcall-{name}"));
        } else if mark.name == INITCALL {
            found.begin("kernel", OTHERS);
        } else if let Some((_, who, phase)) = boundary {
            found.begin(who, phase);
        }
    }
    Err(Error::Count("the agent was not ready".to_owned()))
}

/// Phases being found.
struct Phases {
    all: Vec<Phase>,
    /// Which of them it is in.
    current: usize,
    /// The counts where it was looked at last.
    seen: (u64, u64),
}

impl Default for Phases {
    fn default() -> Self {
        let (who, name) = FIRST;
        Self {
            all: vec![phase(who, name)],
            current: 0,
            seen: (0, 0),
        }
    }
}

fn phase(who: &'static str, name: &str) -> Phase {
    Phase {
        who,
        name: name.to_owned(),
        instructions: 0,
        kernel: 0,
    }
}

impl Phases {
    /// What was executed up to `mark` belongs to the current phase.
    fn until(&mut self, mark: &Mark) {
        let (all, user) = self.seen;
        let instructions = mark.all.saturating_sub(all);
        let of_user = mark.user.saturating_sub(user);
        if let Some(phase) = self.all.get_mut(self.current) {
            phase.instructions += instructions;
            phase.kernel += instructions.saturating_sub(of_user);
        }
        self.seen = (mark.all, mark.user);
    }

    /// Another phase begins, or goes on.
    fn begin(&mut self, who: &'static str, name: &str) {
        let known = self.all.iter().position(|phase| phase.name == name);
        self.current = known.unwrap_or_else(|| {
            self.all.push(phase(who, name));
            self.all.len() - 1
        });
    }

    fn check(&self) -> Result<(), Error> {
        let names: BTreeSet<&str> = self.all.iter().map(|phase| phase.name.as_str()).collect();
        match BOUNDARIES.iter().find(|(_, _, name)| !names.contains(name)) {
            Some((symbol, _, name)) => Err(Error::Count(format!(
                "phase {name} did not begin: {symbol} was not entered (tests/src/boot/phases.rs names the functions)"
            ))),
            None => Ok(()),
        }
    }

    /// With the initcalls that cost little as one phase.
    fn fold(self) -> Vec<Phase> {
        let mut others = phase("kernel", OTHERS);
        let mut folded = Vec::new();
        for phase in self.all {
            let little = phase.name.starts_with("initcall-") && phase.instructions < COSTLY;
            if little || phase.name == OTHERS {
                others.instructions += phase.instructions;
                others.kernel += phase.kernel;
            } else {
                folded.push(phase);
            }
        }
        let initcall = |phase: &Phase| phase.name.starts_with("initcall-");
        let behind = folded
            .iter()
            .rposition(initcall)
            .map_or(folded.len(), |last| last + 1);
        folded.insert(behind, others);
        folded
    }
}

/// What the agent's steps cost: each from the one before it.
pub fn steps(marks: &[Mark]) -> BTreeMap<&str, Phase> {
    let begin = marks
        .iter()
        .position(|mark| mark.name == READY)
        .unwrap_or(marks.len());
    let steps = marks.get(begin..).unwrap_or_default();
    steps
        .windows(2)
        .filter_map(|pair| match pair {
            [before, after] => {
                let instructions = after.all.saturating_sub(before.all);
                let cost = Phase {
                    who: "agent",
                    name: after.name.clone(),
                    instructions,
                    kernel: instructions.saturating_sub(after.user.saturating_sub(before.user)),
                };
                Some((after.name.as_str(), cost))
            }
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SYMBOLS: &str = "\
ffffffff81d45608 d __initcall__kmod_core__422_2214_init_hw_perf_eventsearly
ffffffff81d45610 d __initcall__kmod_af_inet__401_228_inet_init5
ffffffff81d45614 d __initcall__kmod_cheap__1_2_cheap_init6s
ffffffff81000000 T start_kernel
";

    fn mark(name: &str, all: u64, user: u64) -> Mark {
        Mark {
            name: name.to_owned(),
            all,
            user,
            hot: Vec::new(),
        }
    }

    fn boot() -> Vec<Mark> {
        let mut marks: Vec<Mark> = (1u64..)
            .zip(BOUNDARIES)
            .map(|(index, (symbol, _, _))| mark(symbol, index * 100, 0))
            .collect();
        let last = marks.len() as u64 * 100;
        let more = [
            (INITCALL, 10),
            ("inet_init", 20),
            (INITCALL, 200_010),
            ("cheap_init", 200_020),
            (INITCALL, 200_110),
            ("start_kernel", 200_120),
        ];
        let at = marks.len() - 3;
        let begin = marks[at - 1].all;
        marks.splice(
            at..at,
            more.map(|(name, after)| mark(name, begin + after, 0)),
        );
        for mark in &mut marks[at + 6..] {
            mark.all += 300_000;
        }
        marks.push(mark(READY, last + 300_000 + 50, 40));
        marks.push(mark("prepared", last + 300_000 + 80, 50));
        marks
    }

    #[test]
    fn initcalls_are_known_by_their_tables_symbols() {
        let found: Vec<&str> = initcalls(SYMBOLS).into_iter().collect();
        assert_eq!(found, ["cheap_init", "inet_init", "init_hw_perf_events"]);
        assert!(marks(SYMBOLS).contains("start_kernel"));
    }

    #[test]
    fn every_instruction_up_to_readiness_is_in_one_phase() {
        let marks = boot();
        let phases = phases(&marks, SYMBOLS).unwrap();
        let ready = marks.iter().find(|mark| mark.name == READY).unwrap();
        assert_eq!(
            phases.iter().map(|phase| phase.instructions).sum::<u64>(),
            ready.all
        );
        let of = |name: &str| phases.iter().find(|phase| phase.name == name).unwrap();
        assert_eq!(of("firmware").instructions, 100);
        assert_eq!(of("initcall-inet_init").instructions, 200_000);
        assert!(
            phases
                .iter()
                .all(|phase| phase.name != "initcall-cheap_init")
        );
        assert_eq!(of(OTHERS).instructions, 110);
        assert_eq!((of("agent").instructions, of("agent").kernel), (50, 10));
        assert_eq!(steps(&marks)["prepared"].instructions, 30);
    }

    #[test]
    fn a_phase_that_does_not_begin_is_missed() {
        let marks: Vec<Mark> = boot()
            .into_iter()
            .filter(|mark| mark.name != "mm_core_init")
            .collect();
        let error = phases(&marks, SYMBOLS).unwrap_err().to_string();
        assert!(error.contains("mm_core_init"), "{error}");
        assert!(phases(&[], SYMBOLS).is_err());
    }
}
