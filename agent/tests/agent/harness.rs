//! A running agent, and the host's side of it.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio as ChildStdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use cella_proto::agent::{self as proto, Event, Exit};
use cella_proto::agent_ttrpc::AgentClient;
use protobuf::MessageField;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt as _;
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;
use ttrpc::asynchronous::{Client, ClientStreamReceiver, transport::Socket};
use ttrpc::context::{self, Context};

const BUSYBOX: &str = "/bin/busybox";
/// The port of the agent's service and of the host's listener for it.
const PORT: u32 = 1024;
/// The host's port for standard streams in these tests.
pub const STREAMS: u32 = 5000;
/// Longer than anything takes, on a busy machine too.
const PATIENCE: Duration = Duration::from_secs(60);
static NUMBER: AtomicU32 = AtomicU32::new(0);

/// One agent in namespaces of its own. Its drop ends it with everything in it.
pub struct Sandbox {
    pub dir: tempfile::TempDir,
    pub client: AgentClient,
    streams: UnixListener,
    // After the client: the agent ends when its caller is gone.
    guest: Guest,
}

struct Guest {
    child: Child,
    cgroups: PathBuf,
}

impl Drop for Guest {
    fn drop(&mut self) {
        // unshare's --kill-child takes the agent with it, which is the PID 1 of everything else.
        let _ = self.child.kill();
        let _ = self.child.wait();
        for _ in 0..200 {
            if remove_cgroups(&self.cgroups) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        eprintln!("cgroup {} is left over", self.cgroups.display());
    }
}

fn remove_cgroups(root: &Path) -> bool {
    if let Ok(entries) = std::fs::read_dir(root) {
        for entry in entries.flatten().filter(|entry| entry.path().is_dir()) {
            remove_cgroups(&entry.path());
        }
    }
    match std::fs::remove_dir(root) {
        Ok(()) => true,
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    }
}

/// Deadline of one call.
pub fn soon() -> Context {
    context::with_duration(PATIENCE)
}

impl Sandbox {
    /// A running agent, or nothing where there cannot be one, which is said.
    pub async fn start() -> Option<Self> {
        Self::start_after("true").await
    }

    /// The same, after a shell command in the agent's namespaces.
    pub async fn start_after(command: &str) -> Option<Self> {
        let cgroups = match requirements() {
            Ok(cgroups) => cgroups,
            Err(missing) => {
                println!("SKIPPED: {missing}");
                return None;
            }
        };
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let cgroups = cgroups.join(format!("cella-test-{}-{number}", std::process::id()));
        std::fs::create_dir(&cgroups).unwrap();
        let dir = tempfile::tempdir().unwrap();
        make_rootfs(&dir.path().join("rootfs"));
        let host = UnixListener::bind(dir.path().join(format!("host-{PORT}"))).unwrap();
        let streams = UnixListener::bind(dir.path().join(format!("host-{STREAMS}"))).unwrap();
        let child = Command::new("unshare")
            .args(["--pid", "--fork", "--kill-child", "--mount", "--mount-proc"])
            .args(["--uts", "--ipc", "--net", "--propagation", "private"])
            .args(["sh", "-c"])
            // /run is the machine's own without this.
            .arg(format!(
                "mount -t tmpfs run /run && {command} && exec \"$@\""
            ))
            .args(["sh", env!("CARGO_BIN_EXE_cella-agent"), "--unix"])
            .arg(dir.path())
            .arg(&cgroups)
            .stdin(ChildStdio::null())
            .spawn()
            .unwrap();
        let guest = Guest { child, cgroups };
        let (socket, _) = tokio::time::timeout(PATIENCE, host.accept())
            .await
            .expect("the agent dials the host")
            .unwrap();
        Some(Self {
            client: client(socket),
            dir,
            streams,
            guest,
        })
    }

    /// Another client, as somebody who attaches later.
    pub async fn attach(&self) -> AgentClient {
        let path = self.dir.path().join(format!("agent-{PORT}"));
        client(UnixStream::connect(path).await.unwrap())
    }

    /// Pid of the agent on this machine.
    pub fn agent_pid(&self) -> u32 {
        let pid = self.guest.child.id();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        children.unwrap().trim().parse().unwrap()
    }

    /// What /proc says of each child of the agent.
    pub fn children(&self) -> Vec<String> {
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.agent_pid())).unwrap();
        // A thread may end meanwhile, which hands its children on; and so may a child.
        let children = threads.filter_map(|thread| {
            std::fs::read_to_string(thread.unwrap().path().join("children")).ok()
        });
        let pids = children.collect::<String>();
        let stats = pids
            .split_whitespace()
            .filter_map(|pid| std::fs::read_to_string(format!("/proc/{pid}/stat")).ok());
        stats.collect()
    }

    /// The agent's cgroup root on this machine.
    pub fn cgroups(&self) -> &Path {
        &self.guest.cgroups
    }

    /// Whether the containers can have limits of `controller`.
    pub fn has_controller(&self, controller: &str) -> bool {
        let file = self.guest.cgroups.join("cgroup.controllers");
        let controllers = std::fs::read_to_string(file).unwrap();
        controllers
            .split_whitespace()
            .any(|name| name == controller)
    }

    /// An event stream, past its Ready.
    pub async fn watch(&self) -> Events {
        let request = proto::WatchRequest::new();
        let mut events = Events(self.client.watch(soon(), &request).await.unwrap());
        assert!(events.next().await.has_ready());
        events
    }

    /// An OCI specification for `args` in the rootfs of this sandbox.
    pub fn spec(&self, args: &[&str]) -> Value {
        json!({
            "ociVersion": "1.0.2",
            "process": process(args),
            "root": { "path": self.dir.path().join("rootfs"), "readonly": false },
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc" },
                { "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                  "options": ["nosuid", "mode=755", "size=64k"] },
                { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
                  "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"] },
            ],
            "linux": { "namespaces": [
                { "type": "pid" }, { "type": "mount" }, { "type": "ipc" },
                { "type": "uts" }, { "type": "network" },
            ] },
        })
    }

    /// Makes a container.
    pub async fn create(
        &self,
        id: &str,
        spec: &Value,
        stdio: proto::Stdio,
    ) -> ttrpc::Result<proto::CreateContainerResponse> {
        let request = create_request(id, spec, stdio);
        self.client.create_container(soon(), &request).await
    }

    /// Begins to make a container without streams.
    pub fn begin_create(&self, id: &str, spec: &Value) -> JoinHandle<ttrpc::Result<()>> {
        let (client, request) = (
            self.client.clone(),
            create_request(id, spec, proto::Stdio::new()),
        );
        tokio::spawn(async move { client.create_container(soon(), &request).await.map(drop) })
    }

    /// Begins to start a container.
    pub fn begin_start(&self, id: &str) -> JoinHandle<ttrpc::Result<()>> {
        let (client, request) = (self.client.clone(), process_ref(id, ""));
        tokio::spawn(async move { client.start(soon(), &request).await.map(drop) })
    }

    /// A container's state; none if there is no such container.
    pub async fn state(&self, id: &str) -> Option<proto::State> {
        let request = proto::Empty::new();
        let list = self.client.list_containers(soon(), &request).await.unwrap();
        let mut containers = list.containers.iter();
        containers
            .find(|container| container.container_id == id)
            .map(|container| container.state.unwrap())
    }

    /// Makes a process in container `id`.
    pub async fn exec(
        &self,
        id: &str,
        exec_id: &str,
        process: &Value,
        stdio: proto::Stdio,
    ) -> ttrpc::Result<proto::Empty> {
        let request = proto::ExecRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            process: serde_json::to_vec(process).unwrap(),
            stdio: MessageField::some(stdio),
            ..Default::default()
        };
        self.client.exec(soon(), &request).await
    }

    pub async fn start_process(&self, id: &str, exec_id: &str) -> ttrpc::Result<u32> {
        let started = self.client.start(soon(), &process_ref(id, exec_id)).await?;
        Ok(started.pid)
    }

    pub async fn signal(&self, id: &str, exec_id: &str, signal: i32) -> ttrpc::Result<()> {
        let request = proto::SignalRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            signal: signal.unsigned_abs(),
            ..Default::default()
        };
        self.client.signal(soon(), &request).await.map(drop)
    }

    pub async fn delete(&self, id: &str, exec_id: &str) -> ttrpc::Result<Option<Exit>> {
        let deleted = self
            .client
            .delete(soon(), &process_ref(id, exec_id))
            .await?;
        Ok(deleted.exit.into_option())
    }

    /// Makes and starts a container without streams.
    pub async fn run(&self, id: &str, args: &[&str]) {
        self.create(id, &self.spec(args), proto::Stdio::new())
            .await
            .unwrap();
        self.start_process(id, "").await.unwrap();
    }

    /// The next connection of a standard stream, with the number of its token.
    pub async fn accept(&self) -> (u8, UnixStream) {
        let (mut stream, _) = tokio::time::timeout(PATIENCE, self.streams.accept())
            .await
            .expect("the agent opens the stream")
            .unwrap();
        let mut token = [0u8; 16];
        stream.read_exact(&mut token).await.unwrap();
        assert_eq!(token, [token[0]; 16]);
        (token[0], stream)
    }

    /// As many connections as `N`, by the numbers of their tokens.
    pub async fn accept_all<const N: usize>(&self) -> [UnixStream; N] {
        let mut streams = Vec::new();
        for _ in 0..N {
            streams.push(self.accept().await);
        }
        streams.sort_by_key(|(token, _)| *token);
        let streams: Vec<_> = streams.into_iter().map(|(_, stream)| stream).collect();
        streams.try_into().unwrap()
    }
}

/// The events of one watcher.
pub struct Events(ClientStreamReceiver<Event>);

impl Events {
    pub async fn next(&mut self) -> Event {
        let event = tokio::time::timeout(PATIENCE, self.0.recv()).await;
        event
            .expect("an event in time")
            .unwrap()
            .expect("an event, not the end")
    }

    /// Whether the stream ends, whatever comes before its end.
    pub async fn end(&mut self) -> bool {
        let to_the_end = async { while let Ok(Some(_)) = self.0.recv().await {} };
        tokio::time::timeout(PATIENCE, to_the_end).await.is_ok()
    }

    /// The next exit, which must be the next event.
    pub async fn exit(&mut self) -> Exit {
        let mut event = self.next().await;
        assert!(event.has_exit(), "{event:?}");
        event.take_exit()
    }
}

pub fn process(args: &[&str]) -> Value {
    json!({
        "terminal": false,
        "user": { "uid": 0, "gid": 0 },
        "args": args,
        "env": ["PATH=/bin", "TERM=xterm"],
        "cwd": "/",
    })
}

/// A standard stream whose token is made of `number`.
pub fn stream(number: u8) -> MessageField<proto::Stream> {
    MessageField::some(proto::Stream {
        port: STREAMS,
        token: vec![number; 16],
        ..Default::default()
    })
}

pub fn create_request(
    id: &str,
    spec: &Value,
    stdio: proto::Stdio,
) -> proto::CreateContainerRequest {
    proto::CreateContainerRequest {
        container_id: id.to_owned(),
        spec: serde_json::to_vec(spec).unwrap(),
        stdio: MessageField::some(stdio),
        ..Default::default()
    }
}

pub fn container_ref(id: &str) -> proto::ContainerRef {
    proto::ContainerRef {
        container_id: id.to_owned(),
        ..Default::default()
    }
}

pub fn process_ref(id: &str, exec_id: &str) -> proto::ProcessRef {
    proto::ProcessRef {
        container_id: id.to_owned(),
        exec_id: exec_id.to_owned(),
        ..Default::default()
    }
}

/// The ttrpc code of a failed call, with its message.
pub fn status<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (ttrpc::Code, String) {
    match result {
        Err(ttrpc::Error::RpcStatus(status)) => (status.code(), status.message().to_owned()),
        other => panic!("expected a status: {other:?}"),
    }
}

pub async fn read_all(mut stream: UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let read = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut bytes)).await;
    read.expect("the end of the stream in time").unwrap();
    bytes
}

fn client(socket: UnixStream) -> AgentClient {
    AgentClient::new(Client::new(Socket::from(socket)))
}

/// Where this machine has its cgroup v2 hierarchy, or what it lacks.
fn requirements() -> Result<PathBuf, &'static str> {
    if !rustix::process::geteuid().is_root() {
        return Err("root, for namespaces");
    }
    if !Path::new(BUSYBOX).exists() {
        return Err("/bin/busybox (package busybox-static)");
    }
    let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(PathBuf::from);
    let mut roots = roots.into_iter();
    roots
        .find(|root| root.join("cgroup.procs").exists() && root.join("cgroup.controllers").exists())
        .ok_or("a cgroup v2 hierarchy")
}

fn make_rootfs(root: &Path) {
    for dir in ["bin", "proc", "dev", "tmp", "sys"] {
        std::fs::create_dir_all(root.join(dir)).unwrap();
    }
    std::fs::copy(BUSYBOX, root.join("bin/busybox")).unwrap();
    for applet in [
        "sh", "cat", "sleep", "true", "false", "echo", "stty", "hostname", "dd", "tr",
    ] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    std::fs::write(root.join("bin/plain"), "not a program").unwrap();
}
