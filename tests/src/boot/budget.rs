//! `tests/budgets.toml`: what a boot and a container's start may cost, and the comparison with what they do cost.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use serde::Deserialize;

use super::Error;
use super::report::{Counts, Tools};

/// How much more than its budget a count may be, in percent.
pub const TOLERANCE_PERCENT: u64 = 2;
/// So many more VM exits of a reason are within its budget, if that is more than [`EXITS_PERCENT`].
pub const EXITS_SPARE: u64 = 10;
/// How much more than its budget a count of VM exits may be, in percent.
pub const EXITS_PERCENT: u64 = 10;
/// Reasons that depend on when interrupts come (each switch between processes saves a state), and so on the host's load: 19 to
/// 30 were seen. Only the limit on all exits holds them.
const EXITS_BY_LOAD: [&str; 3] = ["emulate", "intr", "hlt"];
/// How a budget is renewed; errors and the file itself say it.
pub const RENEW: &str = "make bench-boot RENEW=1";

/// The file.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Budget {
    /// What the budgets were measured with. With other tools the counts are others, and only the limits hold.
    pub tools: Tools,
    /// What no renewal may exceed.
    pub limits: Limits,
    /// Instructions by the counts' names.
    pub counts: BTreeMap<String, u64>,
    /// Instructions by the boot's phases.
    pub phases: BTreeMap<String, u64>,
    /// VM exits by reason.
    pub vm_exits: BTreeMap<String, u64>,
}

/// What no renewal may exceed.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// From reset to the agent's readiness.
    pub guest_instructions: u64,
    /// From the first guest instruction to a sandbox that is set up.
    pub vm_exits: u64,
}

/// What a comparison found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Each a line: what exceeds, by how much, and what to do.
    pub failures: Vec<String>,
    /// Each a line: gains that a renewal would keep.
    pub remarks: Vec<String>,
    /// Why counts were compared with limits only.
    pub skipped: Option<String>,
}

impl Budget {
    /// Reads it.
    ///
    /// # Errors
    /// It is not there, or is not a budget: which line, and why.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let text =
            std::fs::read_to_string(path).map_err(Error::system("reading", path.display()))?;
        Self::parse(&text).map_err(|why| Error::Budget {
            path: path.to_owned(),
            why,
        })
    }

    fn parse(text: &str) -> Result<Self, String> {
        let budget: Self = toml::from_str(text).map_err(|error| error.to_string())?;
        let zero = [&budget.counts, &budget.phases]
            .into_iter()
            .flatten()
            .find(|(_, budget)| **budget == 0);
        match zero {
            Some((name, _)) => Err(format!("{name:?} is 0, which nothing can keep")),
            None => Ok(budget),
        }
    }

    /// Compares what was counted.
    pub fn compare(&self, counts: &Counts) -> Verdict {
        let mut verdict = Verdict::default();
        verdict.limit(
            "guest_instructions",
            self.limits.guest_instructions,
            counts.guest_instructions(),
        );
        if self.tools != counts.tools {
            verdict.skipped = Some(format!(
                "budgets of single phases: they are of {}, here is {} (the limits were compared)",
                self.tools, counts.tools
            ));
            return verdict;
        }
        verdict.each("counts", &self.counts, &counts.counts);
        let phases = counts
            .phases
            .iter()
            .map(|phase| (phase.name.clone(), phase.instructions));
        verdict.each("phases", &self.phases, &phases.collect());
        verdict
    }

    /// Compares VM exits, which do not depend on tools.
    pub fn compare_exits(&self, exits: &BTreeMap<String, u64>) -> Verdict {
        let mut verdict = Verdict::default();
        verdict.limit("vm_exits", self.limits.vm_exits, exits.values().sum());
        let steady = |reason: &str| !EXITS_BY_LOAD.contains(&reason);
        for (reason, &count) in exits.iter().filter(|(reason, _)| steady(reason)) {
            let budget = self.vm_exits.get(reason).copied().unwrap_or(0);
            let most = budget.saturating_add(EXITS_SPARE.max(budget / (100 / EXITS_PERCENT)));
            if count > most {
                verdict.failures.push(format!(
                    "vm_exits.{reason}: {count} is more than {most}, the budget of {budget} with what is allowed to it. \
                     Lower it, or raise the budget deliberately: {RENEW}"
                ));
            }
        }
        verdict
    }
}

impl Verdict {
    /// Whether everything is within its budget.
    pub fn is_kept(&self) -> bool {
        self.failures.is_empty()
    }

    fn limit(&mut self, name: &str, limit: u64, count: u64) {
        if count > limit {
            self.failures.push(format!(
                "{name}: {} is more than the limit of {}, which is not renewed: lower it",
                grouped(count),
                grouped(limit)
            ));
        }
    }

    fn each(
        &mut self,
        table: &str,
        budgets: &BTreeMap<String, u64>,
        counts: &BTreeMap<String, u64>,
    ) {
        for (name, &count) in counts {
            match budgets.get(name) {
                Some(&budget) => self.one(table, name, budget, count),
                None => self.failures.push(format!(
                    "{table}.{name}: {} has no budget. Lower it, or give it one deliberately: {RENEW}",
                    grouped(count)
                )),
            }
        }
    }

    fn one(&mut self, table: &str, name: &str, budget: u64, count: u64) {
        let difference = count.abs_diff(budget);
        let percent = difference as f64 * 100.0 / budget as f64;
        // In integers: exactly 2 % more is within.
        let notable =
            u128::from(difference) * 100 > u128::from(budget) * u128::from(TOLERANCE_PERCENT);
        if notable && count > budget {
            self.failures.push(format!(
                "{table}.{name}: {} is {} more than the budget of {} (+{percent:.1} %, {TOLERANCE_PERCENT} % are allowed). \
                 Lower it, or raise the budget deliberately: {RENEW}, and say in the commit what it is for",
                grouped(count),
                grouped(difference),
                grouped(budget)
            ));
        } else if notable {
            self.remarks.push(format!(
                "{table}.{name}: {} is {percent:.1} % less than its budget: keep the gain with {RENEW}",
                grouped(count)
            ));
        }
    }
}

/// The file for these counts, with the limits of the one before.
pub fn renewed(limits: &Limits, counts: &Counts, exits: &BTreeMap<String, u64>) -> String {
    let mut text = format!(
        "# What a boot and a container's start may cost in guest instructions. `make test` fails when a count exceeds its budget\n\
         # by more than {TOLERANCE_PERCENT} %. Written by `{RENEW}`: renew it deliberately, in the commit that changes a cost, and say there\n\
         # what the instructions are for. What the names mean: docs/boot.md.\n\
         \n\
         # What the counts depend on besides the sources. With other tools only the limits are compared.\n\
         [tools]\n"
    );
    let mut line = |name: &str, value: &dyn std::fmt::Display| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{name} = {value}");
    };
    for (name, value) in counts.tools.lines() {
        line(name, &format!("{value:?}"));
    }
    line(
        "\n# Held whatever is renewed.\n[limits]\nguest_instructions",
        &grouped_toml(limits.guest_instructions),
    );
    line("vm_exits", &grouped_toml(limits.vm_exits));
    let phases = counts
        .phases
        .iter()
        .map(|phase| (&phase.name, phase.instructions));
    let tables: [(&str, Vec<(&String, u64)>); 3] = [
        (
            "counts",
            counts
                .counts
                .iter()
                .map(|(name, count)| (name, *count))
                .collect(),
        ),
        ("phases", phases.collect()),
        (
            "vm_exits",
            exits.iter().map(|(name, count)| (name, *count)).collect(),
        ),
    ];
    for (table, entries) in tables {
        let _ = writeln!(text, "\n[{table}]");
        for (name, count) in entries {
            let _ = writeln!(text, "{name} = {}", grouped_toml(count));
        }
    }
    text
}

/// 12,345,678
pub fn grouped(count: u64) -> String {
    separated(count, ',')
}

fn grouped_toml(count: u64) -> String {
    separated(count, '_')
}

fn separated(count: u64, separator: char) -> String {
    let digits = count.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(separator);
        }
        text.push(digit);
    }
    text
}
