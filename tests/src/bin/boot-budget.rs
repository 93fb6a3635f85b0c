//! What a boot and a container's start cost, compared with their budget: `make bench-boot`.
//!
//!     boot-budget              prints, writes target/bench/boot.json, fails if a budget is exceeded
//!     boot-budget --renew      writes tests/budgets.toml and docs/boot.svg anew from what was counted
//!     boot-budget --profile    the kernel's functions that the boot and each step of the agent spend their time in

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::ExitCode;

use cella_tests::boot::budget::{self, Budget, Verdict, grouped};
use cella_tests::boot::count::Counter;
use cella_tests::boot::exits::Exits;
use cella_tests::boot::report::Counts;
use cella_tests::boot::{Error, container, picture};
use serde_json::{Value, json};

/// Functions shown of each step.
const SHOWN: usize = 25;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let root = cella_tests::root();
    let done = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => bench(&root, false),
        ["--renew"] => bench(&root, true),
        ["--profile"] => profile(&root).map(|()| true),
        _ => {
            eprintln!("usage: boot-budget [--renew | --profile]");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("boot-budget: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(cause) => format!("{error}: {}", chain(cause)),
        None => error.to_string(),
    }
}

/// What there is to measure; None with a line said where the machine lacks something.
fn unless_missing<T>(measured: Result<T, Error>) -> Result<Option<T>, Error> {
    match measured {
        Ok(measured) => Ok(Some(measured)),
        Err(Error::Missing(what)) => {
            println!("SKIPPED: {what}");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Whether the budgets are kept.
fn bench(root: &Path, renew: bool) -> Result<bool, Error> {
    let counts = unless_missing(Counts::measure(root))?;
    let exits = unless_missing(Exits::measure(root))?;
    if let Some(counts) = &counts {
        print!("{}", counts.table());
    }
    if let Some(exits) = &exits {
        println!(
            "VM exits from the first guest instruction to a sandbox that is set up: {}",
            grouped(exits.total())
        );
        for (reason, count) in &exits.exits {
            println!("  {reason:<36} {:>12}", grouped(*count));
        }
    }
    write_json(root, counts.as_ref(), exits.as_ref())?;
    let path = root.join("tests/budgets.toml");
    let old = Budget::read(&path)?;
    if renew {
        return renewed(root, &old, counts.as_ref(), exits.as_ref()).map(|()| true);
    }
    let verdicts = [
        counts.map(|counts| old.compare(&counts)),
        exits.map(|exits| old.compare_exits(&exits.exits)),
    ];
    // All of them are said.
    let kept: Vec<bool> = verdicts.iter().flatten().map(said).collect();
    Ok(!kept.contains(&false))
}

fn said(verdict: &Verdict) -> bool {
    if let Some(reason) = &verdict.skipped {
        println!("SKIPPED: {reason}");
    }
    for remark in &verdict.remarks {
        println!("{remark}");
    }
    for failure in &verdict.failures {
        eprintln!("OVER BUDGET: {failure}");
    }
    verdict.is_kept()
}

fn write_json(root: &Path, counts: Option<&Counts>, exits: Option<&Exits>) -> Result<(), Error> {
    let mut all = counts.map_or_else(|| json!({}), Counts::to_json);
    if let (Value::Object(all), Some(exits)) = (&mut all, exits) {
        all.insert("vm_exits".to_owned(), exits.total().into());
        all.insert("exits".to_owned(), json!(exits.exits));
        all.insert("timeline".to_owned(), exits.timeline.clone());
    }
    let dir = root.join("target/bench");
    let path = dir.join("boot.json");
    fs::create_dir_all(&dir).map_err(Error::system("making", dir.display()))?;
    fs::write(&path, format!("{all:#}\n")).map_err(Error::system("writing", path.display()))
}

fn renewed(
    root: &Path,
    old: &Budget,
    counts: Option<&Counts>,
    exits: Option<&Exits>,
) -> Result<(), Error> {
    let counts =
        counts.ok_or_else(|| Error::Missing("counts to renew the budget with".to_owned()))?;
    // Where there is no KVM, what was counted where there is one stays.
    let exits: &BTreeMap<String, u64> = exits.map_or(&old.vm_exits, |exits| &exits.exits);
    let files = [
        (
            "tests/budgets.toml",
            budget::renewed(&old.limits, counts, exits),
        ),
        ("docs/boot.svg", picture::svg(&counts.phases)),
    ];
    for (name, content) in files {
        let path = root.join(name);
        fs::write(&path, content).map_err(Error::system("writing", path.display()))?;
        println!("wrote {name}");
    }
    Ok(())
}

fn profile(root: &Path) -> Result<(), Error> {
    let counter = Counter::new(root)?;
    let initrd = container::archive(&root.join("target/guest/initrd.cpio"), counter.dir())?;
    for mut mark in counter.boot(&initrd, [], true)?.marks {
        mark.hot.sort_unstable_by(|left, right| right.cmp(left));
        let total: u64 = mark.hot.iter().map(|(count, _)| count).sum();
        println!("Up to {}: {} instructions", mark.name, grouped(total));
        for (count, function) in mark.hot.iter().take(SHOWN) {
            println!("  {:>12} {function}", grouped(*count));
        }
    }
    Ok(())
}
