//! `cella run`: a container in a sandbox of its own, or in a pod's.

use std::path::PathBuf;
use std::sync::Arc;

use cella_proto::agent::Exit;
use oci_spec::runtime::{Mount, Spec};

use super::session::{Session, wanted};
use super::source::Source;
use super::streams::Output;
use super::{Context, Error, background, dns, pod, with_runtime};
use crate::config::Config;
use crate::container::{self, Record};
use crate::sandbox::dir::SandboxDir;
use crate::sandbox::state::{ContainerState, ProcessId, Status, now};
use crate::sandbox::stdio::{self, Streams};
use crate::sandbox::{Sandbox, volume};
use crate::snapshot::owner;
use crate::spec::SpecOptions;
use crate::timeline::Timeline;

/// The environment variable that tells a background process its container's id.
const NAME: &str = "CELLA_CONTAINER_NAME";

/// Run a command in a new container
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  cella run oci:busybox -- sh -c 'uname -a; exit 3'\n  cella run --pod demo -d --name web --volume /srv/www:/www:ro oci-archive:web.tar\n\nIMAGE is oci:DIR[:TAG], oci-archive:FILE, docker-archive:FILE, rootfs:DIR, bundle:DIR or a registry reference."
)]
pub struct Args {
    /// Put the container in this pod, which is booted if it does not run
    #[arg(long, value_name = "ID")]
    pod: Option<String>,
    #[command(flatten)]
    machine: pod::MachineArgs,
    /// Set an environment variable
    #[arg(long, short, value_name = "K=V")]
    env: Vec<String>,
    /// Bind a directory or file of the host
    #[arg(long, short, value_name = "SRC:DST[:ro]")]
    volume: Vec<String>,
    /// Pass standard input on
    #[arg(short, long)]
    interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    tty: bool,
    /// Leave it running in the background and print its id
    #[arg(short, long)]
    detach: bool,
    /// The container's id [default: a random one]
    #[arg(long, value_name = "ID", env = NAME, hide_env = true)]
    name: Option<String>,
    /// Write the phases of the start to a file: JSON, or a picture if it ends in .svg
    #[arg(long, value_name = "FILE")]
    timeline: Option<PathBuf>,
    /// The image
    image: String,
    /// The command, instead of the image's
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// Runs the command, here or in the background.
pub fn main(context: &Context, mut args: Args) -> Result<u8, Error> {
    let id = match args.name.take() {
        Some(id) => id,
        None => container::new_id()?,
    };
    if args.detach && !background::is_background() {
        if args.interactive {
            return Err(Error::usage(
                "-i and -d exclude each other: nobody is there to type",
            ));
        }
        let arguments: Vec<_> = std::env::args_os().skip(1).collect();
        background::spawn(&arguments, &[(NAME, &id)])?;
        println!("{id}");
        return Ok(0);
    }
    with_runtime(async {
        tokio::select! {
            // Signals are taken before there is something to be undone.
            biased;
            // While the process runs, a Session takes them; before, they end this.
            number = interrupted() => Ok(128 + number),
            status = run(context, &args, &id) => status,
        }
    })
}

/// SIGINT or SIGTERM before there is a process to pass it on to: dropping what was being done undoes it.
async fn interrupted() -> u8 {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut int), Ok(mut term)) = (
        signal(SignalKind::interrupt()),
        signal(SignalKind::terminate()),
    ) else {
        return std::future::pending().await;
    };
    let number = tokio::select! {
        _ = int.recv() => 2,
        _ = term.recv() => 15,
    };
    match SESSION.load(std::sync::atomic::Ordering::Relaxed) {
        true => std::future::pending().await,
        false => number,
    }
}

/// Whether a [`Session`] takes the signals.
static SESSION: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);

async fn run(context: &Context, args: &Args, id: &str) -> Result<u8, Error> {
    let timeline = Arc::new(Timeline::new());
    let config = Config::load(&context.paths)?;
    let volumes = args.volume.iter().map(|text| volume::parse(text));
    let volumes = volumes.collect::<Result<Vec<_>, _>>()?;
    let sandbox_id = args.pod.as_deref().unwrap_or(id);
    let mut cleanup = Cleanup::new(Record::create(&context.paths, id)?);
    let state = state(args, id, sandbox_id, volumes.clone());
    cleanup.record.write(&state)?;
    let source = Source::prepare(&context.paths, &args.image)?;
    timeline.mark("image-ready");
    let sandbox = match &args.pod {
        Some(pod) => pod::join(context, pod, &args.machine).await?,
        None => pod::boot(context, &config, id, false, &args.machine, &timeline).await?,
    };
    cleanup.dir = Some(sandbox.dir().clone());
    let container = Container {
        args,
        id,
        sandbox: &sandbox,
        record: &cleanup.record,
    };
    let run = container.run(state, &source, volumes, &timeline);
    let outcome = match sandbox.is_owned() {
        true => tokio::select! {
            outcome = run => outcome,
            served = owner::serve(&context.paths, &sandbox) => served.map(|never| match never {})?,
        },
        false => run.await,
    };
    if let Some(file) = &args.timeline {
        timeline
            .write(file)
            .map_err(|e| Error::host(format!("writing {}", file.display()), e))?;
    }
    let exit = outcome?;
    let status = u8::try_from(exit.exit_status).unwrap_or(super::EXIT_FAILURE);
    sandbox.discard().await?;
    cleanup.keep_record = args.detach;
    cleanup.finish()?;
    Ok(status)
}

struct Container<'a> {
    args: &'a Args,
    id: &'a str,
    sandbox: &'a Sandbox,
    record: &'a Record,
}

impl Container<'_> {
    async fn run(
        &self,
        mut state: ContainerState,
        source: &Source,
        volumes: Vec<Mount>,
        timeline: &Arc<Timeline>,
    ) -> Result<Exit, Error> {
        let spec = self.spec(source, volumes)?;
        self.record.write_spec(&spec)?;
        let process = spec.process().as_ref();
        state.layers = source.layers();
        state.command = process
            .and_then(|process| process.args().clone())
            .unwrap_or_default();
        self.record.write(&state)?;
        let streams = self.create(&spec).await?;
        timeline.mark("created");
        let output = match self.args.detach {
            true => Output::log(&self.record.log())?,
            false => Output::Own,
        };
        SESSION.store(true, std::sync::atomic::Ordering::Relaxed);
        let session = Session {
            sandbox: self.sandbox,
            container: self.id,
            exec: "",
            terminal: self.args.tty,
            output,
            timeline: Some(Arc::clone(timeline)),
        };
        let mut running = state.clone();
        running.status = Status::Running;
        let started = |_pid| {
            if let Err(error) = self.record.write(&running) {
                tracing::warn!("{error}");
            }
        };
        let ended = session.run(streams, started).await;
        state.status = Status::exited(ended.as_ref().ok());
        self.record.write(&state)?;
        let exit = ended?;
        // A sandbox of its own goes with the container.
        if !self.sandbox.is_owned() {
            self.sandbox.delete(self.id, "").await?;
        }
        Ok(exit)
    }

    /// The container's OCI spec, with the guest's paths, its root file system and volumes in their places.
    fn spec(&self, source: &Source, volumes: Vec<Mount>) -> Result<Spec, Error> {
        let dir = self.sandbox.dir();
        let rootfs = dir.container_share(self.id).join("rootfs");
        let share = dir.container_share(self.id);
        std::fs::create_dir_all(&share)
            .map_err(|e| Error::host(format!("making {}", share.display()), e))?;
        source.mount(&rootfs, &dir.container_scratch(self.id))?;
        let options = SpecOptions {
            args: self.args.command.clone(),
            hostname: Some(dir.id().to_owned()),
            root: "rootfs".into(),
            env: self.args.env.clone(),
            terminal: self.args.tty,
            mounts: volumes,
            ..SpecOptions::default()
        };
        let mut spec = source.spec(&options, &rootfs)?;
        volume::share(dir, self.id, &mut spec, |_| None)?;
        if dir.read_state()?.resolv_conf {
            dns::mount(&mut spec);
        }
        Ok(spec)
    }

    async fn create(&self, spec: &Spec) -> Result<Streams, Error> {
        let wanted = wanted(self.args.interactive, self.args.tty);
        let (stdio, pending) = stdio::listen(&self.sandbox.dir().sockets(), wanted)?;
        let create = self.sandbox.create(self.id, spec, stdio);
        let (_, streams) = tokio::try_join!(create, pending.accept())?;
        Ok(streams)
    }
}

/// A container that is about to be made.
fn state(args: &Args, id: &str, sandbox: &str, volumes: Vec<Mount>) -> ContainerState {
    ContainerState {
        id: id.to_owned(),
        sandbox: sandbox.to_owned(),
        image: args.image.clone(),
        command: args.command.clone(),
        status: Status::Created,
        detached: args.detach,
        in_guest: None,
        layers: Vec::new(),
        volumes,
        runner: ProcessId::own(),
        created: now(),
    }
}

/// Takes back what a container has on the host, however its run ends.
struct Cleanup {
    record: Record,
    dir: Option<SandboxDir>,
    keep_record: bool,
    done: bool,
}

impl Cleanup {
    fn new(record: Record) -> Self {
        Self {
            record,
            dir: None,
            keep_record: false,
            done: false,
        }
    }

    fn finish(mut self) -> Result<(), Error> {
        self.done = true;
        self.clean()
    }

    fn clean(&self) -> Result<(), Error> {
        if let Some(dir) = &self.dir {
            dir.remove_container_files(self.record.id())?;
        }
        if !self.keep_record {
            self.record.clone().remove()?;
        }
        Ok(())
    }
}

impl Drop for Cleanup {
    fn drop(&mut self) {
        if !self.done
            && let Err(error) = self.clean()
        {
            tracing::warn!("removing container {}: {error}", self.record.id());
        }
    }
}
