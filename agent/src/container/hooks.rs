//! OCI hooks: programs of the guest, or of the container, run at points of a container's life.

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use oci_spec::runtime as oci;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};

use super::sys;
use super::{Error, Result};

/// For a hook that names no timeout: the agent serves nobody else meanwhile.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);
/// How much of what a failed hook says goes into the error.
const MAX_MESSAGE: u64 = 1024;

/// Where hooks run.
#[derive(Debug)]
pub(super) enum Place<'a> {
    /// In the guest.
    Runtime,
    /// In the namespaces (CLONE_NEW*) and the root of the init behind the pidfd. Before pivot_root that root is the
    /// guest's, seen from the container's mount namespace: where createContainer hooks are to be found.
    Container {
        pidfd: BorrowedFd<'a>,
        namespaces: i32,
        root: OwnedFd,
    },
}

impl<'a> Place<'a> {
    /// Of an init.
    pub(super) fn of(pid: u32, pidfd: BorrowedFd<'a>, namespaces: i32) -> Result<Self> {
        let path = format!("/proc/{pid}/root");
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(&path, flags, Mode::empty()).map_err(|e| Error::Process {
            step: format!("opening {path}"),
            source: e.into(),
        })?;
        Ok(Self::Container {
            pidfd,
            namespaces,
            root,
        })
    }
}

/// The state that hooks read on their standard input.
#[derive(Clone, Copy, Debug)]
pub(super) struct HookState<'a> {
    pub id: &'a str,
    /// The OCI word: creating, created, running, stopped.
    pub status: &'a str,
    /// 0 once it is gone.
    pub pid: u32,
    pub bundle: &'a std::path::Path,
    pub annotations: Option<&'a std::collections::HashMap<String, String>>,
}

impl HookState<'_> {
    fn to_json(self) -> Vec<u8> {
        let mut state = serde_json::json!({
            "ociVersion": "1.2.0",
            "id": self.id,
            "status": self.status,
            "bundle": self.bundle,
        });
        if let Some(object) = state.as_object_mut() {
            if self.pid != 0 {
                object.insert("pid".into(), self.pid.into());
            }
            if let Some(annotations) = self.annotations {
                object.insert("annotations".into(), serde_json::json!(annotations));
            }
        }
        state.to_string().into_bytes()
    }
}

/// Whether there is any.
pub(super) fn any(hooks: Option<&Vec<oci::Hook>>) -> bool {
    hooks.is_some_and(|hooks| !hooks.is_empty())
}

/// Runs hooks in order, until one fails.
pub(super) fn run(
    name: &'static str,
    hooks: Option<&Vec<oci::Hook>>,
    place: Place<'_>,
    state: HookState<'_>,
) -> Result<()> {
    for hook in hooks.into_iter().flatten() {
        run_one(name, hook, &place, state)?;
    }
    Ok(())
}

fn run_one(
    name: &'static str,
    hook: &oci::Hook,
    place: &Place<'_>,
    state: HookState<'_>,
) -> Result<()> {
    let fail = |reason: String, timed_out| Error::Hook {
        name,
        path: hook.path().clone(),
        reason,
        timed_out,
    };
    if !hook.path().is_absolute() {
        return Err(fail("its path is not absolute".into(), false));
    }
    let timeout = match hook.timeout() {
        None => DEFAULT_TIMEOUT,
        Some(seconds) => u64::try_from(seconds)
            .ok()
            .filter(|seconds| *seconds > 0)
            .map(Duration::from_secs)
            .ok_or_else(|| fail(format!("its timeout {seconds} is not above 0"), false))?,
    };
    let mut command = command(hook, place);
    let mut child = command
        .spawn()
        .map_err(|e| fail(format!("cannot be started: {e}"), false))?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that does not read its input is no failure. The state fits into the pipe.
        let _ = stdin.write_all(&state.to_json());
    }
    let Some(status) = wait(&mut child, timeout).map_err(|e| fail(e.to_string(), false))? else {
        return Err(fail(
            format!("did not end within {} s", timeout.as_secs()),
            true,
        ));
    };
    if status.success() {
        return Ok(());
    }
    let mut message = String::new();
    if let Some(stderr) = child.stderr.take() {
        // What it says is an extra; a process it left behind must not hold the agent.
        let _ = rustix::io::ioctl_fionbio(&stderr, true);
        let _ = stderr.take(MAX_MESSAGE).read_to_string(&mut message);
    }
    Err(fail(format!("{status}: {}", message.trim()), false))
}

fn command(hook: &oci::Hook, place: &Place<'_>) -> Command {
    let mut command = Command::new(hook.path());
    let args = hook.args().as_deref().unwrap_or_default();
    if let Some((arg0, rest)) = args.split_first() {
        command.arg0(arg0).args(rest);
    }
    command.env_clear();
    command.envs(
        hook.env()
            .iter()
            .flatten()
            .filter_map(|entry| entry.split_once('=')),
    );
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    if let Place::Container {
        pidfd,
        namespaces,
        root,
    } = place
    {
        let (pidfd, namespaces, root) = (pidfd.as_raw_fd(), *namespaces, root.as_raw_fd());
        let enter = move || {
            sys::setns(pidfd, namespaces)?;
            sys::fchdir(root)?;
            sys::chroot(c".")?;
            Ok(())
        };
        // SAFETY: the closure makes system calls only; the descriptors outlive the spawn.
        unsafe { command.pre_exec(enter) };
    }
    command
}

/// Waits for the hook; None if it ran out of time, in which case it has been killed.
fn wait(child: &mut Child, timeout: Duration) -> std::io::Result<Option<std::process::ExitStatus>> {
    let pid = i32::try_from(child.id())
        .ok()
        .and_then(rustix::process::Pid::from_raw)
        .ok_or(std::io::ErrorKind::InvalidInput)?;
    let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
    let deadline = Instant::now().checked_add(timeout);
    loop {
        let left = deadline.map_or(timeout, |d| d.saturating_duration_since(Instant::now()));
        let timespec = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        match poll(
            &mut [PollFd::new(&pidfd.as_fd(), PollFlags::IN)],
            Some(&timespec),
        ) {
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
            Ok(0) => {
                child.kill()?;
                child.wait()?;
                return Ok(None);
            }
            Ok(_) => return child.wait().map(Some),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hooks(json: &str) -> Vec<oci::Hook> {
        serde_json::from_str(json).unwrap()
    }

    fn run_all(json: &str) -> Result<()> {
        let state = HookState {
            id: "c1",
            status: "creating",
            pid: 42,
            bundle: std::path::Path::new("/b"),
            annotations: None,
        };
        run("prestart", Some(&hooks(json)), Place::Runtime, state)
    }

    #[test]
    fn the_state_arrives_and_the_environment_is_the_hooks() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        run_all(&format!(
            r#"[{{"path":"/bin/sh","args":["sh","-c","cat > {0}; echo \"$A-$HOME\" >> {0}"],
            "env":["A=1","PATH=/bin:/usr/bin"]}}]"#,
            out.display()
        ))
        .unwrap();
        let text = std::fs::read_to_string(out).unwrap();
        let (state, rest) = text.rsplit_once('}').unwrap();
        assert_eq!(rest.trim(), "1-");
        let state: serde_json::Value = serde_json::from_str(&format!("{state}}}")).unwrap();
        assert_eq!(state["id"], "c1");
        assert_eq!(state["pid"], 42);
        assert_eq!(state["status"], "creating");
    }

    #[test]
    fn failures_say_why() {
        let error = run_all(r#"[{"path":"/bin/sh","args":["sh","-c","echo broken >&2; exit 3"]}]"#)
            .unwrap_err();
        assert!(
            error.to_string().contains("broken") && error.to_string().contains('3'),
            "{error}"
        );
        assert!(run_all(r#"[{"path":"/no/such/hook"}]"#).is_err());
        assert!(run_all(r#"[{"path":"relative"}]"#).is_err());
        assert!(run_all(r#"[{"path":"/bin/true","timeout":0}]"#).is_err());
    }

    #[test]
    fn a_hook_that_hangs_is_killed() {
        let started = Instant::now();
        let error =
            run_all(r#"[{"path":"/bin/sleep","args":["sleep","60"],"timeout":1}]"#).unwrap_err();
        assert!(
            matches!(
                error,
                Error::Hook {
                    timed_out: true,
                    ..
                }
            ),
            "{error}"
        );
        assert!(started.elapsed() < Duration::from_secs(20));
    }
}
