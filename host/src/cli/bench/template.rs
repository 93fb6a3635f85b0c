//! What a sandbox from a template costs.

use std::fs;
use std::io::Read;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::container;
use super::process::median;
use super::{Context, Error, Options};
use crate::cli::pod;
use crate::config::Config;
use crate::container as record;
use crate::hypervisor;
use crate::sandbox::{Sandbox, TemplateUse};
use crate::template::{self, Shape};
use crate::timeline::Timeline;

/// How many clones are measured; the median counts.
const ROUNDS: usize = 5;

/// Clones of a template, which is built first if there is none: the time until a clone has answered its set-up, the host's
/// processor time for it, and what an idle clone has for itself. Nothing where machines cannot be saved.
pub async fn clones(context: &Context, options: &Options) -> Result<Option<Value>, Error> {
    let config = Config {
        template: true,
        pool: 0,
        ..Config::load(&context.paths)?
    };
    let machine = &options.machine;
    let name = machine.hypervisor.as_deref().unwrap_or(&config.hypervisor);
    let choice =
        hypervisor::choose(name, &context.paths.qemu).map_err(crate::sandbox::Error::from)?;
    if !choice.hypervisor.saves() {
        return Ok(None);
    }
    let (vcpus, memory_bytes) = pod::size_up(&config, machine)?;
    let network = machine.netns.is_some();
    let shape = Shape::serving(vcpus, memory_bytes, network, &config.kernel_params);
    let limit = config.template_limit;
    template::build(&context.paths, choice.hypervisor.as_ref(), &shape, limit).await?;
    let (mut times, mut host, mut guest, mut private) = (vec![], vec![], vec![], vec![]);
    for _ in 0..ROUNDS {
        let id = format!("bench-{}", record::new_id()?);
        let (own, begin) = (own_cpu(), Instant::now());
        let timeline = Timeline::new();
        let sandbox = pod::boot(context, &config, &id, false, machine, &timeline).await?;
        times.push(begin.elapsed().as_secs_f64() * 1e3);
        if sandbox.template_use() != Some(&TemplateUse::Cloned) {
            return Err(Error::usage("the sandbox was booted, not cloned"));
        }
        let vmm = vmm_cpu(&sandbox);
        host.push((own_cpu().saturating_sub(own) + vmm.host).as_secs_f64() * 1e3);
        guest.push(vmm.guest.as_secs_f64() * 1e3);
        private.push(private_kib(&sandbox)?);
        sandbox.stop().await?;
    }
    let mut outputs = vec![];
    for _ in 0..ROUNDS {
        outputs.push(first_output(context, &config, options).await?);
    }
    Ok(Some(json!({
        "template_ms": median(times),
        "template_host_cpu_ms": median(host),
        "template_guest_cpu_ms": median(guest),
        "clone_private_kib": median(private),
        "template_first_output_ms": median(outputs),
    })))
}

/// Milliseconds from the request for a clone to the first output of a container in it.
async fn first_output(context: &Context, config: &Config, options: &Options) -> Result<f64, Error> {
    let action = "waiting for a container's first output";
    let id = format!("bench-{}", record::new_id()?);
    let (begin, timeline) = (Instant::now(), Timeline::new());
    let sandbox = pod::boot(context, config, &id, false, &options.machine, &timeline).await?;
    let command = ["/bin/busybox", "echo", "first"];
    let streams = container::container(&sandbox, "c", options, &command).await?;
    sandbox.start("c", "").await?;
    let Some(mut stdout) = streams.stdout else {
        return Err(Error::usage("the container has no streams"));
    };
    let read = tokio::task::spawn_blocking(move || stdout.read_exact(&mut [0]));
    read.await
        .map_err(std::io::Error::other)
        .and_then(|read| read)
        .map_err(|e| Error::host(action, e))?;
    let elapsed = begin.elapsed().as_secs_f64() * 1e3;
    sandbox.stop().await?;
    Ok(elapsed)
}

/// Processor time of this process and of the children that it has waited for.
fn own_cpu() -> Duration {
    [libc::RUSAGE_SELF, libc::RUSAGE_CHILDREN]
        .into_iter()
        .map(|who| {
            // SAFETY: all zeros is a valid rusage.
            let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
            // SAFETY: `usage` is a valid place for the result.
            unsafe { libc::getrusage(who, &raw mut usage) };
            of_timeval(usage.ru_utime) + of_timeval(usage.ru_stime)
        })
        .sum()
}

fn of_timeval(time: libc::timeval) -> Duration {
    Duration::from_secs(u64::try_from(time.tv_sec).unwrap_or(0))
        + Duration::from_micros(u64::try_from(time.tv_usec).unwrap_or(0))
}

/// Processor time of a VMM.
#[derive(Default)]
struct VmmCpu {
    host: Duration,
    /// Of its vCPUs' threads.
    guest: Duration,
}

fn vmm_cpu(sandbox: &Sandbox) -> VmmCpu {
    let mut cpu = VmmCpu::default();
    let tasks = fs::read_dir(format!("/proc/{}/task", sandbox.vmm_pid()));
    for task in tasks.into_iter().flatten().flatten() {
        let read = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let schedstat = read("schedstat");
        let ran = schedstat.split(' ').next().and_then(|ns| ns.parse().ok());
        let ran = Duration::from_nanos(ran.unwrap_or(0));
        match read("comm").starts_with("vcpu") {
            true => cpu.guest += ran,
            false => cpu.host += ran,
        }
    }
    cpu
}

/// What only this VMM has in memory, KiB: pages that it wrote, guest memory among them.
fn private_kib(sandbox: &Sandbox) -> Result<f64, Error> {
    let path = format!("/proc/{}/smaps_rollup", sandbox.vmm_pid());
    let text = fs::read_to_string(&path).map_err(|e| Error::host(format!("reading {path}"), e))?;
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix("Private_Dirty:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    Ok(kib.unwrap_or(0.0))
}
