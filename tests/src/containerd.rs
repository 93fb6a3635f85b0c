//! A containerd of a test's own: its directories, sockets and configuration are in the test's place, and its runtime is the
//! shim that `make` built.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::{Host, Said, finish, root};

/// The image that every test uses.
pub const IMAGE: &str = "docker.io/library/busybox:latest";
/// The runtime's name.
pub const RUNTIME: &str = "io.containerd.cella.v2";
/// How long something that is on its way may take to be seen.
const SOON: Duration = Duration::from_secs(30);

/// A running containerd.
pub struct Containerd {
    /// Its directories, and the sandboxes'.
    pub host: Host,
    /// The daemon's binary; its `ctr` and shims are beside it.
    program: PathBuf,
    child: Child,
    /// Shims' sockets and pods' network namespaces that others had before.
    before: Vec<PathBuf>,
    crashed: bool,
}

/// A client of a daemon's CRI service.
pub struct Cri {
    socket: PathBuf,
}

impl Cri {
    /// Calls a method; an error has gRPC's code and message.
    pub fn call(&self, method: &str, request: &Value) -> Result<Value, String> {
        let mut command = Command::new(client());
        command
            .arg(&self.socket)
            .arg(method)
            .arg(request.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let said = finish(command.spawn().unwrap(), &[]);
        match said.status {
            0 => Ok(serde_json::from_str(&said.stdout).unwrap()),
            _ => Err(said.stderr),
        }
    }
}

/// What the machine lacks for containerd, if it lacks anything.
pub fn containerd_is_missing() -> Option<String> {
    for program in [containerd(), beside(&containerd(), "ctr")] {
        if let Err(error) = Command::new(&program).arg("--version").output() {
            return Some(format!("{} ({error})", program.display()));
        }
    }
    let shim = root().join("target/release/containerd-shim-cella-v2");
    (!shim.exists()).then(|| format!("{} (make build)", shim.display()))
}

/// What the machine lacks for pods, if it lacks anything.
pub fn cri_is_missing() -> Option<String> {
    if !client().exists() {
        return Some(format!(
            "{} (make cri-client, which needs Go)",
            client().display()
        ));
    }
    let bridge = Path::new("/usr/lib/cni/bridge");
    (!bridge.exists()).then(|| "CNI plugins (containernetworking-plugins)".to_owned())
}

/// The daemon: CELLA_TEST_CONTAINERD names another than the one on PATH; its `ctr` is beside it.
pub fn containerd() -> PathBuf {
    std::env::var_os("CELLA_TEST_CONTAINERD").map_or_else(|| "containerd".into(), PathBuf::from)
}

fn beside(program: &Path, name: &str) -> PathBuf {
    match program.parent() {
        Some(dir) if dir != Path::new("") => dir.join(name),
        _ => name.into(),
    }
}

fn client() -> PathBuf {
    root().join("target/cri")
}

impl Containerd {
    /// Starts one whose sandboxes run on `hypervisor`, with the image in it.
    pub fn start(hypervisor: &str) -> Self {
        Self::start_on(Host::on(hypervisor), &containerd())
    }

    /// Starts `program` on a host, with the image in it.
    pub fn start_on(host: Host, program: &Path) -> Self {
        write_configuration(&host);
        let child = spawn(&host, program);
        let daemon = Self {
            host,
            program: program.to_path_buf(),
            child,
            before: [sockets(), namespaces()].concat(),
            crashed: false,
        };
        daemon.wait_ready();
        let image = daemon.host.busybox();
        let dir = image.trim_start_matches("oci:");
        let archive = daemon.host.path("busybox.tar");
        let made = Command::new("tar")
            .args(["-C", dir, "-cf"])
            .arg(&archive)
            .arg(".")
            .status();
        assert!(made.unwrap().success());
        let archive = archive.to_str().unwrap();
        let name = IMAGE.trim_end_matches(":latest");
        for namespace in ["default", "k8s.io"] {
            // The older one has no other way than this, the newer one wants it said.
            let mut import = vec!["-n", namespace, "images", "import", "--base-name", name];
            if daemon.major() >= 2 {
                import.push("--local");
            }
            import.push(archive);
            daemon.ctr(&import).expect_status(0);
        }
        daemon
    }

    /// The first number of its version.
    pub fn major(&self) -> u32 {
        let said = Command::new(&self.program)
            .arg("--version")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&said.stdout).into_owned();
        // "containerd github.com/containerd/containerd v2.2.9 ...", Debian's without the v.
        let version = text
            .split_whitespace()
            .nth(2)
            .unwrap()
            .trim_start_matches('v');
        version.split('.').next().unwrap().parse().unwrap()
    }

    fn wait_ready(&self) {
        self.eventually("containerd answers", || self.ctr(&["version"]).status == 0);
    }

    /// Its gRPC socket.
    pub fn socket(&self) -> PathBuf {
        self.host.path("c.sock")
    }

    /// A `ctr` command for this daemon.
    pub fn ctr_command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(beside(&self.program, "ctr"));
        command.arg("--address").arg(self.socket()).args(args);
        // The newer one's, of this host's cgroups, would be in what containers say.
        command.env("CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS", "1");
        self.host.on_this_host(&mut command);
        command
    }

    /// Runs `ctr` to its end.
    pub fn ctr(&self, args: &[&str]) -> Said {
        finish(self.ctr_command(args).spawn().unwrap(), &[])
    }

    /// Runs `ctr` to its end with `input` as its standard input.
    pub fn ctr_with_input(&self, args: &[&str], input: &[u8]) -> Said {
        let child = self
            .ctr_command(args)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        finish(child, input)
    }

    /// Runs a container of its own sandbox to its end.
    pub fn run(&self, options: &[&str], id: &str, command: &[&str]) -> Said {
        let mut args = vec!["run", "--rm", "--runtime", RUNTIME];
        args.extend(options);
        args.extend([IMAGE, id]);
        args.extend(command);
        self.ctr(&args)
    }

    /// Leaves a container running whose output goes to the file `ID.log` of the test's place.
    pub fn run_detached(&self, id: &str, command: &[&str]) {
        let log = format!("file://{}", self.host.path(&format!("{id}.log")).display());
        let mut args = vec![
            "run",
            "-d",
            "--log-uri",
            &log,
            "--runtime",
            RUNTIME,
            IMAGE,
            id,
        ];
        args.extend(command);
        self.ctr(&args).expect_status(0);
    }

    /// The task's status as `ctr task ls` has it.
    pub fn status(&self, id: &str) -> Option<String> {
        let list = self.ctr(&["task", "ls"]).expect_status(0).stdout;
        let mut lines = list
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>());
        lines
            .find(|words| words.first() == Some(&id))
            .and_then(|words| words.get(2).map(ToString::to_string))
    }

    /// Removes an ended task and its container.
    pub fn remove(&self, id: &str) {
        // Its status is the task's.
        self.ctr(&["task", "rm", id]);
        self.ctr(&["container", "rm", id]).expect_status(0);
    }

    /// Calls a CRI method.
    pub fn try_cri(&self, method: &str, request: &Value) -> Result<Value, String> {
        self.cri_client().call(method, request)
    }

    /// A client that does not care whether the daemon lives.
    pub fn cri_client(&self) -> Cri {
        Cri {
            socket: self.socket(),
        }
    }

    /// Calls a CRI method, which must succeed.
    #[track_caller]
    pub fn cri(&self, method: &str, request: &Value) -> Value {
        self.try_cri(method, request)
            .unwrap_or_else(|error| panic!("{method}: {error}"))
    }

    /// Kills the daemon, as a crash would, and starts it again.
    pub fn crash(&mut self) {
        self.crashed = true;
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.child = spawn(&self.host, &self.program);
        self.wait_ready();
    }

    /// The shims of this daemon.
    pub fn shims(&self) -> Vec<u32> {
        self.pids("containerd-shim-cella-v2")
    }

    /// The VMMs of this daemon's sandboxes.
    pub fn vmms(&self) -> Vec<u32> {
        self.pids("cella-vmm")
    }

    fn pids(&self, program: &str) -> Vec<u32> {
        let processes = self.host.processes().into_iter();
        let ours = processes.filter(|(_, line)| line.split(' ').next().unwrap().ends_with(program));
        ours.map(|(pid, _)| pid).collect()
    }

    /// Waits until `done` says yes.
    #[track_caller]
    pub fn eventually(&self, what: &str, mut done: impl FnMut() -> bool) {
        let deadline = Instant::now() + SOON;
        while !done() {
            assert!(Instant::now() < deadline, "not within {SOON:?}: {what}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Stops the daemon and checks that nothing is left of it and of its sandboxes.
    pub fn end(mut self) {
        self.eventually("the shims end", || self.shims().is_empty());
        let _ = Command::new("kill")
            .arg(self.child.id().to_string())
            .status();
        self.child.wait().unwrap();
        self.host.assert_clean();
        delete_bridge();
        if self.crashed {
            // Killed between making a namespace and writing down that there is one, containerd leaves it.
            self.remove_namespaces();
        }
        let sockets = sockets().into_iter();
        let dead = sockets.filter(|path| UnixStream::connect(path).is_err());
        let left: Vec<_> = dead
            .chain(namespaces())
            .filter(|path| !self.before.contains(path))
            .collect();
        assert!(left.is_empty(), "sockets and namespaces are left: {left:?}");
    }
}

impl Containerd {
    fn remove_namespaces(&self) {
        for path in namespaces() {
            if !self.before.contains(&path) {
                let _ = Command::new("umount").arg("-l").arg(&path).status();
                let _ = fs::remove_file(&path);
            }
        }
    }
}

/// The bridge of this process's tests.
fn bridge() -> String {
    format!("cella{}", std::process::id() % 100_000)
}

/// CNI leaves the bridge of a network to whoever made the network.
fn delete_bridge() {
    let mut command = Command::new("ip");
    let _ = command
        .args(["link", "del", &bridge()])
        .stderr(Stdio::null())
        .status();
}

/// The shims' sockets, living or dead.
fn sockets() -> Vec<PathBuf> {
    entries("/run/containerd/s")
}

/// The network namespaces that containerd has made for pods.
fn namespaces() -> Vec<PathBuf> {
    entries("/run/netns")
        .into_iter()
        .filter(|path| {
            path.file_name()
                .is_some_and(|name| name.as_encoded_bytes().starts_with(b"cni-"))
        })
        .collect()
}

fn entries(dir: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten();
    entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect()
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = fs::read_to_string(self.host.path("containerd.log")).unwrap_or_default();
            let tail: Vec<_> = log.lines().rev().take(30).collect();
            for line in tail.iter().rev() {
                eprintln!("{line}");
            }
        }
        for (pid, _) in self.host.processes() {
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
        }
        delete_bridge();
        self.remove_namespaces();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let ours = self.host.path("");
        let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
        let ours: Vec<_> = points
            .filter(|point| Path::new(point).starts_with(&ours))
            .collect();
        for point in ours.iter().rev() {
            let _ = Command::new("umount").args(["-l", point]).status();
        }
    }
}

fn spawn(host: &Host, program: &Path) -> Child {
    let log = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(host.path("containerd.log"))
        .unwrap();
    let shims = root().join("target/release");
    let own = program.parent().map(Path::to_path_buf).unwrap_or_default();
    let path = std::env::var("PATH").unwrap();
    let dirs = [shims, own].into_iter().chain(std::env::split_paths(&path));
    let dirs = dirs.filter(|dir| !dir.as_os_str().is_empty());
    let mut command = Command::new(program);
    command.arg("--config").arg(host.path("containerd.toml"));
    host.on_this_host(&mut command);
    command
        .env("PATH", std::env::join_paths(dirs).unwrap())
        .stdout(Stdio::null())
        .stderr(log);
    command.spawn().unwrap()
}

/// What both generations of the daemon understand: the older one's format.
fn write_configuration(host: &Host) {
    let dir = host.path("");
    let dir = dir.to_str().unwrap().trim_end_matches('/');
    let subnet = std::process::id() % 200;
    let bridge = bridge();
    fs::write(
        host.path("containerd.toml"),
        format!(
            r#"version = 2
root = "{dir}/c-root"
state = "{dir}/c-state"
[grpc]
address = "{dir}/c.sock"
[ttrpc]
address = "{dir}/c.sock.ttrpc"
[debug]
level = "debug"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{IMAGE}"
disable_apparmor = true
[plugins."io.containerd.grpc.v1.cri".containerd]
default_runtime_name = "cella"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.cella]
runtime_type = "{RUNTIME}"
pod_annotations = ["io.cella.*"]
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.cella-sandbox]
runtime_type = "{RUNTIME}"
sandboxer = "shim"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".registry]
config_path = "{dir}/hosts"
[plugins."io.containerd.nri.v1.nri"]
socket_path = "{dir}/nri.sock"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "{dir}/cni"
"#
        ),
    )
    .unwrap();
    fs::create_dir_all(host.path("cni")).unwrap();
    fs::write(
        host.path("cni/10-bridge.conflist"),
        format!(
            r#"{{"cniVersion":"0.4.0","name":"cella-test","plugins":[
{{"type":"bridge","bridge":"{bridge}","isGateway":true,"ipam":{{"type":"host-local","dataDir":"{dir}/ipam",
"ranges":[[{{"subnet":"10.247.{subnet}.0/24"}}]],"routes":[{{"dst":"0.0.0.0/0"}}]}}}},
{{"type":"portmap","capabilities":{{"portMappings":true}}}}]}}"#
        ),
    )
    .unwrap();
}
