//! The process that holds the idle clones.

use std::collections::VecDeque;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::time::Duration;

use rustix::fs::FlockOperation;
use rustix::process::{WaitId, WaitIdOptions};
use tokio::io::unix::AsyncFd;
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::wire::{self, Ask, Given};
use super::{PREFIX, dir, socket};
use crate::config::Config;
use crate::container;
use crate::hypervisor::kvm::Kvm;
use crate::hypervisor::{HandedVm, Hypervisor, SavedVm, Vm, VmSpec};
use crate::network;
use crate::paths::Paths;
use crate::sandbox::Error;
use crate::sandbox::dir::{BootLock, OwnerLock, SandboxDir};
use crate::sandbox::plain_vm_spec;
use crate::sandbox::state::{self, ProcessId, SandboxState};
use crate::template::{Key, Shape, Store};

/// How often the configuration and the template are looked at.
const PERIOD: Duration = Duration::from_secs(2);
/// Whoever has claimed one is busy with it: it is replaced after that.
const REST: Duration = Duration::from_millis(300);

/// Whether a keeper lives.
pub fn is_there(paths: &Paths) -> bool {
    let Ok(lock) = File::open(dir(paths).join("lock")) else {
        return false;
    };
    rustix::fs::flock(&lock, FlockOperation::NonBlockingLockShared).is_err()
}

/// Removes what a dead keeper left, and says whether there was something.
///
/// # Errors
/// It cannot be removed.
pub fn collect(paths: &Paths) -> io::Result<bool> {
    if !dir(paths).exists() || is_there(paths) {
        return Ok(false);
    }
    fs::remove_dir_all(dir(paths)).map(|()| true)
}

/// Keeps idle clones for as long as the configuration asks for them.
///
/// # Errors
/// The keeper's own directory and socket cannot be had.
pub async fn keep(paths: Paths) -> Result<(), Error> {
    let place = dir(&paths);
    let action = || format!("keeping a pool in {}", place.display());
    let Some(_lock) = lock(&paths).map_err(|e| Error::host(action(), e))? else {
        return Ok(());
    };
    let mut term = signal(SignalKind::terminate()).map_err(|e| Error::host(action(), e))?;
    // A dead keeper's.
    let _ = fs::remove_file(socket(&paths));
    let listener = UnixListener::bind(socket(&paths)).map_err(|e| Error::host(action(), e))?;
    let mut keeper = Keeper {
        paths,
        idle: Vec::new(),
        asked: VecDeque::new(),
        making: None,
        next: Instant::now(),
    };
    loop {
        tokio::select! {
            Ok((claimer, _)) = listener.accept() => keeper.serve(claimer),
            made = finished(&mut keeper.making) => keeper.made(made),
            () = tokio::time::sleep_until(keeper.next) => {
                if !keeper.look() {
                    break;
                }
            }
            _ = term.recv() => break,
        }
    }
    // Nobody can ask any more; then the lock goes, with this process.
    drop(listener);
    keeper.end().await;
    fs::remove_dir_all(place.as_path()).map_err(|e| Error::host(action(), e))
}

/// Becomes the keeper, unless there is one.
fn lock(paths: &Paths) -> io::Result<Option<File>> {
    let place = dir(paths);
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&place)?;
    let lock = File::create(place.join("lock"))?;
    match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(lock)),
        Err(rustix::io::Errno::AGAIN) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

type Making = JoinHandle<Result<Idle, Error>>;

/// The outcome of what is being made; never if nothing is.
async fn finished(making: &mut Option<Making>) -> Result<Idle, Error> {
    let Some(task) = making else {
        return std::future::pending().await;
    };
    let made = task.await;
    *making = None;
    made.unwrap_or_else(|e| Err(Error::host("making an idle sandbox", io::Error::other(e))))
}

/// An idle clone. Dropping it ends it.
struct Idle {
    kind: Ask,
    // The machine first, then what it uses.
    vm: Option<Box<dyn Vm>>,
    dir: SandboxDir,
    lock: OwnerLock,
    booting: BootLock,
}

impl Drop for Idle {
    fn drop(&mut self) {
        if self.vm.take().is_some()
            && let Err(error) = self.dir.remove()
        {
            tracing::warn!("removing idle sandbox {}: {error}", self.dir.id());
        }
    }
}

struct Keeper {
    paths: Paths,
    idle: Vec<Idle>,
    /// What was asked for, the last first.
    asked: VecDeque<Ask>,
    making: Option<Making>,
    /// When to look again.
    next: Instant,
}

impl Keeper {
    /// Makes what is missing, ends what is of no use any more; false if no pool is wanted.
    fn look(&mut self) -> bool {
        self.next = Instant::now() + PERIOD;
        let Ok(config) = Config::load(&self.paths) else {
            return false;
        };
        if !config.template || config.pool == 0 {
            return false;
        }
        let mut missing = self.wanted(&config);
        self.idle.retain(|idle| {
            let at = missing.iter().position(|kind| *kind == idle.kind);
            at.map(|at| missing.remove(at)).is_some()
        });
        if self.making.is_none()
            && let Some(kind) = missing.first()
            && let Some((shape, saved)) = template(&self.paths, kind)
        {
            let made = make(self.paths.clone(), kind.clone(), shape, saved);
            self.making = Some(tokio::spawn(made));
        }
        true
    }

    /// The kinds of the idle clones that there should be: those that were asked for last, and if there were not as many, the
    /// configuration's own. Only those that there are templates for.
    fn wanted(&mut self, config: &Config) -> Vec<Ask> {
        let count = config.pool as usize;
        self.asked.truncate(count);
        let (cpus, memory) = (config.cpus, config.memory_bytes);
        let shape = Shape::serving(cpus, memory, false, &config.kernel_params);
        let own = Key::of(&self.paths, &shape).ok().map(|key| Ask {
            key: key.as_str().to_owned(),
            vcpus: cpus,
        });
        let store = Store::new(&self.paths);
        let there = |kind: &Ask| Key::parse(&kind.key).is_some_and(|key| store.has(&key));
        let own = std::iter::repeat_n(own, count).flatten();
        let asked = self.asked.iter().cloned();
        asked.chain(own).take(count).filter(there).collect()
    }

    fn made(&mut self, made: Result<Idle, Error>) {
        match made {
            Ok(idle) => {
                self.idle.push(idle);
                self.next = Instant::now();
            }
            // The next sandbox that is cloned says what is wrong, and does something about it.
            Err(error) => tracing::debug!("making an idle sandbox: {error}"),
        }
    }

    /// Gives an idle clone away; the end of the connection says that there is none.
    fn serve(&mut self, claimer: UnixStream) {
        if let Err(error) = self.give(claimer) {
            tracing::debug!("giving an idle sandbox away: {error}");
        }
    }

    fn give(&mut self, claimer: UnixStream) -> io::Result<()> {
        let claimer = claimer.into_std()?;
        wire::prepare(&claimer)?;
        let (ask, _) = wire::receive::<Ask>(&claimer)?;
        let at = self.idle.iter().position(|idle| idle.kind == ask);
        self.asked.push_front(ask);
        self.next = Instant::now() + REST;
        let Some(at) = at else {
            return Ok(());
        };
        let mut idle = self.idle.swap_remove(at);
        let Some(vm) = idle.vm.take().and_then(|vm| vm.hand_over()) else {
            return idle.dir.remove().map_err(io::Error::other);
        };
        let given = Given {
            id: idle.dir.id().to_owned(),
            pid: vm.pid,
        };
        let fds = [
            vm.control.as_fd(),
            vm.pidfd.as_fd(),
            idle.lock.as_fd(),
            idle.booting.as_fd(),
        ];
        let sent = wire::send(&claimer, &given, &fds);
        look_after(vm);
        if sent.is_err() {
            let _ = idle.dir.remove();
        }
        sent
    }

    async fn end(mut self) {
        if let Some(making) = self.making.take() {
            drop(making.await);
        }
    }
}

/// A VMM that was given away is still this process's child: its exit status is taken, so that no zombie stays.
fn look_after(vm: HandedVm) {
    drop(vm.control);
    // SAFETY: the AsyncFd owns the descriptor, so it stays open for as long as it is registered.
    let pidfd = unsafe { AsyncFd::register(vm.pidfd) };
    tokio::spawn(async move {
        if let Ok(pidfd) = pidfd {
            let _ended = pidfd.readable().await;
            let vmm = WaitId::PidFd(pidfd.get_ref().as_fd());
            let _ = rustix::process::waitid(vmm, WaitIdOptions::EXITED);
        }
    });
}

/// The template of clones of this kind.
fn template(paths: &Paths, kind: &Ask) -> Option<(Shape, SavedVm)> {
    let store = Store::new(paths);
    let key = Key::parse(&kind.key)?;
    Some((store.shape(&key)?, store.open(&key).ok()??))
}

/// Restores the saved machine with its CPUs, and leaves it alone: who claims it has its guest bring them online.
async fn make(paths: Paths, kind: Ask, shape: Shape, saved: SavedVm) -> Result<Idle, Error> {
    let id = container::new_id()?;
    let dir = SandboxDir::new(&paths, &format!("{PREFIX}{id}"))?;
    let (lock, booting) = dir.create()?;
    let vcpus = kind.vcpus;
    let mut idle = Idle {
        kind,
        vm: None,
        dir,
        lock,
        booting,
    };
    let spec = VmSpec {
        vcpus,
        memory_bytes: shape.memory_bytes,
        ..plain_vm_spec(&paths, &idle.dir)
    };
    let vm = match restore(spec, &shape, &saved).await {
        Ok(vm) => vm,
        Err(error) => {
            idle.dir.remove()?;
            return Err(error);
        }
    };
    let own = ProcessId::own();
    let written = idle.dir.write_state(&SandboxState {
        id: idle.dir.id().to_owned(),
        pod: false,
        hypervisor: Kvm.name().to_owned(),
        owner: own,
        vmm: ProcessId::of(vm.pid()).unwrap_or(own),
        vcpus,
        memory_bytes: shape.memory_bytes,
        resolv_conf: false,
        created: state::now(),
    });
    // From here on its drop removes it.
    idle.vm = Some(vm);
    written.map(|()| idle)
}

async fn restore(mut spec: VmSpec, shape: &Shape, saved: &SavedVm) -> Result<Box<dyn Vm>, Error> {
    spec.nics = network::spares(shape.nics).await?;
    Ok(Kvm.restore(&spec, saved).await?)
}
