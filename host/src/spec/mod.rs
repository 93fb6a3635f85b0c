//! The OCI runtime specification of a container, made from an image as `docker run` makes it.
//!
//! What Cella does otherwise than docker, because the container is in a virtual machine with its pod:
//!
//! - The network, ipc and uts namespaces are listed without a path: the guest's agent joins the pod's.
//! - `Volumes` of an image get no anonymous volume. Their directories are made, and what is written to
//!   them is gone with the container, as the rest of its root file system is.
//! - Docker's AppArmor profile has no counterpart, since the guest's kernel has no AppArmor.

mod defaults;
mod seccomp;
mod signal;
mod user;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use oci_spec::image::Config;
use oci_spec::runtime::{Mount, Spec};
use serde_json::{Value, json};

use crate::image::{Error, Image, Result};

pub use signal::parse_signal;
pub use user::{ResolvedUser, resolve as resolve_user, resolve_in as resolve_user_in};

/// The annotation that keeps an image's `StopSignal` (OCI image specification, conversion).
pub const STOP_SIGNAL: &str = "org.opencontainers.image.stopSignal";
/// Bytes of the longest host name that the kernel takes.
const HOSTNAME_BYTES: usize = 64;
/// Where programs are looked for when neither image nor caller says.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a caller adds to an image, or overrules.
#[derive(Clone, Debug, Default)]
pub struct SpecOptions {
    /// The root file system as the guest sees it.
    pub root: PathBuf,
    /// Makes the root file system read-only.
    pub readonly: bool,
    /// Takes the place of the image's `Entrypoint`, and drops its `Cmd`.
    pub entrypoint: Option<Vec<String>>,
    /// Takes the place of the image's `Cmd`, if not empty.
    pub args: Vec<String>,
    /// `NAME=VALUE`, overruling the image's `Env`.
    pub env: Vec<String>,
    /// Takes the place of the image's `WorkingDir`.
    pub cwd: Option<String>,
    /// Takes the place of the image's `User`.
    pub user: Option<String>,
    /// The process gets a terminal.
    pub terminal: bool,
    /// The pod's host name, for `HOSTNAME` and the uts namespace.
    pub hostname: Option<String>,
    /// Mounts on top of the default ones; one with the destination of a default mount replaces it.
    pub mounts: Vec<Mount>,
    /// The guest's directory that is the pod's shared `/dev/shm`; without one, the container gets a
    /// tmpfs of its own of 64 MiB.
    pub shm: Option<PathBuf>,
    /// The container's cgroup; the agent chooses where nothing is said.
    pub cgroups_path: Option<PathBuf>,
    /// Further annotations.
    pub annotations: BTreeMap<String, String>,
}

/// The specification for a container of `image`. Users are looked up in the root file system mounted
/// at `rootfs` on the host; nothing there is changed.
pub fn for_image(image: &Image, options: &SpecOptions, rootfs: &Path) -> Result<Spec> {
    let empty = Config::default();
    let config = image.config.config().as_ref().unwrap_or(&empty);
    let process = process(config, options, rootfs)?;
    let mut spec = json!({
        "ociVersion": "1.2.0",
        "process": process,
        "root": { "path": path_text(&options.root, "root")?, "readonly": options.readonly },
        "mounts": defaults::mounts(options.shm.as_deref().map(|shm| path_text(shm, "shm")).transpose()?),
        "annotations": annotations(image, config, options),
        "linux": {
            "resources": { "devices": defaults::device_rules() },
            "namespaces": defaults::namespaces(),
            "maskedPaths": defaults::MASKED_PATHS,
            "readonlyPaths": defaults::READONLY_PATHS,
            "seccomp": seccomp::profile(),
        },
    });
    if let Some(hostname) = &options.hostname {
        if hostname.is_empty() || hostname.len() > HOSTNAME_BYTES || hostname.contains('\0') {
            return Err(Error::option(
                format!("host name {hostname:?}"),
                format!("it has not 1 to {HOSTNAME_BYTES} characters"),
            ));
        }
        set(&mut spec, "hostname", json!(hostname));
    }
    if let Some(path) = &options.cgroups_path {
        let path = path_text(path, "cgroup")?;
        if let Some(linux) = spec.get_mut("linux") {
            set(linux, "cgroupsPath", json!(path));
        }
    }
    let mut spec: Spec = serde_json::from_value(spec)
        .map_err(|error| Error::malformed("the specification made", error.to_string()))?;
    add_mounts(&mut spec, &options.mounts)?;
    Ok(spec)
}

/// Makes the directories in `rootfs` that a container of `image` expects: its working directory (that
/// of `spec`, if there is one) and its volumes. Links in the image are followed as in a chroot.
pub fn make_directories(image: &Image, spec: &Spec, rootfs: &Path) -> Result<()> {
    let volumes = image
        .config
        .config()
        .as_ref()
        .and_then(|config| config.volumes().clone());
    let mut paths: Vec<PathBuf> = volumes
        .unwrap_or_default()
        .into_iter()
        .map(PathBuf::from)
        .collect();
    paths.extend(spec.process().as_ref().map(|process| process.cwd().clone()));
    crate::image::make_directories(rootfs, &paths)
}

/// The signal that asks a container of `spec` to end: its image's `StopSignal`, or SIGTERM.
///
/// # Errors
/// The image names no signal.
pub fn stop_signal(spec: &Spec) -> Result<u32> {
    let annotations = spec.annotations().as_ref();
    match annotations
        .and_then(|all| all.get(STOP_SIGNAL))
        .map(String::as_str)
    {
        None | Some("") => Ok(libc::SIGTERM.unsigned_abs()),
        Some(name) => parse_signal(name).ok_or_else(|| {
            Error::malformed(
                "the image's StopSignal",
                format!("{name:?} is not a signal"),
            )
        }),
    }
}

fn process(config: &Config, options: &SpecOptions, rootfs: &Path) -> Result<Value> {
    let user = options
        .user
        .as_deref()
        .or(config.user().as_deref())
        .unwrap_or_default();
    let user = resolve_user(user, rootfs)?;
    let cwd = options
        .cwd
        .as_deref()
        .or(config.working_dir().as_deref())
        .unwrap_or_default();
    let cwd = if cwd.is_empty() { "/" } else { cwd };
    if !cwd.starts_with('/') || cwd.contains('\0') {
        return Err(Error::option(
            format!("working directory {cwd:?}"),
            "it is not an absolute path",
        ));
    }
    Ok(json!({
        "terminal": options.terminal,
        "user": { "uid": user.uid, "gid": user.gid, "additionalGids": user.groups },
        "args": args(config, options)?,
        "env": env(config, options, &user.home)?,
        "cwd": cwd,
        "capabilities": {
            "bounding": defaults::CAPABILITIES,
            "effective": defaults::CAPABILITIES,
            "permitted": defaults::CAPABILITIES,
            "inheritable": [],
            "ambient": [],
        },
        "rlimits": [{ "type": "RLIMIT_NOFILE", "soft": 1024, "hard": 524_288 }],
        "noNewPrivileges": false,
        "oomScoreAdj": 0,
    }))
}

fn args(config: &Config, options: &SpecOptions) -> Result<Vec<String>> {
    let image_list = |list: &Option<Vec<String>>| list.clone().unwrap_or_default();
    let (mut args, image_cmd) = match &options.entrypoint {
        Some(entrypoint) => (entrypoint.clone(), Vec::new()),
        None => (image_list(config.entrypoint()), image_list(config.cmd())),
    };
    args.extend(if options.args.is_empty() {
        image_cmd
    } else {
        options.args.clone()
    });
    if args.is_empty() {
        return Err(Error::option(
            "command",
            "none was given, and the image has none",
        ));
    }
    if let Some(bad) = args.iter().find(|arg| arg.contains('\0')) {
        return Err(Error::option(
            format!("argument {bad:?}"),
            "it has a zero byte",
        ));
    }
    Ok(args)
}

/// The environment: defaults, then the image's, then the caller's; a later value takes the place of an
/// earlier one of the same name.
fn env(config: &Config, options: &SpecOptions, home: &str) -> Result<Vec<String>> {
    let mut env = vec![PATH.to_owned()];
    env.extend(
        options
            .hostname
            .as_ref()
            .map(|hostname| format!("HOSTNAME={hostname}")),
    );
    if options.terminal {
        env.push("TERM=xterm".to_owned());
    }
    set_env(&mut env, config.env().iter().flatten(), "the image's Env")?;
    set_env(&mut env, &options.env, "environment")?;
    if !has_env(&env, "HOME") {
        env.push(format!("HOME={home}"));
    }
    Ok(env)
}

/// Sets variables, given as `NAME=VALUE`, in an environment; `what` names their source in errors.
///
/// # Errors
/// One is not of that form.
pub fn set_env<'a>(
    env: &mut Vec<String>,
    given: impl IntoIterator<Item = &'a String>,
    what: &str,
) -> Result<()> {
    for entry in given {
        let what = format!("{what} {entry:?}");
        let name = match entry.split_once('=') {
            Some(("", _)) | None => return Err(Error::option(what, "it is not NAME=VALUE")),
            Some(_) if entry.contains('\0') => {
                return Err(Error::option(what, "it has a zero byte"));
            }
            Some((name, _)) => name,
        };
        match env.iter_mut().find(|old| has_name(old, name)) {
            Some(old) => old.clone_from(entry),
            None => env.push(entry.clone()),
        }
    }
    Ok(())
}

/// Whether an environment has a variable of this name.
pub fn has_env(env: &[String], name: &str) -> bool {
    env.iter().any(|entry| has_name(entry, name))
}

fn has_name(entry: &str, name: &str) -> bool {
    entry
        .strip_prefix(name)
        .is_some_and(|rest| rest.starts_with('='))
}

fn annotations(image: &Image, config: &Config, options: &SpecOptions) -> BTreeMap<String, String> {
    let mut annotations = BTreeMap::new();
    if let Some(signal) = config.stop_signal() {
        annotations.insert(STOP_SIGNAL.to_owned(), signal.clone());
    }
    if let Some(digest) = &image.digest {
        annotations.insert("dev.cella.image.digest".to_owned(), digest.to_string());
    }
    annotations.extend(options.annotations.clone());
    annotations
}

/// Adds mounts; each takes the place of one with its destination.
///
/// # Errors
/// A destination is not an absolute path.
pub fn add_mounts(spec: &mut Spec, added: &[Mount]) -> Result<()> {
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for mount in added {
        let destination = mount.destination();
        if !destination.is_absolute() {
            return Err(Error::option(
                format!("mount at {}", destination.display()),
                "its destination is not an absolute path",
            ));
        }
        mounts.retain(|other| other.destination() != destination);
        mounts.push(mount.clone());
    }
    spec.set_mounts(Some(mounts));
    Ok(())
}

fn path_text<'a>(path: &'a Path, what: &str) -> Result<&'a str> {
    path.to_str().ok_or_else(|| {
        Error::option(
            format!("{what} path {}", path.display()),
            "it is not valid UTF-8",
        )
    })
}

fn set(value: &mut Value, key: &str, to: Value) {
    if let Some(object) = value.as_object_mut() {
        object.insert(key.to_owned(), to);
    }
}

#[cfg(test)]
mod tests;
