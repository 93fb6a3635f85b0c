//! The measuring mode: under an emulator that counts instructions, the agent does what it would do for a host, marks each
//! step for whoever counts, says what the steps were, and ends.

use std::path::Path;

use crate::error::Error;
use crate::rpc::Agent;
use crate::server::{Entry, Options};

/// The kernel hands a word of its command line that it does not know to init as an environment variable, if the word
/// has a `=` and no dot: `cella_icount=1` measures. That needs no /proc.
pub const VARIABLE: &str = "cella_icount";
/// The OCI specification of the container to measure; none is measured if the guest's image has none.
const CONTAINER: &str = "/measured/config.json";

/// The time stamp counter: under such an emulator, the instructions so far and the time spent waiting.
pub fn ticks() -> u64 {
    // SAFETY: reading the counter has no effect; the kernel leaves it readable to user space.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// The steps so far. What they are called is said at the end: writing to the console costs instructions too.
#[derive(Default)]
pub struct Steps(Vec<&'static str>);

impl Steps {
    /// A step has been done. The mark is a system call without effect that nothing else in the guest makes: the
    /// emulator sees the kernel enter it.
    pub fn done(&mut self, step: &'static str) {
        // SAFETY: MEMBARRIER_CMD_QUERY with no flags reads and changes nothing.
        unsafe { libc::syscall(libc::SYS_membarrier, libc::MEMBARRIER_CMD_QUERY, 0, 0) };
        self.0.push(step);
    }
}

/// Measures: from reset to the agent's readiness (the tick at which it would call the host), then the pod's set-up, and two
/// containers one after the other if the guest's image has one.
pub async fn measure(options: Options, entry: Entry) {
    let ready = ticks();
    let mut steps = Steps(Vec::with_capacity(16));
    steps.done("ready");
    let agent = Agent::new(options, entry.boot_ns, entry.boot_ns);
    let measured = measure_pod(&agent, &mut steps).await;
    crate::power::report(&format!(
        "cella-agent: ready tsc={ready} entry={}\ncella-agent: steps {}\n",
        entry.ticks,
        steps.0.join(" ")
    ));
    if let Err(error) = measured {
        crate::power::report(&format!("cella-agent: {}\n", error.message()));
    }
}

async fn measure_pod(agent: &Agent, steps: &mut Steps) -> Result<(), Error> {
    agent.measure_set_up(steps)?;
    if !Path::new(CONTAINER).exists() {
        return Ok(());
    }
    let spec = std::fs::read(CONTAINER).map_err(|source| Error::System {
        what: format!("reading {CONTAINER}"),
        source,
    })?;
    steps.done("specification-read");
    agent
        .measure_container("first", &spec, steps, FIRST)
        .await?;
    agent
        .measure_container("second", &spec, steps, SECOND)
        .await
}

/// What the steps of a container's life are called: created, started, ended, deleted.
pub type ContainerSteps = [&'static str; 4];
const FIRST: ContainerSteps = ["created", "started", "ended", "deleted"];
const SECOND: ContainerSteps = [
    "second-created",
    "second-started",
    "second-ended",
    "second-deleted",
];
