//! The boot budget: a boot and a container's start may not cost more guest instructions than `tests/budgets.toml` says, nor
//! a boot on KVM more exits; and a cost that does exceed it is noticed.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

use std::collections::BTreeMap;
use std::fs;

use cella_tests::boot::Error;
use cella_tests::boot::budget::{Budget, RENEW, renewed};
use cella_tests::boot::exits::Exits;
use cella_tests::boot::report::{Counts, GUEST_INSTRUCTIONS};
use cella_tests::{missing_for, root, skip};

fn budget() -> Budget {
    Budget::read(&root().join("tests/budgets.toml")).unwrap()
}

/// What was measured, unless the machine cannot.
fn unless_missing<T>(measured: Result<T, Error>) -> Option<T> {
    match measured {
        Ok(measured) => Some(measured),
        Err(Error::Missing(what)) => {
            skip(&format!("the boot budget: {what}"));
            None
        }
        Err(error) => panic!("{error}: {:?}", std::error::Error::source(&error)),
    }
}

/// A budget that is exactly what was counted.
fn exact(counts: &Counts) -> Budget {
    let phases = counts
        .phases
        .iter()
        .map(|phase| (phase.name.clone(), phase.instructions));
    Budget {
        tools: counts.tools.clone(),
        counts: counts.counts.clone(),
        phases: phases.collect(),
        ..budget()
    }
}

#[test]
fn instructions_are_within_their_budget_and_more_is_noticed() {
    let Some(counts) = unless_missing(Counts::measure(&root())) else {
        return;
    };
    let verdict = budget().compare(&counts);
    if let Some(reason) = &verdict.skipped {
        skip(reason);
    }
    for remark in &verdict.remarks {
        println!("{remark}");
    }
    assert!(verdict.is_kept(), "{:#?}", verdict.failures);

    // The phases are all of it: QEMU's count and the plugin's differ by the instructions that a fault made begin again.
    let sum: u64 = counts.phases.iter().map(|phase| phase.instructions).sum();
    let ready = counts.guest_instructions();
    assert!(
        sum >= ready && sum - ready < ready / 1000,
        "{sum} in phases, {ready} in all"
    );

    assert!(exact(&counts).compare(&counts).is_kept());
    for (name, count) in &counts.counts {
        let mut small = exact(&counts);
        small.counts.insert(name.clone(), count * 97 / 100);
        let failures = small.compare(&counts).failures;
        assert_eq!(failures.len(), 1, "{failures:#?}");
        assert!(
            failures[0].contains(name.as_str()) && failures[0].contains(RENEW),
            "{failures:#?}"
        );
    }
    let phase = &counts.phases[counts.phases.len() / 2];
    let mut small = exact(&counts);
    small
        .phases
        .insert(phase.name.clone(), phase.instructions / 2);
    let failures = small.compare(&counts).failures;
    assert!(
        failures.len() == 1 && failures[0].contains(&phase.name),
        "{failures:#?}"
    );
    small.phases.remove(&phase.name);
    let failures = small.compare(&counts).failures;
    assert!(
        failures.len() == 1 && failures[0].contains("has no budget"),
        "{failures:#?}"
    );
}

#[test]
fn exits_are_within_their_budget_and_more_is_noticed() {
    if let Some(missing) = missing_for("kvm") {
        return skip(&missing);
    }
    let Some(exits) = unless_missing(Exits::measure(&root())) else {
        return;
    };
    let verdict = budget().compare_exits(&exits.exits);
    assert!(
        verdict.is_kept(),
        "{:#?} {:#?}",
        verdict.failures,
        exits.exits
    );
    let mut small = budget();
    small.limits.vm_exits = exits.total() - 1;
    let failures = small.compare_exits(&exits.exits).failures;
    assert!(
        failures.len() == 1 && failures[0].contains("limit"),
        "{failures:#?}"
    );
}

#[test]
fn ten_exits_more_are_within_and_eleven_are_not() {
    let mut budget = budget();
    budget.vm_exits = BTreeMap::from([("io_out".to_owned(), 20), ("mmio_read".to_owned(), 150)]);
    let failures_with = |reason: &str, count: u64| {
        let exits = BTreeMap::from([(reason.to_owned(), count)]);
        budget.compare_exits(&exits).failures
    };
    assert!(failures_with("io_out", 30).is_empty());
    assert!(failures_with("io_out", 31)[0].contains("io_out"));
    assert!(failures_with("mmio_read", 165).is_empty());
    assert_eq!(failures_with("mmio_read", 166).len(), 1);
    // What depends on the host's load, the limit alone holds.
    assert!(failures_with("emulate", 299).is_empty());
    assert_eq!(failures_with("emulate", 301).len(), 1);
    // A reason without a budget.
    assert!(failures_with("io_in", 10).is_empty());
    assert_eq!(failures_with("io_in", 11).len(), 1);
}

fn counts() -> Counts {
    let budget = budget();
    Counts {
        tools: budget.tools,
        phases: Vec::new(),
        counts: BTreeMap::from([(GUEST_INSTRUCTIONS.to_owned(), 1_000_000)]),
        steps: Vec::new(),
    }
}

#[test]
fn two_percent_more_is_within_and_an_instruction_more_is_not() {
    let mut budget = budget();
    budget.phases.clear();
    let mut counts = counts();
    let mut failures_with = |budgeted: u64, counted: u64| {
        budget.counts = BTreeMap::from([(GUEST_INSTRUCTIONS.to_owned(), budgeted)]);
        counts.counts.insert(GUEST_INSTRUCTIONS.to_owned(), counted);
        budget.compare(&counts).failures.len()
    };
    assert_eq!(failures_with(1_000_000, 1_020_000), 0);
    assert_eq!(failures_with(1_000_000, 1_020_001), 1);
    // Less is no failure.
    assert_eq!(failures_with(1_000_000, 500_000), 0);
    // Not even a budget of its own may exceed the limit.
    assert_eq!(failures_with(13_000_000, 13_000_000), 1);
}

#[test]
fn with_other_tools_only_the_limits_hold() {
    let mut budget = budget();
    budget.tools.rustc = "0.1".to_owned();
    budget.counts = BTreeMap::from([(GUEST_INSTRUCTIONS.to_owned(), 1)]);
    let mut counts = counts();
    let verdict = budget.compare(&counts);
    assert!(verdict.is_kept() && verdict.skipped.unwrap().contains("rustc 0.1"));
    counts
        .counts
        .insert(GUEST_INSTRUCTIONS.to_owned(), 12_000_001);
    assert!(!budget.compare(&counts).is_kept());
}

#[test]
fn what_is_no_budget_is_refused_with_its_place() {
    let good = renewed(&budget().limits, &counts(), &BTreeMap::new());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("budgets.toml");
    let read = |text: &str| {
        fs::write(&path, text).unwrap();
        Budget::read(&path).map_err(|error| error.to_string())
    };
    assert_eq!(read(&good).unwrap().limits, budget().limits);
    for (from, to, says) in [
        ("[limits]", "[limits", "line"),
        ("[limits]", "[limit]", "limit"),
        ("1_000_000", "-5", "line"),
        ("1_000_000", "\"many\"", "line"),
        ("1_000_000", "99999999999999999999", "line"),
        ("1_000_000", "0", "guest_instructions"),
        ("[phases]", "", "phases"),
        ("rustc = ", "rust = ", "rust"),
    ] {
        let bad = good.replacen(from, to, 1);
        assert_ne!(bad, good, "{from}");
        let error = read(&bad).unwrap_err();
        assert!(
            error.contains("budgets.toml") && error.contains(says),
            "{from} {to}: {error}"
        );
    }
    fs::remove_file(&path).unwrap();
    assert!(
        Budget::read(&path)
            .unwrap_err()
            .to_string()
            .contains("reading")
    );
}
