//! The file system device (virtio 1.2, section 5.11): one directory of the host for the guest, served as FUSE.
//!
//! The server is fuse-backend-rs's pass-through file system behind [`guarded`], which holds the guest to the
//! rules. Data moves between files and guest memory directly. The page cache and the writes are the guest's
//! own business except that nothing is written back late: a write has reached the host's file when it returns.
//! What the host changes the guest sees within [`VALIDITY`].
//!
//! The device serves each request on the thread that kicks it, which therefore acts as the guest's users and
//! waits for the host's disk: it should be a thread of its own (`ThreadKind::Fs`).
//!
//! A guest that has it mounted can be saved and goes on in another process, where the directory is the same or a copy of it: it
//! keeps its numbers, and the files are looked up and opened anew, on that thread, before its first request is served. What is not
//! there any more is `ESTALE` to it. It cannot be saved while it has a removed file open.

mod budget;
mod content;
mod descriptor;
mod guarded;
mod held;
mod names;
mod numbers;
mod saved;
#[cfg(test)]
mod tests;

use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use cella_proto::snapshot::FsState;
use fuse_backend_rs::abi::fuse_abi::{InHeader, Opcode, OutHeader};
use fuse_backend_rs::api::filesystem::FileSystem;
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::passthrough::{CachePolicy, Config, PassthroughFs};
use fuse_backend_rs::transport::{Reader, VirtioFsWriter, Writer};
use protobuf::Message;
use rustix::process::Resource;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{DescriptorChain, QueueT};
use vm_memory::{ByteValued, GuestAddressSpace, GuestMemoryMmap};

use self::budget::Budget;
use self::guarded::Guarded;
use super::lent::{Lent, broken, pop, read_config};
use super::{Device, DeviceError, Resources, SnapshotStep, Watcher};

/// How long the guest may believe a name or an attribute without asking again. What changes on the host, as a ConfigMap does, is
/// to be seen within a second.
pub const VALIDITY: Duration = Duration::from_millis(500);

/// Bytes of the tag, padded with zeros.
const TAG_LEN: usize = 36;

// First the queue of requests that must not wait (`FORGET`), then that of all others: a request of 256 pages, the most
// that the server agrees to, and its headers fit it.
const QUEUE_SIZES: [u16; 2] = [64, 512];
#[cfg(test)]
const HIPRIO: usize = 0;
#[cfg(test)]
const REQUEST: usize = 1;

/// The longest request: 1 MiB of data and its headers.
const MAX_REQUEST: u64 = (1 << 20) + (1 << 16);
/// The most descriptors of a request; what preadv(2) takes at most.
const MAX_DESCRIPTORS: usize = 1024;

/// Why a directory cannot be shared.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The tag is empty, has a zero byte or is too long.
    #[error("sharing {root:?} under the tag {tag:?}: a tag has 1 to 36 bytes and no zero byte")]
    Tag {
        /// The tag.
        tag: String,
        /// The directory.
        root: std::path::PathBuf,
    },
    /// The directory, or what the server needs of `/proc`, cannot be opened.
    #[error("sharing {root:?}: {source}")]
    Open {
        /// The directory.
        root: std::path::PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The file system device. See the module.
pub struct Fs {
    tag: [u8; TAG_LEN],
    server: Server<Arc<Guarded>>,
    guarded: Arc<Guarded>,
    active: Lent,
    // A session of the past that the first kick goes on with: until then this thread is not known to be the one that may open files.
    restored: Option<FsState>,
}

impl Fs {
    /// A device that shares `root` under `tag`.
    ///
    /// Call it inside of the jail, when the root directory and `/proc/self` are what they will be while the guest
    /// runs and `RLIMIT_NOFILE` is set (it bounds what the guest may hold), but before Landlock and seccomp are
    /// closed: `/proc/self/fd` and `/proc/self/mountinfo` are opened here. `root` is opened again by its path when the
    /// guest mounts or is reset. Clears the process's umask: file modes are the guest's.
    ///
    /// # Errors
    /// See [`FsError`].
    pub fn new(tag: &str, root: &Path) -> Result<Self, FsError> {
        let limit = rustix::process::getrlimit(Resource::Nofile).current;
        Self::with_budget(tag, root, Budget::new(limit.unwrap_or(u64::MAX)))
    }

    fn with_budget(tag: &str, root: &Path, budget: Budget) -> Result<Self, FsError> {
        let open = |source| FsError::Open {
            root: root.to_owned(),
            source,
        };
        let root_dir = root
            .to_str()
            .filter(|path| !path.contains('\0'))
            .ok_or_else(|| open(io::ErrorKind::InvalidInput.into()))?;
        let inner = PassthroughFs::new(Config {
            root_dir: root_dir.to_owned(),
            cache_policy: CachePolicy::Auto,
            attr_timeout: VALIDITY,
            entry_timeout: VALIDITY,
            xattr: true,
            killpriv_v2: true,
            allow_direct_io: false,
            ..Config::default()
        })
        .map_err(open)?;
        inner.import().map_err(open)?;
        let guarded = Arc::new(Guarded::new(inner, budget));
        Ok(Self {
            tag: wire_tag(tag).ok_or_else(|| FsError::Tag {
                tag: tag.to_owned(),
                root: root.to_owned(),
            })?,
            server: Server::new(guarded.clone()),
            guarded,
            active: Lent::default(),
            restored: None,
        })
    }

    // Serves every request of queue `index`. A driver that never stops asking keeps this thread busy, and nobody
    // else: vCPUs that are paused or stopped ask nothing.
    fn serve_queue(&mut self, index: usize) -> Result<(), DeviceError> {
        let resources = self.active.get()?;
        let guard = resources.memory.memory();
        loop {
            let queue = resources.queue(index)?;
            let Some(chain) = pop(queue, &guard, index)? else {
                // Looks once more after asking for kicks, lest a request that comes in between be missed.
                if queue.enable_notification(&*guard).map_err(broken(index))? {
                    continue;
                }
                return Ok(());
            };
            let head = chain.head_index();
            let len = serve(&self.server, &guard, chain);
            queue.add_used(&*guard, head, len).map_err(broken(index))?;
            resources.notify(index)?;
        }
    }
}

fn wire_tag(tag: &str) -> Option<[u8; TAG_LEN]> {
    if tag.is_empty() || tag.contains('\0') {
        return None;
    }
    let mut wire = [0; TAG_LEN];
    wire.get_mut(..tag.len())?.copy_from_slice(tag.as_bytes());
    Some(wire)
}

// Serves one request; returns how many bytes were written to it.
fn serve(
    server: &Server<Arc<Guarded>>,
    memory: &GuestMemoryMmap,
    chain: DescriptorChain<&GuestMemoryMmap>,
) -> u32 {
    if !is_acceptable(chain.clone()) {
        return 0;
    }
    let (Ok(reader), Ok(writer)) = (
        Reader::from_descriptor_chain(memory, chain.clone()),
        VirtioFsWriter::new(memory, chain),
    ) else {
        return 0;
    };
    let Ok(header) = reader.clone().read_obj::<InHeader>() else {
        return 0;
    };
    let reply = Writer::VirtioFs(writer.clone());
    match server.handle_message(reader, reply, None, None) {
        Ok(len) => u32::try_from(len).unwrap_or(u32::MAX),
        // The request was malformed, and an answer may have been begun.
        Err(_) => refuse(&header, writer),
    }
}

// Bounds what one request makes the server allocate and the kernel move.
fn is_acceptable(chain: DescriptorChain<&GuestMemoryMmap>) -> bool {
    let mut readable = 0_u64;
    for (count, descriptor) in chain.enumerate() {
        if !descriptor.is_write_only() {
            readable = readable.saturating_add(descriptor.len().into());
        }
        if count >= MAX_DESCRIPTORS || readable > MAX_REQUEST {
            return false;
        }
    }
    true
}

// Answers `EINVAL`, except for requests that have no answer.
fn refuse(header: &InHeader, mut writer: VirtioFsWriter<'_>) -> u32 {
    if header.opcode == Opcode::Forget as u32 || header.opcode == Opcode::BatchForget as u32 {
        return 0;
    }
    let len = size_of::<OutHeader>() as u32;
    let answer = OutHeader {
        len,
        error: -libc::EINVAL,
        unique: header.unique,
    };
    // Without room for an answer there is none.
    match writer.write_all(answer.as_slice()) {
        Ok(()) => len,
        Err(_) => 0,
    }
}

impl Device for Fs {
    fn id(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // `struct virtio_fs_config`: the tag, then the number of request queues.
        let queues = 1_u32.to_le_bytes();
        read_config(&[&self.tag[..], &queues].concat(), offset, data);
    }

    fn activate(
        &mut self,
        resources: Resources,
        _watcher: Arc<dyn Watcher + Send + Sync>,
    ) -> Result<(), DeviceError> {
        self.active.take_up(resources, QUEUE_SIZES.len())
    }

    fn kick(&mut self, index: usize) -> Result<(), DeviceError> {
        if let Some(state) = self.restored.take() {
            let host = |source| DeviceError::Host {
                action: "going on with a saved guest's files",
                source,
            };
            self.guarded.restore(&state).map_err(host)?;
        }
        self.serve_queue(index)
    }

    fn snapshot(&mut self, step: SnapshotStep<'_>) -> Result<(), DeviceError> {
        match step {
            SnapshotStep::Save(own) => {
                let saved = match &self.restored {
                    Some(state) => state.write_to_vec(own),
                    None => self.guarded.save()?.write_to_vec(own),
                };
                saved.map_err(|_| DeviceError::Snapshot("its files do not fit a message"))
            }
            SnapshotStep::Restore(own) => {
                let limit = self.guarded.held().budget.limit();
                self.restored = Some(saved::read(own, limit)?);
                Ok(())
            }
        }
    }

    fn reset(&mut self) -> Option<Resources> {
        let resources = self.active.give_back()?;
        // A driver that starts anew knows of no file.
        self.restored = None;
        self.guarded.destroy();
        Some(resources)
    }
}
