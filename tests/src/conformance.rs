//! What `make conformance` has built: containerd 2, crictl, critest, and a registry on loopback with stand-ins of the images
//! that critest pulls.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::containerd::Containerd;
use crate::{Host, root, wait};

/// The registries that the images' names are of.
const REGISTRIES: [&str; 3] = ["registry.k8s.io", "gcr.io", "k8s.gcr.io"];
/// No run of critest takes longer, even where guests are emulated.
const LIMIT: Duration = Duration::from_secs(3600);

/// The directory of the built programs: CELLA_CONFORMANCE, or what the cache has.
pub fn binaries() -> Option<PathBuf> {
    if let Some(dir) = std::env::var_os("CELLA_CONFORMANCE") {
        return Some(dir.into());
    }
    let mut script = Command::new(root().join("tests/conformance/build.sh"));
    let said = script.arg("--cached").output().ok()?;
    let dir = String::from_utf8(said.stdout).ok()?;
    let dir = dir.trim();
    (!dir.is_empty()).then(|| dir.into())
}

/// The registry, while it runs.
pub struct Registry {
    child: Child,
    address: String,
    /// The digest of the image `gcr.io/k8s-staging-cri-tools/test-image-digest`.
    pub digest: String,
}

impl Registry {
    /// Starts it.
    pub fn start(binaries: &Path) -> Self {
        let mut command = Command::new(binaries.join("images"));
        command.arg("/bin/busybox").arg(binaries.join("standin"));
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let stdout = child.stdout.take().unwrap();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        let (address, digest) = line.trim().split_once(' ').unwrap();
        Self {
            address: address.to_owned(),
            digest: digest.to_owned(),
            child,
        }
    }

    /// Makes the containerd of `host` pull everything from here.
    pub fn mirror(&self, host: &Host) {
        let url = format!("http://{}", self.address);
        for registry in REGISTRIES {
            let dir = host.path("hosts").join(registry);
            fs::create_dir_all(&dir).unwrap();
            let text = format!(
                "server = \"{url}\"\n[host.\"{url}\"]\ncapabilities = [\"pull\", \"resolve\"]\n"
            );
            fs::write(dir.join("hosts.toml"), text).unwrap();
        }
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What became of one spec.
pub struct Spec {
    /// Its full name.
    pub name: String,
    /// "passed", "failed", "skipped", ...
    pub state: String,
    /// Why it failed, or skipped itself; empty for one that was not chosen.
    pub message: String,
}

/// Runs critest with the runtime handler `handler`; answers what became of each spec.
pub fn critest(
    daemon: &Containerd,
    binaries: &Path,
    handler: &str,
    options: &[String],
) -> Vec<Spec> {
    let report = daemon.host.path("critest.json");
    let log = daemon.host.path("critest.log");
    let socket = format!("unix://{}", daemon.socket().display());
    let temporary = daemon.host.path("tmp");
    fs::create_dir_all(&temporary).unwrap();
    let segments = shared_memory();
    let mut command = Command::new(binaries.join("critest"));
    command
        .arg(format!("-runtime-endpoint={socket}"))
        .arg(format!("-image-endpoint={socket}"))
        .arg(format!("-runtime-handler={handler}"))
        .arg(format!("-ginkgo.json-report={}", report.display()))
        .args([
            "-test.timeout=1h",
            "-ginkgo.timeout=1h",
            "-ginkgo.no-color",
            "-config=/nonexistent",
        ])
        .args(options);
    daemon.host.on_this_host(&mut command);
    let mut child = command
        .env("TMPDIR", temporary)
        .stdout(fs::File::create(&log).unwrap())
        .stderr(fs::File::options().append(true).open(&log).unwrap())
        .spawn()
        .unwrap();
    wait(&mut child, LIMIT);
    remove_shared_memory(&segments);
    let keep = root().join(format!("target/critest-{handler}.log"));
    let _ = fs::copy(&log, keep);
    let text = fs::read_to_string(&report)
        .unwrap_or_else(|e| panic!("{e}: {}", fs::read_to_string(&log).unwrap_or_default()));
    let report: Value = serde_json::from_str(&text).unwrap();
    let specs = report[0]["SpecReports"].as_array().unwrap();
    let specs = specs.iter().filter(|spec| spec["LeafNodeType"] == "It");
    specs.map(read_spec).collect()
}

fn read_spec(spec: &Value) -> Spec {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let containers = spec["ContainerHierarchyTexts"].as_array();
    let mut name: Vec<_> = containers.into_iter().flatten().map(text).collect();
    name.push(text(&spec["LeafNodeText"]));
    Spec {
        name: name.join(" "),
        state: text(&spec["State"]),
        message: text(&spec["Failure"]["Message"]),
    }
}

/// `crictl` for this daemon.
pub fn crictl(daemon: &Containerd, binaries: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(binaries.join("crictl"));
    let socket = format!("unix://{}", daemon.socket().display());
    command
        .args(["-r", &socket, "-i", &socket, "-t", "180s"])
        .args(args);
    daemon.host.on_this_host(&mut command);
    command
}

/// The ids of the System V shared memory segments. critest makes some and leaves them.
fn shared_memory() -> Vec<String> {
    let text = fs::read_to_string("/proc/sysvipc/shm").unwrap_or_default();
    let lines = text.lines().skip(1);
    lines
        .filter_map(|line| Some(line.split_whitespace().nth(1)?.to_owned()))
        .collect()
}

fn remove_shared_memory(before: &[String]) {
    for id in shared_memory() {
        if !before.contains(&id) {
            let _ = Command::new("ipcrm").args(["-m", &id]).status();
        }
    }
}

/// The lines of tests/conformance/not-run.txt of a kind: regular expressions.
pub fn not_run(kind: &str) -> Vec<String> {
    let file = root().join("tests/conformance/not-run.txt");
    let text = fs::read_to_string(file).unwrap();
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .filter_map(|line| line.split_once(' '))
        .filter(|(of, _)| *of == kind)
        .map(|(_, pattern)| pattern.trim().to_owned())
        .collect()
}
