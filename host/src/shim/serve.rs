//! The shim itself: serves containerd on the socket that `start` made, until its last task is gone and it is told to end.

use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::{sandbox_async, shim_async};
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use tokio::signal::unix::{SignalKind, signal};
use ttrpc::asynchronous::Server;
use ttrpc::asynchronous::transport::Listener;

use super::args::Args;
use super::events::Publisher;
use super::pod::Pod;
use super::sandbox_service::SandboxService;
use super::task::TaskService;
use super::{log, orphan, start};
use crate::paths::Paths;
use crate::sandbox::Error;

/// The task service's names: they differ in nothing else.
const TASK_V2: &str = "containerd.task.v2.Task";
/// How long the last events may take to reach containerd.
const FLUSH: Duration = Duration::from_secs(2);
/// How long a thread that waited for the host's file systems stays for the next.
const IDLE: Duration = Duration::from_millis(200);
/// Containers at a time whose volumes may keep such threads waiting.
const THREADS: usize = 64;
/// What the answer to Shutdown needs to be on its way.
const GRACE: Duration = Duration::from_millis(20);

/// Serves until the end.
///
/// # Errors
/// The socket is not there, or the sandbox could not be removed.
pub fn main(paths: Paths, args: &Args) -> Result<(), Error> {
    log::init(Path::new("."), args.debug);
    // SAFETY: `start` has put the socket there for this process, and nothing else takes it.
    let listener = UnixListener::from(unsafe { OwnedFd::from_raw_fd(start::SOCKET_FD) });
    let adopt = || {
        rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::CLOEXEC)?;
        listener.set_nonblocking(true)
    };
    adopt().map_err(|e| Error::host("taking the shim's socket over", e))?;
    let options = std::fs::read(start::OPTIONS_FILE).ok();
    let options = options.and_then(|bytes| Any::parse_from_bytes(&bytes).ok());
    let bundle =
        std::env::current_dir().map_err(|e| Error::host("finding the shim's bundle", e))?;
    // The bundle is containerd's to remove.
    std::env::set_current_dir("/").map_err(|e| Error::host("leaving the bundle", e))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_keep_alive(IDLE)
        .max_blocking_threads(THREADS)
        .build()
        .map_err(|e| Error::host("making the event loop", e))?;
    let served = runtime.block_on(serve(paths, args, listener, options, &bundle));
    if let Err(error) = &served {
        tracing::error!("{error}");
    }
    // A thread may wait for a file system that never answers.
    runtime.shutdown_background();
    served
}

async fn serve(
    paths: Paths,
    args: &Args,
    listener: UnixListener,
    options: Option<Any>,
    bundle: &Path,
) -> Result<(), Error> {
    let address = std::env::var("TTRPC_ADDRESS").unwrap_or_default();
    let publisher = Publisher::new(&args.namespace, &address);
    let pod = Arc::new(Pod::new(paths, args, publisher.clone(), options));
    let listener = tokio::net::UnixListener::from_std(listener)
        .map_err(|e| Error::host("listening on the shim's socket", e))?;
    let service = Arc::new(TaskService(Arc::clone(&pod)));
    let mut tasks = shim_async::create_task(service.clone());
    for (_, service) in shim_async::create_task(service) {
        tasks.insert(TASK_V2.to_owned(), service);
    }
    let sandboxes = Arc::new(SandboxService(Arc::clone(&pod)));
    let mut server = Server::new()
        .add_listener(Listener::from(listener))
        .register_service(tasks)
        .register_service(sandbox_async::create_sandbox(sandboxes));
    server
        .start()
        .await
        .map_err(|e| Error::host("serving containerd", std::io::Error::other(e)))?;
    let mut term =
        signal(SignalKind::terminate()).map_err(|e| Error::host("watching for signals", e))?;
    tokio::select! {
        () = pod.told_to_end() => {}
        _ = term.recv() => tracing::info!("ended by a signal"),
        () = orphan::removal(bundle) => tracing::info!("containerd has removed the bundle"),
    }
    let ended = pod.end().await;
    let _ = tokio::time::timeout(FLUSH, publisher.flush()).await;
    tokio::time::sleep(GRACE).await;
    ended
}
