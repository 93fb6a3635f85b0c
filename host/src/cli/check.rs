//! `cella check`: what this host can do, and what is missing, item by item.

use std::path::Path;

use serde::Serialize;

use super::{Context, Error};
use crate::config::Config;
use crate::hypervisor::qemu::Qemu;
use crate::hypervisor::{choose, kvm};

/// Show what this host can do; exit 0 only if a sandbox can run
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  cella check\n  cella check --json")]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Item {
    name: &'static str,
    ok: bool,
    /// Without it no sandbox runs.
    required: bool,
    detail: String,
}

/// Prints the items.
pub fn main(context: &Context, args: &Args) -> Result<u8, Error> {
    let items = items(context);
    let can_run = items.iter().all(|item| item.ok || !item.required);
    if args.json {
        println!(
            "{}",
            serde_json::json!({ "can_run": can_run, "items": items })
        );
    } else {
        for item in &items {
            let mark = match (item.ok, item.required) {
                (true, _) => "ok     ",
                (false, true) => "MISSING",
                (false, false) => "absent ",
            };
            println!("{mark}  {:<22} {}", item.name, item.detail);
        }
        println!(
            "{}",
            match can_run {
                true => "A sandbox can run here.",
                false => "No sandbox can run here.",
            }
        );
    }
    Ok(if can_run { 0 } else { super::EXIT_FAILURE })
}

fn items(context: &Context) -> Vec<Item> {
    let paths = &context.paths;
    vec![
        result("root", true, root()),
        result("hypervisor", true, hypervisor(context)),
        result("kvm", false, kvm_item()),
        hardware(),
        result("qemu", false, qemu(&paths.qemu)),
        file("VMM", &paths.vmm()),
        file("guest kernel", &paths.kernel()),
        file("guest image", &paths.initrd()),
        result("configuration", true, configuration(context)),
        result("user namespaces", true, exists("/proc/self/ns/user")),
        result("overlayfs", true, filesystem("overlay")),
        result("Landlock", false, landlock()),
        result("run directory", true, writable(&paths.run_dir)),
        result("library directory", true, writable(&paths.lib_dir)),
    ]
}

fn result(name: &'static str, required: bool, result: Result<String, String>) -> Item {
    let ok = result.is_ok();
    let detail = result.unwrap_or_else(|why| why);
    Item {
        name,
        ok,
        required,
        detail,
    }
}

fn root() -> Result<String, String> {
    match rustix::process::geteuid().is_root() {
        true => Ok("user 0".into()),
        false => Err("mounts, namespaces and /dev/kvm need root".into()),
    }
}

/// What the configured choice leads to, and why.
fn hypervisor(context: &Context) -> Result<String, String> {
    let config = Config::load(&context.paths).map_err(|e| e.to_string())?;
    let chosen = choose(&config.hypervisor, &context.paths.qemu);
    let chosen = chosen.map_err(|e| e.to_string())?;
    let name = chosen.hypervisor.name();
    Ok(match (config.hypervisor.as_str(), chosen.warning) {
        ("auto", Some(why)) => format!(
            "{name} by \"auto\": {why}; better: a machine with VT-x or SVM (or nested virtualization) and its kvm module"
        ),
        ("auto", None) => format!("{name} by \"auto\": /dev/kvm can be used"),
        _ => format!("{name}, as configured"),
    })
}

fn kvm_item() -> Result<String, String> {
    kvm::open_kvm()
        .map(|_| "/dev/kvm can be opened".into())
        .map_err(|e| e.to_string())
}

fn qemu(program: &Path) -> Result<String, String> {
    let found = Qemu::find(program).map_err(|e| e.to_string())?;
    let version = found.version().map_err(|e| e.to_string())?;
    Ok(format!(
        "{} ({version}), software emulation for hosts without KVM: slow, and no security boundary",
        found.program().display()
    ))
}

/// Where the CPU shows neither VT-x nor SVM, KVM works, but it emulates the guest's kernel.
fn hardware() -> Item {
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let found = flags
        .split_whitespace()
        .find(|word| matches!(*word, "vmx" | "svm"));
    let answer = match found {
        Some(flag) => Ok(format!("{flag}: guests run at full speed")),
        None => Err(
            "neither vmx nor svm: if /dev/kvm works, the guest's kernel is emulated and slow"
                .into(),
        ),
    };
    result("hardware virtualization", false, answer)
}

fn file(name: &'static str, path: &Path) -> Item {
    let answer = match std::fs::metadata(path) {
        Ok(meta) => Ok(format!("{} ({} KiB)", path.display(), meta.len() / 1024)),
        Err(e) => Err(format!(
            "{}: {e}; make install puts it there, --libexec-dir names another place",
            path.display()
        )),
    };
    result(name, true, answer)
}

fn configuration(context: &Context) -> Result<String, String> {
    let config = Config::load(&context.paths).map_err(|e| e.to_string())?;
    Ok(format!(
        "hypervisor {}, {} CPU, {} MiB",
        config.hypervisor,
        config.cpus,
        config.memory_bytes >> 20
    ))
}

fn exists(path: &str) -> Result<String, String> {
    match Path::new(path).exists() {
        true => Ok("there".into()),
        false => Err(format!("{path} is not there")),
    }
}

fn filesystem(name: &str) -> Result<String, String> {
    let known = std::fs::read_to_string("/proc/filesystems").map_err(|e| e.to_string())?;
    match known.split_whitespace().any(|word| word == name) {
        true => Ok("there".into()),
        false => Err(format!(
            "the kernel does not know {name} (its module may load on demand)"
        )),
    }
}

fn landlock() -> Result<String, String> {
    // SAFETY: with no attributes and LANDLOCK_CREATE_RULESET_VERSION the call only returns a number.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0, 0, 1) };
    match version {
        1.. => Ok(format!("ABI {version}")),
        _ => Err("not in this kernel: the VMM's jail does without".into()),
    }
}

/// The directory, or the nearest one above it that exists, can be written.
fn writable(path: &Path) -> Result<String, String> {
    let existing = path.ancestors().find(|dir| dir.exists()).unwrap_or(path);
    rustix::fs::access(existing, rustix::fs::Access::WRITE_OK)
        .map(|()| path.display().to_string())
        .map_err(|e| format!("{}: {e}", existing.display()))
}
