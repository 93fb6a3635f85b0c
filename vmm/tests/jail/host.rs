//! The host's side: directories for the jail, the probe's processes, and what must be gone afterwards.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use rustix::mount::{MountPropagationFlags, UnmountFlags};
use rustix::pipe::{PipeFlags, pipe_with};

/// Isolates this process from the machine's mounts, and makes it the reaper of all that it starts.
pub fn prepare() {
    // SAFETY: no file descriptor table is unshared.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }.unwrap();
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).unwrap();
    rustix::process::set_child_subreaper(rustix::process::Pid::from_raw(1)).unwrap();
}

/// The mounts that this process sees.
pub fn mounts() -> BTreeSet<String> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
    text.lines().map(str::to_owned).collect()
}

/// What is there and was not `before`: mounts, and processes that are still our children.
pub fn leaks(before: &BTreeSet<String>) -> Vec<String> {
    let mut left: Vec<String> = mounts().difference(before).cloned().collect();
    let mut status = 0;
    loop {
        // SAFETY: `status` is a valid place for the result.
        match unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) } {
            -1 => return left,
            0 => {
                left.push("a process that still runs".to_owned());
                return left;
            }
            pid => left.push(format!("process {pid}, not waited for")),
        }
    }
}

/// A directory to share and one of sockets, both as the host library makes them; gone when dropped.
pub struct Directories {
    directory: tempfile::TempDir,
}

impl Directories {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let this = Self { directory };
        let share = this.share();
        fs::create_dir(&share).unwrap();
        fs::create_dir(this.sockets()).unwrap();
        fs::set_permissions(this.sockets(), fs::Permissions::from_mode(0o711)).unwrap();
        rustix::mount::mount_bind(&share, &share).unwrap();
        rustix::mount::mount_change(&share, MountPropagationFlags::SHARED).unwrap();
        let files = this.files();
        fs::create_dir(&files).unwrap();
        rustix::mount::mount_bind(&files, &files).unwrap();
        fs::write(files.join("secret"), "of the guest").unwrap();
        fs::create_dir(files.join("private")).unwrap();
        chown(files.join("private"), Some(77), Some(77)).unwrap();
        fs::set_permissions(files.join("private"), fs::Permissions::from_mode(0o700)).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", files.join("to-passwd")).unwrap();
        std::os::unix::fs::symlink("../../../../../..", files.join("up")).unwrap();
        fs::copy("/bin/true", files.join("program")).unwrap();
        this
    }

    /// What is mounted in the shared directory, as a container's root file system is.
    pub fn files(&self) -> PathBuf {
        self.share().join("files")
    }

    pub fn share(&self) -> PathBuf {
        self.directory.path().join("share")
    }

    pub fn sockets(&self) -> PathBuf {
        self.directory.path().join("sockets")
    }

    pub fn orders(&self) -> Vec<String> {
        vec![
            format!("share={}", self.share().display()),
            format!("sockets={}", self.sockets().display()),
        ]
    }
}

impl Drop for Directories {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.share(), UnmountFlags::DETACH);
    }
}

/// A probe in its jail.
pub struct Probe {
    /// The process id of the jailed process, if it got that far.
    pub pid: Option<i32>,
    /// The exit status of the process that was started.
    pub outer: Option<i32>,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    stderr: std::process::ChildStderr,
    said: String,
    ended: bool,
}

/// How a probe ended.
#[derive(Debug)]
pub struct Ended {
    pub signal: Option<i32>,
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Probe {
    /// Starts `scenario`; returns when the process that was started has ended, which is when the jail is closed.
    pub fn start(scenario: &str, orders: &[String], environment: &[(&str, &str)]) -> Self {
        let (pid_reader, pid_writer) = pipe_with(PipeFlags::empty()).unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["probe", scenario])
            .args(orders)
            .arg(format!("pid_fd={}", pid_writer.as_raw_fd()))
            .env_clear()
            .envs(environment.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child: Child = command.spawn().unwrap();
        drop(pid_writer);
        let mut pid = String::new();
        fs::File::from(pid_reader).read_to_string(&mut pid).unwrap();
        let outer = child.wait_without_closing();
        Self {
            pid: pid.trim().parse().ok(),
            outer,
            stdin: child.stdin.take().unwrap(),
            stdout: BufReader::new(child.stdout.take().unwrap()),
            stderr: child.stderr.take().unwrap(),
            said: String::new(),
            ended: false,
        }
    }

    /// Waits for a line of the probe.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// Lets the probe go on.
    pub fn go(&mut self) {
        self.stdin.write_all(b"\n").unwrap();
    }

    /// Waits for its end.
    pub fn end(mut self) -> Ended {
        let (mut stdout, mut stderr) = (String::new(), String::new());
        self.stdout.read_to_string(&mut stdout).unwrap();
        self.stderr.read_to_string(&mut stderr).unwrap();
        let status = self.wait();
        let exited = libc::WIFEXITED(status);
        Ended {
            signal: (!exited).then(|| libc::WTERMSIG(status)),
            code: exited.then(|| libc::WEXITSTATUS(status)),
            stdout,
            stderr,
        }
    }

    /// What the probe says on stderr until it ends, for one that ended before it was jailed.
    pub fn stderr(&mut self) -> String {
        self.ended = self.outer != Some(0);
        self.stderr.read_to_string(&mut self.said).unwrap();
        self.said.clone()
    }

    fn wait(&mut self) -> i32 {
        self.ended = true;
        let mut status = 0;
        let pid = self.pid.expect("the probe entered its jail");
        // SAFETY: waits for a child of ours; `status` is a valid place for the result.
        let waited = unsafe { libc::waitpid(pid, &raw mut status, 0) };
        // It is our child only if the process between us has ended, as it must have.
        assert_eq!(waited, pid, "the jailed process is our child");
        status
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        if let (false, Some(pid)) = (self.ended, self.pid) {
            // SAFETY: our child, not waited for yet; no memory operands but null.
            unsafe {
                libc::kill(pid, libc::SIGKILL);
                libc::waitpid(pid, std::ptr::null_mut(), 0);
            }
        }
    }
}

trait WaitWithoutClosing {
    fn wait_without_closing(&mut self) -> Option<i32>;
}

impl WaitWithoutClosing for Child {
    /// `Child::wait` closes the child's standard input, which the jailed process still reads.
    fn wait_without_closing(&mut self) -> Option<i32> {
        let stdin = self.stdin.take();
        let status = self.wait().unwrap();
        self.stdin = stdin;
        status.code()
    }
}
