//! From the agent's start to its service: the call to the host first, the port that others attach to beside it.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use cella_proto::agent_ttrpc;
use futures::stream::{self, Stream};
use rustix::time::ClockId;
use ttrpc::asynchronous::Server;

use crate::icount;
use crate::rpc::{Agent, Service};
use crate::transport::{Connection, Listener, Transport};

/// The port that the host listens on for its guests, and the agent for those who attach later.
pub const PORT: u32 = 1024;

/// What the kernel's command line and the test's arguments decide.
#[derive(Clone, Debug)]
pub struct Options {
    /// How the host is reached.
    pub transport: Transport,
    /// Whether the guest's file systems are the agent's to mount. A test brings its own.
    pub in_guest: bool,
    /// Where the cgroup v2 hierarchy is mounted.
    pub cgroup_root: PathBuf,
    /// Measure instead of calling the host, and end: [`icount`].
    pub icount: bool,
    /// The guest becomes a template: everything that needs no identity is done before the host is called, and the call
    /// says no more than that. Whoever the guest becomes is told to the agent's own port.
    pub template: bool,
}

/// As [`icount::VARIABLE`]: `cella_template=1` on the kernel's command line sets [`Options::template`].
pub const TEMPLATE_VARIABLE: &str = "cella_template";

/// When the agent's main was entered.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// Guest CLOCK_BOOTTIME in nanoseconds.
    pub boot_ns: u64,
    /// Time stamp counter.
    pub ticks: u64,
}

impl Entry {
    /// Just now.
    pub fn now() -> Self {
        Self {
            ticks: icount::ticks(),
            boot_ns: boot_time(),
        }
    }
}

/// Guest CLOCK_BOOTTIME in nanoseconds.
pub fn boot_time() -> u64 {
    let now = rustix::time::clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let nanoseconds = u64::try_from(now.tv_nsec).unwrap_or(0);
    seconds
        .saturating_mul(1_000_000_000)
        .saturating_add(nanoseconds)
}

/// Dials the host and serves it, and whoever connects to the agent's port, for ever.
///
/// # Errors
///
/// When the agent's own port cannot be listened on. A host that does not take the call is no error: somebody may
/// attach later.
pub async fn serve(options: Options, entry: Entry) -> Result<(), crate::error::Error> {
    // First, so that whoever sees the call can attach already.
    let listener =
        options
            .transport
            .listen(PORT)
            .map_err(|source| crate::error::Error::System {
                what: format!("listening on port {PORT}"),
                source,
            })?;
    if options.icount {
        // Boxed, so that no guest that serves keeps room for it.
        Box::pin(icount::measure(options, entry)).await;
        crate::power::off();
        return Ok(());
    }
    if options.template {
        return serve_template(options, entry, listener).await;
    }
    let dial_ns = boot_time();
    let dialled = options.transport.dial(PORT).await;
    let dialled = match dialled {
        Ok(connection) => Some(connection),
        Err(error) => {
            let line = format!("cella-agent: calling the host on port {PORT}: {error}\n");
            crate::power::report(&line);
            None
        }
    };
    let agent = Arc::new(Agent::new(options, entry.boot_ns, dial_ns));
    serve_connections(agent, dialled, listener).await?;
    std::future::pending().await
}

/// Prepares the guest, serves the agent's port, and then makes a call to the host that is nothing but the word that it may
/// be saved. In a clone nothing of this happens again: it finds a guest that waits for its first connection.
async fn serve_template(
    options: Options,
    entry: Entry,
    listener: Listener,
) -> Result<(), crate::error::Error> {
    let transport = options.transport.clone();
    let agent = Arc::new(Agent::new(options, entry.boot_ns, boot_time()));
    agent.prepare_early()?;
    serve_connections(agent, None, listener).await?;
    match transport.dial(PORT).await {
        Ok(word) => drop(word),
        Err(error) => crate::power::report(&format!(
            "cella-agent: calling the host on port {PORT}: {error}\n"
        )),
    }
    std::future::pending().await
}

async fn serve_connections(
    agent: Arc<Agent>,
    dialled: Option<Connection>,
    listener: Listener,
) -> Result<(), crate::error::Error> {
    let service = Arc::new(Service(agent));
    let mut server = Server::new()
        .add_listener(ttrpc::asynchronous::transport::Listener::new(connections(
            dialled, listener,
        )))
        .register_service(agent_ttrpc::create_agent(service));
    server
        .start()
        .await
        .map_err(|error| crate::error::Error::Invalid {
            what: "starting the server".to_owned(),
            why: error.to_string(),
        })?;
    // It serves for as long as the agent lives: forgotten, because dropping it would end it.
    std::mem::forget(server);
    Ok(())
}

/// The dialled connection, then those that come in. Ends when the listening socket fails.
fn connections(
    dialled: Option<Connection>,
    listener: Listener,
) -> impl Stream<Item = io::Result<Connection>> {
    stream::unfold(
        (dialled, Some(listener)),
        |(dialled, listener)| async move {
            if let Some(connection) = dialled {
                return Some((Ok(connection), (None, listener)));
            }
            let listener = listener?;
            let accepted = listener.accept().await;
            let listener = accepted.is_ok().then_some(listener);
            Some((accepted, (None, listener)))
        },
    )
}
