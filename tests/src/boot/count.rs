//! One counted boot.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::Error;

const QEMU: &str = "qemu-system-x86_64";
/// The version whose counts the budget has; other versions emulate other processors.
pub const QEMU_VERSION: &str = "7.2";
/// A counted boot takes two seconds on an idle machine.
const PATIENCE: Duration = Duration::from_secs(180);
/// What the agent enters at each of its steps.
pub const STEP: &str = "__x64_sys_membarrier";

/// A function was entered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Its name in System.map, or the agent's step.
    pub name: String,
    /// Instructions before that.
    pub all: u64,
    /// Those of them in user mode.
    pub user: u64,
    /// Instructions by function since the last point (a mark whose name was given with a `!`), without callees.
    pub hot: Vec<(u64, String)>,
}

/// What a boot told.
#[derive(Debug)]
pub struct Counted {
    /// In the order of their occurrence.
    pub marks: Vec<Mark>,
    /// The time stamp counter where the agent would call the host: instructions by QEMU's own count.
    pub ready: u64,
}

/// What this machine lacks for counting, if anything.
///
/// # Errors
/// [`Error::Missing`].
pub fn check() -> Result<String, Error> {
    let asked = Command::new(QEMU).arg("--version").output();
    let said = asked.map_err(|error| Error::Missing(format!("QEMU (qemu-system-x86: {error})")))?;
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    let version = said
        .split_whitespace()
        .skip_while(|word| *word != "version")
        .nth(1);
    let version = version.unwrap_or("unknown").to_owned();
    if !version.starts_with(&format!("{QEMU_VERSION}.")) {
        return Err(Error::Missing(format!(
            "QEMU {QEMU_VERSION}, whose counts the budget has (here is {version})"
        )));
    }
    Ok(version)
}

/// What counts.
pub struct Counter {
    dir: tempfile::TempDir,
    plugin: PathBuf,
    kernel: PathBuf,
    map: PathBuf,
    command_line: String,
}

impl Counter {
    /// Makes the plugin ready for the built guest in `root`'s target/guest.
    ///
    /// # Errors
    /// No QEMU, no compiler, nothing built.
    pub fn new(root: &Path) -> Result<Self, Error> {
        check()?;
        let guest = root.join("target/guest");
        for file in ["vmlinux", "System.map", "initrd.cpio"] {
            if !guest.join(file).exists() {
                let file = guest.join(file);
                return Err(Error::Missing(format!("{} (make build)", file.display())));
            }
        }
        let dir = tempfile::tempdir().map_err(Error::system("making", "a directory"))?;
        let plugin = dir.path().join("count.so");
        let source = root.join("tests/boot/count.c");
        let mut compile = Command::new("gcc");
        compile.args([
            "-std=gnu11",
            "-O2",
            "-Wall",
            "-Werror",
            "-shared",
            "-fPIC",
            "-fvisibility=hidden",
            "-o",
        ]);
        said(
            compile.arg(&plugin).arg(&source),
            "compiling the counting plugin",
        )?;
        let mut line = Command::new(root.join("guest-kernel/cmdline.sh"));
        let line = said(line.arg("qemu"), "asking for the guest's command line")?;
        Ok(Self {
            plugin,
            kernel: guest.join("vmlinux"),
            map: guest.join("System.map"),
            // The VMM's, but for what the platform needs: what would be measured by waiting is told instead.
            command_line: format!(
                "{} tsc_early_khz=1000000 nolapic_timer 8250.nr_uarts=1 console=ttyS0 cella_icount=1",
                line.trim()
            ),
            dir,
        })
    }

    /// The kernel's symbols.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn symbols(&self) -> Result<String, Error> {
        fs::read_to_string(&self.map).map_err(Error::system("reading", self.map.display()))
    }

    /// Boots `initrd` and notes when each of `marks` is entered. The agent's steps are always marked; with `hot`, with
    /// the functions that the instructions before them were in.
    ///
    /// # Errors
    /// The guest did not come to its end.
    pub fn boot<'a>(
        &self,
        initrd: &Path,
        marks: impl IntoIterator<Item = &'a str>,
        hot: bool,
    ) -> Result<Counted, Error> {
        let names = self.dir.path().join("marks");
        let mut list: String = marks.into_iter().flat_map(|name| [name, "\n"]).collect();
        list.push_str(if hot { "!" } else { "" });
        list.push_str(STEP);
        list.push('\n');
        fs::write(&names, list).map_err(Error::system("writing", names.display()))?;
        let (out, console) = (
            self.dir.path().join("counts"),
            self.dir.path().join("console"),
        );
        let mut qemu = Command::new(QEMU);
        qemu.args([
            "-M",
            "microvm,acpi=off,x-option-roms=off",
            "-accel",
            "tcg,tb-size=64",
        ])
        .args(["-cpu", "max,-erms,-fsrm", "-m", "128", "-smp", "1"])
        .args([
            "-icount",
            "shift=0,sleep=off",
            "-rtc",
            "base=2026-01-01,clock=vm",
            "-seed",
            "1",
        ])
        .args([
            "-display",
            "none",
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
        ])
        .arg("-serial")
        .arg(format!("file:{}", console.display()))
        .arg("-kernel")
        .arg(&self.kernel)
        .arg("-initrd")
        .arg(initrd)
        .args(["-append", &self.command_line])
        .arg("-plugin")
        .arg(format!(
            "file={},map={},marks={},out={}",
            self.plugin.display(),
            self.map.display(),
            names.display(),
            out.display()
        ));
        said(&mut qemu, "a boot under QEMU")?;
        let console =
            fs::read_to_string(&console).map_err(Error::system("reading", "the console"))?;
        let counts = fs::read_to_string(&out).map_err(Error::system("reading", "the counts"))?;
        let (ready, steps) = agent_said(&console)?;
        let mut marks = parse(&counts)?;
        name_steps(&mut marks, &steps)?;
        Ok(Counted { marks, ready })
    }

    /// A place for the caller's files, gone with the counter.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }
}

/// Runs a program to its end; what it says on standard output.
pub(super) fn said(command: &mut Command, what: &'static str) -> Result<String, Error> {
    let program = command.get_program().to_string_lossy().into_owned();
    let failed = |source| Error::System {
        doing: what,
        what: format!("with {program}"),
        source,
    };
    let mut child = match command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
    {
        Ok(child) => child,
        Err(error) => return Err(failed(error)),
    };
    // None of these programs says more than a pipe holds before it ends.
    let deadline = Instant::now() + PATIENCE;
    loop {
        match child.try_wait().map_err(failed)? {
            Some(_) => break,
            None if Instant::now() > deadline => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(failed(io::ErrorKind::TimedOut.into()));
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    }
    let output = child.wait_with_output().map_err(failed)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(Error::Program {
            what,
            said: format!("{}: {}", output.status, said.trim()),
        });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Feeds `input` to a program; what it says on standard output, as bytes.
pub(super) fn piped(
    command: &mut Command,
    input: &[u8],
    what: &'static str,
) -> Result<Vec<u8>, Error> {
    let failed = Error::system(what, "by a pipe");
    let mut run = || {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(input)?;
        }
        child.wait_with_output()
    };
    let output = run().map_err(failed)?;
    if !output.status.success() {
        return Err(Error::Program {
            what,
            said: output.status.to_string(),
        });
    }
    Ok(output.stdout)
}

/// The tick of the agent's readiness and the names of its steps, from the guest's console.
fn agent_said(console: &str) -> Result<(u64, Vec<String>), Error> {
    let after = |word: &str| {
        console.lines().find_map(|line| {
            line.trim()
                .strip_prefix("cella-agent: ")?
                .strip_prefix(word)
        })
    };
    let ready = after("ready tsc=").and_then(|rest| rest.split(' ').next()?.parse().ok());
    let steps = after("steps ").map(|rest| rest.split(' ').map(str::to_owned).collect());
    let other = console
        .lines()
        .filter_map(|line| line.trim().strip_prefix("cella-agent: "))
        .find(|line| !line.starts_with("ready tsc=") && !line.starts_with("steps "));
    match (ready, steps, other) {
        (Some(ready), Some(steps), None) => Ok((ready, steps)),
        (_, _, Some(complaint)) => Err(Error::Count(format!("the agent says: {complaint}"))),
        _ => Err(Error::Count(format!(
            "the guest did not reach the agent; its console: {console:?}"
        ))),
    }
}

/// The plugin's output.
fn parse(counts: &str) -> Result<Vec<Mark>, Error> {
    let mut marks = Vec::new();
    let mut hot = Vec::new();
    let mut ended = false;
    for line in counts.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let number = |word: &str| {
            word.parse::<u64>()
                .map_err(|_| Error::Count(format!("no number in {line:?}")))
        };
        match words[..] {
            ["hot", count, name] => hot.push((number(count)?, name.to_owned())),
            ["mark", name, all, user] => marks.push(Mark {
                name: name.to_owned(),
                all: number(all)?,
                user: number(user)?,
                hot: std::mem::take(&mut hot),
            }),
            ["end", _, _] => ended = true,
            _ => return Err(Error::Count(format!("the plugin wrote {line:?}"))),
        }
    }
    if !ended {
        return Err(Error::Count(
            "the plugin did not come to its end".to_owned(),
        ));
    }
    Ok(marks)
}

/// Puts the names of the agent's steps for the function by which it marks them.
fn name_steps(marks: &mut [Mark], steps: &[String]) -> Result<(), Error> {
    let mut names = steps.iter();
    let mut count = 0usize;
    for mark in marks.iter_mut().filter(|mark| mark.name == STEP) {
        count += 1;
        if let Some(name) = names.next() {
            mark.name.clone_from(name);
        }
    }
    if count != steps.len() {
        return Err(Error::Count(format!(
            "the agent marked {count} steps and speaks of {}",
            steps.len()
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_plugins_output_and_the_agents_words_go_together() {
        let mut marks = parse(
            "hot 70 (unknown)\nhot 30 a\nmark start_kernel 100 0\nmark __x64_sys_membarrier 200 20\nend 300 40\n",
        )
        .unwrap();
        assert_eq!(
            marks[0].hot,
            [(70, "(unknown)".to_owned()), (30, "a".to_owned())]
        );
        let (ready, steps) =
            agent_said("x\r\ncella-agent: ready tsc=199 entry=150\r\ncella-agent: steps ready\r\n")
                .unwrap();
        assert_eq!(ready, 199);
        name_steps(&mut marks, &steps).unwrap();
        assert_eq!(
            (marks[1].name.as_str(), marks[1].all, marks[1].user),
            ("ready", 200, 20)
        );
    }

    #[test]
    fn what_does_not_add_up_is_an_error() {
        for counts in [
            "",
            "mark a 1 0\n",
            "mark a x 0\nend 1 0\n",
            "word\nend 1 0\n",
        ] {
            assert!(parse(counts).is_err(), "{counts:?}");
        }
        for console in [
            "",
            "cella-agent: ready tsc=1 entry=1\n",
            "cella-agent: ready tsc=x entry=1\ncella-agent: steps ready\n",
            "cella-agent: ready tsc=1 entry=1\ncella-agent: steps ready\ncella-agent: preparing the guest: no\n",
        ] {
            assert!(agent_said(console).is_err(), "{console:?}");
        }
        let mut marks = parse("mark __x64_sys_membarrier 200 20\nend 300 40\n").unwrap();
        assert!(name_steps(&mut marks, &["ready".to_owned(), "prepared".to_owned()]).is_err());
    }
}
