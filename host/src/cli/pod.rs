//! A pod's sandbox: booted in the foreground by the only container's `run`, or owned by a process in the background
//! for as long as the pod lives.

use std::ffi::OsString;
use std::fs::File;
use std::path::PathBuf;

use super::{Context, Error, background, dns};
use crate::config::Config;
use crate::hypervisor::{self, Disk};
use crate::paths::Paths;
use crate::sandbox::dir::SandboxDir;
use crate::sandbox::{Sandbox, SandboxSpec};
use crate::size;
use crate::snapshot::owner;
use crate::template;
use crate::timeline::Timeline;

/// The virtual machine's shape.
#[derive(Clone, Debug, clap::Args)]
pub struct MachineArgs {
    /// What runs the virtual machine: auto, kvm or qemu [default: auto]
    #[arg(long, value_name = "NAME", value_parser = ["auto", "kvm", "qemu"])]
    pub hypervisor: Option<String>,
    /// The virtual machine's memory, such as 512M [default: 256M]
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<String>,
    /// The virtual machine's CPUs, 1 to 32 [default: 1]
    #[arg(long, value_name = "N")]
    pub cpus: Option<u32>,
    /// The network namespace whose interfaces the sandbox gets, as CNI or `ip netns` made it [default: no network]
    #[arg(long, value_name = "PATH")]
    pub netns: Option<PathBuf>,
}

/// The process that owns a pod's sandbox
#[derive(Debug, clap::Args)]
pub struct Args {
    id: String,
    #[command(flatten)]
    machine: MachineArgs,
}

/// The smallest guest memory that boots, and the largest that makes sense to ask for.
const MEMORY: std::ops::RangeInclusive<u64> = 64 << 20..=1 << 42;

/// Boots a sandbox that this process owns.
pub async fn boot(
    context: &Context,
    config: &Config,
    id: &str,
    pod: bool,
    machine: &MachineArgs,
    timeline: &Timeline,
) -> Result<Sandbox, Error> {
    boot_with_disks(context, config, id, pod, machine, timeline, Vec::new()).await
}

/// As [`boot`], with disks that nobody's command line asks for.
pub async fn boot_with_disks(
    context: &Context,
    config: &Config,
    id: &str,
    pod: bool,
    machine: &MachineArgs,
    timeline: &Timeline,
    disks: Vec<Disk>,
) -> Result<Sandbox, Error> {
    let name = machine.hypervisor.as_deref().unwrap_or(&config.hypervisor);
    let hypervisor =
        hypervisor::choose(name, &context.paths.qemu).map_err(crate::sandbox::Error::from)?;
    if let Some(warning) = &hypervisor.warning {
        eprintln!("cella: {warning}");
    }
    let hypervisor = hypervisor.hypervisor;
    let (vcpus, memory_bytes) = size_up(config, machine)?;
    let spec = SandboxSpec {
        pod,
        vcpus,
        memory_bytes,
        hostname: id.to_owned(),
        sysctls: Default::default(),
        cmdline: config.kernel_params.clone(),
        console: console(context)?,
        template: config.template,
        pool: config.pool > 0,
        netns: machine.netns.clone(),
        resolv_conf: machine
            .netns
            .as_deref()
            .map_or(String::new(), dns::resolv_conf),
        disks,
    };
    timeline.mark("vm-spawning");
    let dir = SandboxDir::new(&context.paths, id)?;
    let sandbox = Sandbox::boot(&context.paths, dir, hypervisor.as_ref(), spec, timeline).await?;
    template::background::provide(&context.paths, config, &sandbox);
    Ok(sandbox)
}

/// How many CPUs a sandbox gets, and how many bytes of memory.
pub(super) fn size_up(config: &Config, machine: &MachineArgs) -> Result<(u32, u64), Error> {
    let memory = machine.memory.as_deref().map(size::parse).transpose();
    let memory_bytes = memory
        .map_err(|e| Error::usage(format!("--memory: {e}")))?
        .unwrap_or(config.memory_bytes);
    if !MEMORY.contains(&memory_bytes) || memory_bytes % (1 << 20) != 0 {
        return Err(Error::usage(format!(
            "a sandbox's memory is 64 MiB to 4 TiB in whole MiB, not {memory_bytes} bytes"
        )));
    }
    let vcpus = machine.cpus.unwrap_or(config.cpus);
    if !(1..=32).contains(&vcpus) {
        return Err(Error::usage(format!(
            "a sandbox has 1 to 32 CPUs, not {vcpus}"
        )));
    }
    Ok((vcpus, memory_bytes))
}

/// Attaches to a pod's sandbox; boots it first, in the background, if it does not run.
pub async fn join(context: &Context, id: &str, machine: &MachineArgs) -> Result<Sandbox, Error> {
    let dir = SandboxDir::new(&context.paths, id)?;
    if !dir.is_owned() {
        match background::spawn(&owner_arguments(context, id, machine), &[]) {
            Err(Error::Background { message, .. }) if dir.is_owned() => {
                // Another process was faster.
                tracing::debug!("{message}");
            }
            other => other?,
        }
    }
    Ok(Sandbox::attach(dir).await?)
}

/// Owns a pod's sandbox until it is told to end (SIGTERM) or its virtual machine has ended.
pub async fn main(context: &Context, args: Args) -> Result<u8, Error> {
    use tokio::signal::unix::{SignalKind, signal};
    let config = Config::load(&context.paths)?;
    let mut term =
        signal(SignalKind::terminate()).map_err(|e| Error::host("watching for signals", e))?;
    let timeline = Timeline::new();
    let sandbox = boot(context, &config, &args.id, true, &args.machine, &timeline).await?;
    background::report_ready();
    tokio::select! {
        _ = term.recv() => sandbox.stop().await?,
        ended = sandbox.ended() => {
            tracing::info!("sandbox {} ended: {}", args.id, ended.message);
            sandbox.stop().await?;
        }
        served = owner::serve(&context.paths, &sandbox) => served.map(drop)?,
    }
    Ok(0)
}

fn owner_arguments(context: &Context, id: &str, machine: &MachineArgs) -> Vec<OsString> {
    let paths = &context.paths;
    let mut arguments: Vec<OsString> = vec!["pod-owner".into()];
    // The owner runs in another directory.
    let netns = machine.netns.as_ref();
    let netns = netns.map(|path| std::path::absolute(path).unwrap_or(path.clone()));
    add_paths(&mut arguments, paths);
    let mut flag = |name: &str, value: Option<OsString>| {
        if let Some(value) = value {
            arguments.push(name.into());
            arguments.push(value);
        }
    };
    flag("--hypervisor", machine.hypervisor.clone().map(Into::into));
    flag("--memory", machine.memory.clone().map(Into::into));
    flag("--netns", netns.map(Into::into));
    flag("--cpus", machine.cpus.map(|cpus| cpus.to_string().into()));
    if context.debug {
        arguments.push("--debug".into());
    }
    arguments.push("--".into());
    arguments.push(id.into());
    arguments
}

/// The flags that give another `cella` these paths.
pub(super) fn add_paths(arguments: &mut Vec<OsString>, paths: &Paths) {
    let flags = [
        ("--run-dir", Some(&paths.run_dir)),
        ("--lib-dir", Some(&paths.lib_dir)),
        ("--libexec-dir", Some(&paths.libexec_dir)),
        ("--qemu", Some(&paths.qemu)),
        ("--config", paths.config.as_ref()),
    ];
    for (name, value) in flags {
        if let Some(value) = value {
            arguments.push(name.into());
            arguments.push(value.into());
        }
    }
}

/// With --debug, the guest's console is this process's standard error.
fn console(context: &Context) -> Result<Option<File>, Error> {
    if !context.debug {
        return Ok(None);
    }
    let stderr = rustix::stdio::stderr().try_clone_to_owned();
    stderr
        .map(|fd| Some(File::from(fd)))
        .map_err(|e| Error::host("giving standard error to the guest's console", e))
}
