//! What the end-to-end suites share: a host of their own (run and library directories in a temporary place), the `cella`
//! command on it, an image, and the check that nothing is left.
//!
//! The suites test what `make` built in `target/`; they build nothing themselves.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test support"
)]

pub mod boot;
pub mod conformance;
pub mod containerd;
pub mod image;
pub mod netns;
pub mod peers;

use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// No single command of a suite takes longer than this, even on KVM without hardware.
const LIMIT: Duration = Duration::from_secs(180);

/// What a command said and how it ended.
#[derive(Debug)]
pub struct Said {
    /// Its exit status; 128+N if signal N ended the command itself.
    pub status: i32,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Said {
    /// Panics unless the command ended with `status`.
    #[track_caller]
    pub fn expect_status(self, status: i32) -> Self {
        assert_eq!(self.status, status, "{self:#?}");
        self
    }

    /// Panics unless this is one of Cella's own failures: status 125, one line on stderr that has every one of `words`.
    #[track_caller]
    pub fn expect_failure(self, words: &[&str]) {
        assert_eq!(self.status, 125, "{self:#?}");
        assert_eq!(self.stderr.trim_end().lines().count(), 1, "{self:#?}");
        for word in words {
            assert!(self.stderr.contains(word), "no '{word}' in {self:#?}");
        }
    }
}

/// The top of the work tree.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_path_buf()
}

/// The built `cella`.
pub fn cella_binary() -> PathBuf {
    root().join("target/release/cella")
}

/// The built VMM, guest kernel and guest image.
pub fn libexec() -> PathBuf {
    root().join("target/libexec")
}

/// What the machine lacks for a sandbox on `hypervisor`, if it lacks anything.
pub fn missing_for(hypervisor: &str) -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("root".into());
    }
    match hypervisor {
        "kvm" => kvm_is_missing().or_else(not_built),
        _ => qemu_is_missing().or_else(not_built),
    }
}

fn qemu_is_missing() -> Option<String> {
    let asked = Command::new("qemu-system-x86_64").arg("--version").output();
    let error = asked.err()?;
    Some(format!("QEMU (qemu-system-x86: {error})"))
}

fn kvm_is_missing() -> Option<String> {
    if let Err(error) = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
    {
        return Some(format!("a usable /dev/kvm ({error})"));
    }
    None
}

/// What `make build` has not built, if anything.
pub fn not_built() -> Option<String> {
    let files = [
        cella_binary(),
        libexec().join("cella-vmm"),
        libexec().join("vmlinux"),
        libexec().join("initrd.cpio"),
        PathBuf::from("/bin/busybox"),
    ];
    files
        .iter()
        .find(|file| !file.exists())
        .map(|file| format!("{} (make build)", file.display()))
}

/// A host's directories for one test. Dropping it stops its pods; [`Host::assert_clean`] checks that nothing was left.
pub struct Host {
    dir: tempfile::TempDir,
}

impl Default for Host {
    fn default() -> Self {
        Self::on("auto")
    }
}

impl Host {
    /// An empty one that chooses its hypervisor by itself.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty one whose sandboxes run on `hypervisor`, unless its commands say otherwise. They are booted: a template
    /// that is built in the background would outlive the test.
    pub fn on(hypervisor: &str) -> Self {
        let host = Self::with_templates(hypervisor);
        host.configure("template = false\n");
        host
    }

    /// One whose sandboxes are cloned from templates where `hypervisor` can save machines.
    pub fn with_templates(hypervisor: &str) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("cella-test-")
            .tempdir()
            .unwrap();
        let host = Self { dir };
        host.configure(&format!("hypervisor = \"{hypervisor}\"\n"));
        host
    }

    /// Adds lines to the host's configuration.
    pub fn configure(&self, lines: &str) {
        let mut config = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.path("config.toml"))
            .unwrap();
        config.write_all(lines.as_bytes()).unwrap();
    }

    /// A place for the test's own files.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `cella` with these arguments on this host.
    pub fn command<S: AsRef<OsStr>>(&self, args: &[S]) -> Command {
        let mut command = Command::new(cella_binary());
        self.on_this_host(command.args(args));
        command
    }

    /// Makes a command's `cella` work on this host.
    pub fn on_this_host(&self, command: &mut Command) {
        command
            .env("CELLA_RUN_DIR", self.path("run"))
            .env("CELLA_LIB_DIR", self.path("lib"))
            .env("CELLA_LIBEXEC_DIR", libexec())
            .env("CELLA_CONFIG", self.path("config.toml"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
    }

    /// Runs `cella` to its end.
    pub fn cella(&self, args: &[&str]) -> Said {
        finish(self.command(args).spawn().unwrap(), &[])
    }

    /// Runs `cella` to its end with `input` as its standard input.
    pub fn cella_with_input(&self, args: &[&str], input: &[u8]) -> Said {
        let child = self.command(args).stdin(Stdio::piped()).spawn().unwrap();
        finish(child, input)
    }

    /// An OCI layout of the host's busybox, made once a host: its reference.
    pub fn busybox(&self) -> String {
        let dir = self.path("busybox");
        if !dir.exists() {
            let script = root().join("tests/busybox-image.sh");
            let made = Command::new(script).arg(&dir).status().unwrap();
            assert!(made.success());
        }
        format!("oci:{}", dir.display())
    }

    /// The processes that name this host's directories on their command line.
    pub fn processes(&self) -> Vec<(u32, String)> {
        let needle = self.dir.path().to_str().unwrap().to_owned();
        processes(|line| line.contains(&needle))
    }

    /// Panics if a process, a mount or a file of a sandbox is left on this host.
    #[track_caller]
    pub fn assert_clean(&self) {
        // A VMM whose control socket has closed ends within moments.
        let deadline = Instant::now() + Duration::from_secs(2);
        while !self.processes().is_empty() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(self.processes(), [], "processes are left");
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let ours = self.dir.path().to_str().unwrap();
        let left: Vec<_> = mounts.lines().filter(|line| line.contains(ours)).collect();
        assert!(left.is_empty(), "mounts are left: {left:#?}");
        for dir in ["run", "lib/containers", "lib/scratch"] {
            let left: Vec<_> = fs::read_dir(self.path(dir))
                .map(|entries| entries.map(|entry| entry.unwrap().path()).collect())
                .unwrap_or_default();
            assert!(left.is_empty(), "files are left: {left:?}");
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for (pid, _) in self.processes() {
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
        }
        let _ = self.command(&["gc"]).status();
    }
}

/// Waits for a command that was given `input`. One that hangs is killed and fails its test.
#[track_caller]
pub fn finish(mut child: Child, input: &[u8]) -> Said {
    let input = input.to_vec();
    let stdin = child.stdin.take();
    let feeding = std::thread::spawn(move || {
        if let Some(mut stdin) = stdin {
            let _ = stdin.write_all(&input);
        }
    });
    let stdout = read_all(child.stdout.take());
    let stderr = read_all(child.stderr.take());
    let status = wait(&mut child, LIMIT);
    let _ = feeding.join();
    Said {
        status,
        stdout: stdout.join().unwrap(),
        stderr: stderr.join().unwrap(),
    }
}

/// The exit status of a child that ends within `limit`.
#[track_caller]
pub fn wait(child: &mut Child, limit: Duration) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status
                .code()
                .unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            panic!("a command did not end within {limit:?}");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn read_all(from: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut from) = from {
            let _ = from.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// The processes whose command line `wanted` says yes to.
pub fn processes(wanted: impl Fn(&str) -> bool) -> Vec<(u32, String)> {
    let own = std::process::id();
    let entries = fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| *pid != own)
        .filter_map(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            wanted(&line).then_some((pid, line))
        })
        .collect()
}

/// Prints why a suite cannot run here; `make test` counts these lines.
pub fn skip(missing: &str) {
    println!("SKIPPED: {missing}");
}
