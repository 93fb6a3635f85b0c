//! What is done for the sandboxes to come, by processes of their own and behind everything else that the host has to do:
//! a template built once, after the sandbox that missed it; a pool of idle clones kept.
//!
//! Each of our programs can be that process. Its order is on its command line, so that whoever looks at the host's
//! processes sees what it works on.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};

use serde::{Deserialize, Serialize};

use super::{Shape, build};
use crate::config::Config;
use crate::hypervisor::kvm::Kvm;
use crate::paths::Paths;
use crate::pool::keeper;
use crate::sandbox::{Sandbox, TemplateUse};

/// The first argument of a program that is given an order, which is the second.
const WORD: &str = "in-background";
/// The lowest of priorities, nice(2).
const NICE: i32 = 19;

/// What is to be done, and where.
#[derive(Debug, Serialize, Deserialize)]
enum Order {
    /// The template of a shape, all templates to be kept within so many bytes.
    BuildTemplate {
        paths: Paths,
        shape: Shape,
        limit: u64,
    },
    /// The pool that the configuration asks for.
    KeepPool { paths: Paths },
}

/// Has others do for the sandboxes to come what was missing for this one, which is there. Nobody waits for them; that they
/// cannot be started is no failure of this one.
pub fn provide(paths: &Paths, config: &Config, sandbox: &Sandbox) {
    let has_templates = match sandbox.template_use() {
        Some(TemplateUse::Wanted(shape) | TemplateUse::Grown(shape)) => {
            start(&Order::BuildTemplate {
                paths: paths.clone(),
                shape: shape.clone(),
                limit: config.template_limit,
            });
            true
        }
        Some(TemplateUse::Cloned | TemplateUse::Claimed) => true,
        Some(TemplateUse::Unused) | None => false,
    };
    if has_templates && config.pool > 0 && !keeper::is_there(paths) {
        start(&Order::KeepPool {
            paths: paths.clone(),
        });
    }
}

fn start(order: &Order) {
    if let Err(error) = spawn(order) {
        tracing::warn!("starting a process in the background: {error}");
    }
}

fn spawn(order: &Order) -> io::Result<()> {
    let mut command = Command::new("/proc/self/exe");
    command
        .args([WORD, &serde_json::to_string(order)?])
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    // SAFETY: setsid is async-signal-safe.
    unsafe {
        command.pre_exec(|| Ok(rustix::process::setsid().map(drop)?));
    }
    let mut child = command.spawn()?;
    // Its exit status is nobody's, but somebody has to take it.
    std::thread::Builder::new()
        .name("background".to_owned())
        .spawn(move || child.wait())
        .map(drop)
}

/// Does what this program was started for, if `arguments` (the program's name among them) are an order. To be called
/// first thing.
pub fn obey(arguments: impl Iterator<Item = OsString>) -> Option<ExitCode> {
    let mut arguments = arguments.skip(1);
    if arguments.next()? != WORD {
        return None;
    }
    let order = arguments.next().and_then(|order| order.into_string().ok());
    let order = order.and_then(|order| serde_json::from_str(&order).ok());
    Some(match order.map(carry_out) {
        Some(Ok(())) => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

fn carry_out(order: Order) -> Result<(), super::Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| super::Error::Guest(format!("making the event loop: {e}")))?;
    match order {
        Order::BuildTemplate {
            paths,
            shape,
            limit,
        } => {
            // Its VMM inherits it. Without, it is only less polite.
            let _ = rustix::process::nice(NICE);
            runtime.block_on(build(&paths, &Kvm, &shape, limit))?;
        }
        // At the priority of those who claim: a VMM keeps what it was started with.
        Order::KeepPool { paths } => runtime.block_on(keeper::keep(paths))?,
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_order_is_obeyed() {
        let obey = |words: &[&str]| obey(words.iter().map(OsString::from)).is_some();
        assert!(!obey(&["cella"]));
        assert!(!obey(&["cella", "run", WORD]));
        // One that is not understood is carried out badly, but it is no other command.
        assert!(obey(&["cella", WORD]));
        assert!(obey(&["cella", WORD, "{}"]));
    }
}
