//! OCI hooks: programs of the guest, or of the container, run at points of a container's life.

use std::ffi::CString;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, Instant};

use oci_spec::runtime as oci;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::pipe::PipeFlags;

use super::command::{StringArray, c_string};
use super::init::fail;
use super::report::{At, ChildResult, Failure, Message, Step};
use super::runtime::{receive, socket_pair};
use super::spawn::{self, Child};
use super::{Error, Result, sys};
use crate::reaper::{Ending, Reaper};

/// For a hook that names no timeout.
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

/// What the hooks of one point of a container's life have in common.
#[derive(Clone, Copy, Debug)]
pub(super) struct HookRun<'a> {
    pub reaper: &'a Reaper,
    /// The init that the hooks prepare: once it is dead, nobody needs them.
    pub init: Option<&'a Child>,
    pub state: HookState<'a>,
}

impl HookRun<'_> {
    /// Runs hooks in order, until one fails.
    pub(super) fn all(
        &self,
        name: &'static str,
        hooks: Option<&Vec<oci::Hook>>,
        place: &Place<'_>,
    ) -> Result<()> {
        let mut hooks = hooks.into_iter().flatten();
        hooks.try_for_each(|hook| self.one(name, hook, place))
    }

    /// Runs one hook.
    pub(super) fn one(
        &self,
        name: &'static str,
        hook: &oci::Hook,
        place: &Place<'_>,
    ) -> Result<()> {
        let fail = |reason: String, timed_out| Error::Hook {
            name,
            path: hook.path().clone(),
            reason,
            timed_out,
        };
        let timeout = timeout(hook).map_err(|reason| fail(reason, false))?;
        let mut running = HookPlan::new(hook, place)
            .and_then(|plan| Running::start(plan, self.reaper))
            .map_err(|error| fail(format!("cannot be started: {}", whole(&error)), false))?;
        running.tell(&self.state.to_json());
        match running.wait(self.init, timeout) {
            Some(How::Ended) => {}
            ended => {
                running.child.kill_and_reap(self.reaper);
                return Err(match ended {
                    Some(_) => Error::Died,
                    None => fail(format!("did not end within {} s", timeout.as_secs()), true),
                });
            }
        }
        match running.outcome(self.reaper) {
            Ok(()) => Ok(()),
            Err(reason) => Err(fail(reason, false)),
        }
    }
}

/// The hook's limit, or why it cannot be run at all.
fn timeout(hook: &oci::Hook) -> Result<Duration, String> {
    if !hook.path().is_absolute() {
        return Err("its path is not absolute".into());
    }
    match hook.timeout() {
        None => Ok(DEFAULT_TIMEOUT),
        Some(seconds) => u64::try_from(seconds)
            .ok()
            .filter(|seconds| *seconds > 0)
            .map(Duration::from_secs)
            .ok_or_else(|| format!("its timeout {seconds} is not above 0")),
    }
}

/// An error with its cause.
fn whole(error: &Error) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

/// Everything a hook's process needs, made before it exists.
#[derive(Debug)]
struct HookPlan<'a> {
    path: CString,
    argv: StringArray,
    envp: StringArray,
    place: &'a Place<'a>,
}

impl<'a> HookPlan<'a> {
    fn new(hook: &oci::Hook, place: &'a Place<'a>) -> Result<Self> {
        let path = hook.path().as_os_str();
        let named = [path.to_string_lossy().into_owned()];
        let args = match hook.args().as_deref() {
            Some(args) if !args.is_empty() => args,
            _ => &named,
        };
        let env: Vec<String> = hook
            .env()
            .iter()
            .flatten()
            .filter(|entry| entry.contains('='))
            .cloned()
            .collect();
        Ok(Self {
            path: c_string("hooks[].path", path.as_bytes())?,
            argv: StringArray::new("hooks[].args", args)?,
            envp: StringArray::new("hooks[].env", &env)?,
            place,
        })
    }

    /// In the child, with `streams` for its 0, 1 and 2: becomes the hook. Returns never.
    fn run(&self, streams: [RawFd; 3], keep: &[RawFd], socket: RawFd) -> ! {
        let failure = match self.prepare(streams, keep) {
            Ok(()) => Failure {
                step: Step::Execute,
                index: 0,
                errno: sys::execve(&self.path, self.argv.pointers(), self.envp.pointers()),
            },
            Err(failure) => failure,
        };
        fail(socket, failure)
    }

    fn prepare(&self, streams: [RawFd; 3], keep: &[RawFd]) -> ChildResult {
        for (target, stream) in (0..).zip(streams) {
            sys::dup_to(stream, target, false).at(Step::Stdio)?;
        }
        spawn::close_others(keep).at(Step::Prepare)?;
        if let Place::Container {
            pidfd,
            namespaces,
            root,
        } = self.place
        {
            sys::setns(pidfd.as_raw_fd(), *namespaces).at(Step::JoinNamespace)?;
            sys::fchdir(root.as_raw_fd()).at(Step::Pivot)?;
            sys::chroot(c".").at(Step::Pivot)?;
        }
        sys::reset_signals().at(Step::Attributes)
    }
}

/// A hook's process.
#[derive(Debug)]
struct Running {
    child: std::sync::Arc<Child>,
    ending: Ending,
    /// Says why the hook could not be executed.
    socket: OwnedFd,
    stdin: Option<OwnedFd>,
    stderr: OwnedFd,
}

/// What a wait for a hook came to.
enum How {
    Ended,
    /// It still runs, but the init that it is for does not.
    InitDied,
}

impl Running {
    fn start(plan: HookPlan<'_>, reaper: &Reaper) -> Result<Self> {
        let failed = |step: &str, source: rustix::io::Errno| Error::Process {
            step: step.into(),
            source: source.into(),
        };
        let pipe =
            || rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(|e| failed("making a pipe", e));
        let (stdin, stdin_writer) = pipe()?;
        let (stderr_reader, stderr) = pipe()?;
        let null = rustix::fs::open(c"/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .map_err(|e| failed("opening /dev/null", e))?;
        let (socket, child_socket) = socket_pair()?;
        let streams = [stdin.as_raw_fd(), null.as_raw_fd(), stderr.as_raw_fd()];
        let number = child_socket.as_raw_fd();
        let mut keep = vec![number];
        if let Place::Container { pidfd, root, .. } = plan.place {
            keep.extend([pidfd.as_raw_fd(), root.as_raw_fd()]);
        }
        keep.sort_unstable();
        let (child, ending) = spawn::clone(reaper, 0, None, || plan.run(streams, &keep, number))?;
        Ok(Self {
            child,
            ending,
            socket,
            stdin: Some(stdin_writer),
            stderr: stderr_reader,
        })
    }

    /// Gives the hook its input, and the input's end.
    fn tell(&mut self, state: &[u8]) {
        if let Some(stdin) = self.stdin.take() {
            // One that does not read its input is no failure. The state fits into the pipe.
            let _ = std::fs::File::from(stdin).write_all(state);
        }
    }

    /// Waits for the hook, as long as `init` lives; None if it ran out of time.
    fn wait(&self, init: Option<&Child>, timeout: Duration) -> Option<How> {
        let deadline = Instant::now().checked_add(timeout);
        let init = init.map_or(self.child.pidfd.as_fd(), |init| init.pidfd.as_fd());
        loop {
            let left = deadline.map_or(timeout, |d| d.saturating_duration_since(Instant::now()));
            let timespec = Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(left.subsec_nanos()),
            };
            let mut ends = [
                PollFd::new(&self.child.pidfd, PollFlags::IN),
                PollFd::new(&init, PollFlags::IN),
            ];
            match poll(&mut ends, Some(&timespec)) {
                Ok(0) => return None,
                Ok(_) => {
                    let [hook, _] = ends;
                    return Some(match hook.revents().is_empty() {
                        false => How::Ended,
                        true => How::InitDied,
                    });
                }
                // An interruption; nothing else can happen to a poll of two live descriptors.
                Err(_) => {}
            }
        }
    }

    /// How a hook that has ended did.
    fn outcome(mut self, reaper: &Reaper) -> Result<(), String> {
        self.child.reap(reaper);
        let status = self.ending.try_recv().map_err(|e| e.to_string())?;
        if status == 0 {
            return Ok(());
        }
        // What it says is there already; another child that was born meanwhile may have the socket for a moment.
        let _ = rustix::io::ioctl_fionbio(&self.socket, true);
        if let Ok((Message::Failed(failure), _)) = receive(&self.socket) {
            let cause = std::io::Error::from(failure.errno);
            return Err(format!("cannot be started: {cause}"));
        }
        let mut message = String::new();
        // What it says is an extra; a process it left behind must not hold the agent.
        let _ = rustix::io::ioctl_fionbio(&self.stderr, true);
        let stderr = std::fs::File::from(self.stderr);
        let _ = stderr.take(MAX_MESSAGE).read_to_string(&mut message);
        Err(format!("exit status {status}: {}", message.trim()))
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
        let run = HookRun {
            reaper: &Reaper::default(),
            init: None,
            state,
        };
        run.all("prestart", Some(&hooks(json)), &Place::Runtime)
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
