//! A host with templates, used through the library that all doors stand on.

use std::path::PathBuf;

use cella_host::hypervisor::kvm::Kvm;
use cella_host::hypervisor::{Hypervisor, SavedVm, VmSpec};
use cella_host::paths::Paths;
use cella_host::sandbox::dir::SandboxDir;
use cella_host::sandbox::{Error, Sandbox, SandboxSpec};
use cella_host::template::{self, Built, Key, Shape, Store};
use cella_host::timeline::Timeline;
use cella_tests::{Host, libexec, missing_for, skip};

/// Memory of the sandboxes of these tests.
pub const MEMORY: u64 = 256 << 20;
/// The same, for the command line.
pub const MEMORY_FLAG: &str = "256M";
/// What templates may take.
pub const LIMIT: u64 = 1 << 30;

/// A host, and where the library finds it.
pub struct Here {
    pub host: Host,
    pub paths: Paths,
}

impl Here {
    /// One on which sandboxes run on KVM, unless the machine lacks something.
    pub fn new() -> Option<Self> {
        if let Some(missing) = missing_for("kvm") {
            skip(&missing);
            return None;
        }
        let host = Host::with_templates("kvm");
        let paths = Paths {
            run_dir: host.path("run"),
            lib_dir: host.path("lib"),
            libexec_dir: libexec(),
            qemu: PathBuf::from("qemu-system-x86_64"),
            config: Some(host.path("config.toml")),
        };
        Some(Self { host, paths })
    }

    /// The same with a template.
    pub async fn with_template() -> Option<Self> {
        Self::with(&shape()).await
    }

    /// The same with a template of `shape`.
    pub async fn with(shape: &Shape) -> Option<Self> {
        let here = Self::new()?;
        let built = template::build(&here.paths, &Kvm, shape, LIMIT).await;
        assert_eq!(built.unwrap().1, Built::New);
        Some(here)
    }

    pub fn store(&self) -> Store {
        Store::new(&self.paths)
    }

    pub fn key(&self) -> Key {
        Key::of(&self.paths, &shape()).unwrap()
    }

    /// Where a template's files are.
    pub fn template_dir(&self) -> PathBuf {
        self.paths
            .lib_dir
            .join("templates")
            .join(self.key().as_str())
    }

    /// What is in the directory of the templates, but for locks, which stay.
    pub fn templates(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.paths.lib_dir.join("templates"));
        entries
            .into_iter()
            .flatten()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| !name.ends_with(".lock"))
            .collect()
    }

    /// A sandbox that is cloned, if it can be.
    pub async fn sandbox(&self, id: &str) -> Result<Sandbox, Error> {
        self.sandbox_with(id, |_| {}).await
    }

    /// The same with a specification that is changed.
    pub async fn sandbox_with(
        &self,
        id: &str,
        change: impl FnOnce(&mut SandboxSpec),
    ) -> Result<Sandbox, Error> {
        let dir = SandboxDir::new(&self.paths, id)?;
        let mut spec = SandboxSpec {
            pod: false,
            vcpus: 1,
            memory_bytes: MEMORY,
            hostname: format!("host-{id}"),
            sysctls: Default::default(),
            cmdline: String::new(),
            console: None,
            template: true,
            pool: false,
            netns: None,
            resolv_conf: String::new(),
            disks: Vec::new(),
        };
        change(&mut spec);
        Sandbox::boot(&self.paths, dir, &Kvm, spec, &Timeline::new()).await
    }

    /// The saved machine itself, restored in a sandbox's directory: without identity, and nothing falls back. Says why
    /// it cannot be, if it cannot.
    pub async fn restore(
        &self,
        dir: &SandboxDir,
        saved: &SavedVm,
    ) -> Result<Box<dyn cella_host::hypervisor::Vm>, String> {
        let spec = VmSpec {
            id: dir.id().to_owned(),
            vcpus: 1,
            possible_vcpus: 0,
            memory_bytes: MEMORY,
            added_memory_bytes: 0,
            vmm: self.paths.vmm(),
            kernel: self.paths.kernel(),
            initrd: self.paths.initrd(),
            cmdline: String::new(),
            share: dir.share(),
            sockets: dir.sockets(),
            vsock: dir.vsock(),
            console: None,
            spare_slots: 0,
            nics: Vec::new(),
            disks: Vec::new(),
            mounts: Vec::new(),
        };
        let restored = Kvm.restore(&spec, saved).await;
        restored.map_err(|error| error.to_string())
    }
}

pub fn shape() -> Shape {
    Shape::serving(1, MEMORY, false, "")
}

/// Runs a test's future.
pub fn block_on(future: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(future);
}
