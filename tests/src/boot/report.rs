//! Everything that is counted, together; as JSON, and as a table to read.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::fs;
use std::path::Path;
use std::process::Command;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::budget::grouped;
use super::count::{Counter, check, said};
use super::{Error, Phase, container, phases};

/// The tools that the counts depend on besides the sources.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Tools {
    /// QEMU's version.
    pub qemu: String,
    /// The guest kernel's version.
    pub linux: String,
    /// What compiled the kernel.
    pub compiler: String,
    /// What compiled the agent.
    pub rustc: String,
}

impl Tools {
    fn ask(root: &Path) -> Result<Self, Error> {
        let config = root.join("target/guest/config");
        let config =
            fs::read_to_string(&config).map_err(Error::system("reading", config.display()))?;
        let after = |begin: &str, end: &str| {
            let line = config.lines().find_map(|line| line.strip_prefix(begin));
            line.and_then(|rest| rest.split(end).next())
                .unwrap_or("unknown")
                .to_owned()
        };
        let rustc = said(
            Command::new("rustc").arg("--version"),
            "asking for the compiler's version",
        )?;
        Ok(Self {
            qemu: check()?,
            linux: after("# Linux/x86 ", " "),
            compiler: after("CONFIG_CC_VERSION_TEXT=\"", "\""),
            rustc: rustc.split(' ').nth(1).unwrap_or("unknown").to_owned(),
        })
    }

    /// Its keys and values.
    pub fn lines(&self) -> [(&'static str, &str); 4] {
        [
            ("qemu", &self.qemu),
            ("linux", &self.linux),
            ("compiler", &self.compiler),
            ("rustc", &self.rustc),
        ]
    }
}

impl fmt::Display for Tools {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            qemu,
            linux,
            compiler,
            rustc,
        } = self;
        write!(f, "QEMU {qemu}, Linux {linux}, {compiler}, rustc {rustc}")
    }
}

/// What was counted.
#[derive(Clone, Debug)]
pub struct Counts {
    /// What with.
    pub tools: Tools,
    /// The boot's phases, up to the agent's readiness.
    pub phases: Vec<Phase>,
    /// By their names in the budget.
    pub counts: BTreeMap<String, u64>,
    /// The agent's steps after its readiness, in a guest with a container to make.
    pub steps: Vec<Phase>,
}

/// From reset to the agent's readiness.
pub const GUEST_INSTRUCTIONS: &str = "guest_instructions";

impl Counts {
    /// Boots the guest that is built in `root`'s target directory twice: as it is, and with a container.
    ///
    /// # Errors
    /// [`Error::Missing`] where that cannot be done; others where it failed.
    pub fn measure(root: &Path) -> Result<Self, Error> {
        let counter = Counter::new(root)?;
        let symbols = counter.symbols()?;
        let initrd = root.join("target/guest/initrd.cpio");
        let boot = counter.boot(&initrd, phases::marks(&symbols), false)?;
        let with_container = container::archive(&initrd, counter.dir())?;
        let started = counter.boot(&with_container, [], false)?;
        let steps = phases::steps(&started.marks);
        let cost = |names: [&str; 2], of: fn(&Phase) -> u64| -> Result<u64, Error> {
            let missing = |name| Error::Count(format!("the agent did not come to its step {name}"));
            names.iter().try_fold(0, |sum, name| {
                steps
                    .get(name)
                    .map(|step| sum + of(step))
                    .ok_or_else(|| missing(name))
            })
        };
        let all = |phase: &Phase| phase.instructions;
        let kernel = |phase: &Phase| phase.kernel;
        let first = ["created", "started"];
        let second = ["second-created", "second-started"];
        let counts = [
            (GUEST_INSTRUCTIONS, boot.ready),
            ("container_start_instructions", cost(first, all)?),
            ("container_start_kernel_instructions", cost(first, kernel)?),
            ("second_container_start_instructions", cost(second, all)?),
            (
                "second_container_start_kernel_instructions",
                cost(second, kernel)?,
            ),
        ];
        Ok(Self {
            tools: Tools::ask(root)?,
            phases: phases::phases(&boot.marks, &symbols)?,
            counts: counts.map(|(name, count)| (name.to_owned(), count)).into(),
            steps: in_order(&started.marks, &steps),
        })
    }

    /// From reset to the agent's readiness, by QEMU's own count.
    pub fn guest_instructions(&self) -> u64 {
        self.counts
            .get(GUEST_INSTRUCTIONS)
            .copied()
            .unwrap_or(u64::MAX)
    }

    /// For target/bench/boot.json.
    pub fn to_json(&self) -> Value {
        let mut value = json!({ "tools": self.tools, "phases": self.phases, "steps": self.steps });
        if let Value::Object(all) = &mut value {
            all.extend(
                self.counts
                    .iter()
                    .map(|(name, count)| (name.clone(), (*count).into())),
            );
        }
        value
    }

    /// To read.
    pub fn table(&self) -> String {
        let total: u64 = self.phases.iter().map(|phase| phase.instructions).sum();
        let mut text = format!(
            "Guest instructions from reset to the agent's readiness: {}\n",
            grouped(self.guest_instructions())
        );
        for phase in &self.phases {
            let percent = phase.instructions as f64 * 100.0 / total.max(1) as f64;
            // Writing to a String cannot fail.
            let _ = writeln!(
                text,
                "  {:<36} {:>12} {percent:>5.1} %",
                phase.name,
                grouped(phase.instructions)
            );
        }
        text.push_str("The agent's steps after that, and the part of them in kernel mode\n");
        for step in &self.steps {
            let _ = writeln!(
                text,
                "  {:<36} {:>12} {:>12}",
                step.name,
                grouped(step.instructions),
                grouped(step.kernel)
            );
        }
        for (name, count) in &self.counts {
            let _ = writeln!(text, "{name:<46} {:>12}", grouped(*count));
        }
        text
    }
}

fn in_order(marks: &[super::count::Mark], steps: &BTreeMap<&str, Phase>) -> Vec<Phase> {
    marks
        .iter()
        .filter_map(|mark| steps.get(mark.name.as_str()).cloned())
        .collect()
}
