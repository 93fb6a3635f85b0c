//! What the tests stand on: a child process in namespaces of its own, a busybox root, a spec, and a look at what is
//! left afterwards.

use std::ffi::CString;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};

pub(super) use super::super::terminal::resize;
pub(super) use super::super::{
    Birth, Container, Error, Kind, PidHolder, Result, Runtime, RuntimeConfig, Shared,
    SharedNamespaces, Status, Stdio,
};

/// A test's result inside its sandbox.
pub(super) type Outcome = std::result::Result<(), Box<dyn std::error::Error>>;

/// The cgroup2 hierarchy of this machine, if it has one.
fn cgroup_root() -> Option<PathBuf> {
    ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .map(PathBuf::from)
        .into_iter()
        .find(|path| path.join("cgroup.controllers").exists())
}

/// A place for containers.
pub(super) struct Sandbox {
    pub runtime: Runtime,
    pub dir: PathBuf,
    cgroup: PathBuf,
}

/// A container with its output, and its terminal if it has one.
pub(super) struct Boxed {
    pub container: Container,
    pub terminal: Option<OwnedFd>,
    output: Option<OwnedFd>,
}

/// Names the sandbox's directory to the process that shall run a test in it.
const INSIDE: &str = "CELLA_TEST_SANDBOX";
/// A test that takes longer hangs.
const LIMIT_SECONDS: u32 = 120;

/// Runs `test` as pid 1 of new mount and pid namespaces, as the agent is, after a check that this machine can;
/// afterwards nothing of it may be left. The test binary executes itself for this one test: a child forked from
/// among the harness's threads could find a lock held for ever.
pub(super) fn in_sandbox<F: FnOnce(&Sandbox) -> Outcome>(test: F) {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: not root");
        return;
    }
    let Some(cgroups) = cgroup_root() else {
        println!("SKIPPED: no cgroup2 hierarchy");
        return;
    };
    let Some(busybox) = ["/bin/busybox", "/usr/bin/busybox"]
        .into_iter()
        .map(Path::new)
        .find(|path| path.exists())
    else {
        println!("SKIPPED: no busybox (package busybox-static)");
        return;
    };
    if let Some(dir) = std::env::var_os(INSIDE) {
        std::process::exit(inside(Path::new(&dir), &cgroups, test));
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(
        dir.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .unwrap();
    populate(&dir.path().join("root"), busybox);
    let closure = std::any::type_name::<F>();
    let name = closure
        .trim_end_matches("::{{closure}}")
        .split_once("::")
        .unwrap()
        .1;
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture", "--test-threads=1"])
        .env(INSIDE, dir.path())
        .output()
        .unwrap();
    let cgroup = cgroups.join(parent_of(dir.path()));
    let left = remove_cgroups(&cgroup);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "in the sandbox: {}: {said}",
        output.status
    );
    assert!(left.is_empty(), "cgroups are left: {left:?}");
    assert!(
        !cgroup.exists(),
        "the cgroup {} is in use",
        cgroup.display()
    );
}

/// The parent of a sandbox's cgroups.
fn parent_of(dir: &Path) -> String {
    let name = dir.file_name().unwrap().to_str().unwrap();
    format!("cella-test-{}", name.trim_start_matches('.'))
}

/// Removes a test's cgroups; names those that the test should have removed.
fn remove_cgroups(cgroup: &Path) -> Vec<PathBuf> {
    let left: Vec<_> = std::fs::read_dir(cgroup)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect();
    for path in &left {
        let _ = std::fs::write(path.join("cgroup.kill"), "1");
        std::thread::sleep(std::time::Duration::from_millis(100));
        let _ = std::fs::remove_dir(path);
    }
    let _ = std::fs::remove_dir(cgroup);
    left
}

/// In the process for one test: runs it in a child, and returns the child's exit status.
fn inside(dir: &Path, cgroups: &Path, test: impl FnOnce(&Sandbox) -> Outcome) -> i32 {
    // SAFETY: plain system calls; the process has one thread, so that its child may do anything.
    unsafe {
        libc::alarm(LIMIT_SECONDS);
        assert_eq!(libc::unshare(libc::CLONE_NEWNS | libc::CLONE_NEWPID), 0);
        let child = libc::fork();
        assert!(child >= 0);
        if child == 0 {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            let run = std::panic::AssertUnwindSafe(|| as_agent(dir, cgroups, test));
            libc::_exit(std::panic::catch_unwind(run).unwrap_or(101));
        }
        let mut status = 0;
        libc::waitpid(child, &raw mut status, 0);
        if libc::WIFEXITED(status) {
            libc::WEXITSTATUS(status)
        } else {
            102
        }
    }
}

fn as_agent(dir: &Path, cgroups: &Path, test: impl FnOnce(&Sandbox) -> Outcome) -> i32 {
    isolate();
    let parent = parent_of(dir);
    let cgroup = cgroups.join(&parent);
    let config = RuntimeConfig {
        cgroup_root: cgroups.into(),
        cgroup_parent: parent,
    };
    let runtime = Runtime::new(config, Arc::default()).unwrap();
    let mounts = mounts_now();
    let result = test(&Sandbox {
        runtime,
        dir: dir.into(),
        cgroup,
    });
    assert_eq!(mounts_now(), mounts, "mounts are left");
    match result {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("{error}: {:?}", error.source());
            1
        }
    }
}

/// Private mounts and a /proc of this pid namespace.
fn isolate() {
    super::super::sys::mount(c"", c"/", c"", libc::MS_REC | libc::MS_PRIVATE, c"").unwrap();
    super::super::sys::mount(c"proc", c"/proc", c"proc", 0, c"").unwrap();
}

fn mounts_now() -> Vec<String> {
    let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    text.lines()
        .map(|line| line.split(' ').nth(4).unwrap_or("").to_owned())
        .collect()
}

fn populate(root: &Path, busybox: &Path) {
    for directory in ["bin", "etc", "tmp", "proc", "dev", "sys", "root"] {
        std::fs::create_dir_all(root.join(directory)).unwrap();
    }
    std::fs::copy(busybox, root.join("bin/busybox")).unwrap();
    for applet in [
        "sh", "cat", "echo", "ls", "id", "sleep", "true", "false", "pwd", "env", "hostname",
        "mkdir", "touch", "stat", "readlink", "grep", "tty", "stty", "kill", "ps", "chmod", "test",
        "mknod", "dd", "ulimit", "umask", "wc", "head", "sort", "tr", "seq", "nohup",
    ] {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    std::fs::write(root.join("etc/plain"), "not a program\n").unwrap();
}

/// A spec as `docker run` would make it, with this command.
pub(super) fn spec(args: &[&str]) -> Value {
    let caps = [
        "CAP_CHOWN",
        "CAP_KILL",
        "CAP_SETUID",
        "CAP_SETGID",
        "CAP_NET_BIND_SERVICE",
    ];
    json!({
        "ociVersion": "1.2.0",
        "root": {"path": "", "readonly": false},
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": args,
            "env": ["PATH=/bin", "HOME=/root"],
            "cwd": "/",
            "capabilities": {"bounding": caps, "effective": caps, "permitted": caps},
            "noNewPrivileges": true,
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
        ],
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}],
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/sys/firmware", "/proc/nonexistent"],
            "readonlyPaths": ["/proc/sys", "/proc/irq", "/proc/nonexistent"],
        },
    })
}

impl Sandbox {
    /// The container's root filesystem.
    pub(super) fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    /// This machine's copy of the container's cgroup.
    pub(super) fn cgroup(&self, id: &str) -> PathBuf {
        self.cgroup.join(id)
    }

    pub(super) fn create(&self, id: &str, spec: &Value) -> Result<Boxed> {
        self.create_in(id, spec, &SharedNamespaces::default())
    }

    pub(super) fn create_in(
        &self,
        id: &str,
        spec: &Value,
        shared: &SharedNamespaces,
    ) -> Result<Boxed> {
        let mut spec = spec.clone();
        if spec["root"]["path"] == "" {
            spec["root"]["path"] = json!(self.root());
        }
        let spec = serde_json::from_value(spec).unwrap();
        let (output, stdout) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let stderr = stdout.try_clone().unwrap();
        let stdio = Stdio {
            stdout: Some(stdout),
            stderr: Some(stderr),
            ..Stdio::default()
        };
        let created = self
            .runtime
            .create(id, &spec, stdio, shared, &Birth::default())?;
        Ok(Boxed {
            container: created.container,
            terminal: created.terminal,
            output: Some(output),
        })
    }

    /// Runs a container to its end: what it wrote, and its exit status.
    pub(super) fn run(&self, spec: &Value) -> Result<(String, i32)> {
        let mut boxed = self.create("run", spec)?;
        if let Err(error) = boxed.container.start() {
            boxed.container.delete().unwrap();
            return Err(error);
        }
        let output = boxed.output();
        let status = boxed.wait();
        boxed.delete().unwrap();
        Ok((output, status))
    }
}

impl Boxed {
    /// Everything that the container writes, to its end.
    pub(super) fn output(&mut self) -> String {
        read_all(self.output.take().unwrap())
    }

    /// Its exit status, 128 and more for a death by signal.
    pub(super) fn wait(&mut self) -> i32 {
        let status = reap(self.container.pidfd());
        self.container.set_stopped();
        status
    }

    pub(super) fn delete(self) -> Outcome {
        self.container.delete().map_err(Into::into)
    }

    /// Runs a process in it to its end.
    pub(super) fn exec(&self, process: Value) -> Result<(String, i32)> {
        let process = serde_json::from_value(process).unwrap();
        let (output, stdout) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let stderr = stdout.try_clone().unwrap();
        let stdio = Stdio {
            stdout: Some(stdout),
            stderr: Some(stderr),
            ..Stdio::default()
        };
        let executed = self.container.exec(&process, stdio, &Birth::default())?;
        let output = read_all(output);
        Ok((output, reap(executed.process.pidfd())))
    }
}

/// Reads until the end, which on a terminal is EIO.
pub(super) fn read_all(fd: OwnedFd) -> String {
    let mut bytes = Vec::new();
    let mut buffer = [0u8; 4096];
    let mut file = std::fs::File::from(fd);
    loop {
        match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => bytes.extend_from_slice(&buffer[..n]),
            Err(e) if e.raw_os_error() == Some(libc::EIO) => break,
            Err(e) => panic!("reading a container's output: {e}"),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Waits for a child, as OCI has exit statuses.
pub(super) fn reap(pidfd: std::os::fd::BorrowedFd<'_>) -> i32 {
    let status = rustix::process::waitid(
        rustix::process::WaitId::PidFd(pidfd),
        rustix::process::WaitIdOptions::EXITED,
    )
    .unwrap()
    .unwrap();
    status
        .exit_status()
        .unwrap_or_else(|| 128 + status.terminating_signal().unwrap())
}

/// A namespace of a process, as a comparable name.
pub(super) fn namespace_of(pid: u32, name: &str) -> String {
    std::fs::read_link(format!("/proc/{pid}/ns/{name}"))
        .unwrap()
        .to_str()
        .unwrap()
        .to_owned()
}

/// A C string of a path.
pub(super) fn c_path(path: &Path) -> CString {
    CString::new(path.to_str().unwrap()).unwrap()
}

/// Mounts a tmpfs in the sandbox, for as long as `f` runs.
pub(super) fn with_tmpfs<T>(path: &Path, f: impl FnOnce() -> T) -> T {
    std::fs::create_dir_all(path).unwrap();
    let target = c_path(path);
    super::super::sys::mount(c"tmpfs", &target, c"tmpfs", 0, c"").unwrap();
    let result = f();
    super::super::sys::detach(&target).unwrap();
    result
}
