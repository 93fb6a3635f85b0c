//! OCI runtime bundles: `config.json`, and the root file system that it names.

use std::io::Read;
use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;
use serde_json::Value;

use super::error::{Error, Result};
use super::source::open_regular;

/// Bytes of the largest `config.json`.
const CONFIG_BYTES: u64 = 8 << 20;

/// A bundle, read and checked.
#[derive(Debug)]
pub struct Bundle {
    /// Its `config.json`. `root.path` is as written; the guest has the root file system elsewhere.
    pub spec: Spec,
    /// The directory of the root file system, on the host.
    pub rootfs: PathBuf,
}

/// Reads the bundle in `dir`.
pub fn load(dir: &Path) -> Result<Bundle> {
    let path = dir.join("config.json");
    let what = path.display().to_string();
    let (file, _) = open_regular(&path)?;
    let mut text = Vec::new();
    let read = file
        .take(CONFIG_BYTES.saturating_add(1))
        .read_to_end(&mut text);
    read.map_err(|source| Error::Io {
        action: "read",
        path: path.clone(),
        source,
    })?;
    if text.len() as u64 > CONFIG_BYTES {
        return Err(Error::limit(what, format!("{CONFIG_BYTES} bytes")));
    }
    let spec = parse(&text, &what)?;
    let root = spec
        .root()
        .as_ref()
        .map(|root| root.path().clone())
        .unwrap_or_default();
    // An absolute path takes the place of `dir`.
    let rootfs = dir.join(root);
    match std::fs::metadata(&rootfs) {
        Ok(meta) if meta.is_dir() => Ok(Bundle { spec, rootfs }),
        Ok(_) => Err(Error::malformed(
            what,
            format!("root.path: {} is not a directory", rootfs.display()),
        )),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(Error::Missing {
            what: format!("the root file system {} (root.path)", rootfs.display()),
            place: format!("the bundle {}", dir.display()),
        }),
        Err(source) => Err(Error::Io {
            action: "look at",
            path: rootfs,
            source,
        }),
    }
}

/// Reads and checks a `config.json`; `what` names it in errors. Errors name the field.
pub fn parse(text: &[u8], what: &str) -> Result<Spec> {
    let refuse = |reason: String| Error::malformed(what, reason);
    let value: Value = serde_json::from_slice(text)
        .map_err(|error| refuse(format!("it is not valid JSON: {error}")))?;
    check(&value).map_err(refuse)?;
    serde_json::from_value(value).map_err(|error| refuse(error.to_string()))
}

/// What a container cannot do without. The type's own messages do not say where a field was missing.
fn check(value: &Value) -> std::result::Result<(), String> {
    let version = text(value, "ociVersion")?;
    if !version.starts_with("1.") {
        return Err(format!(
            "ociVersion: version {version:?} is not supported, only 1.x"
        ));
    }
    section(value, "root")?;
    path(text(value, "root.path")?, "root.path")?;
    section(value, "process")?;
    let args = get(value, "process.args").and_then(Value::as_array);
    let args = args.ok_or("process.args: missing, or not a list")?;
    if args.is_empty() {
        return Err("process.args: empty: there is nothing to run".to_owned());
    }
    strings(args, "process.args")?;
    if let Some(env) = get(value, "process.env").filter(|env| !env.is_null()) {
        strings(
            env.as_array().ok_or("process.env: not a list")?,
            "process.env",
        )?;
    }
    let cwd = text(value, "process.cwd")?;
    path(cwd, "process.cwd")?;
    if !cwd.starts_with('/') {
        return Err(format!("process.cwd: {cwd:?} is not an absolute path"));
    }
    section(value, "process.user")?;
    Ok(())
}

fn get<'a>(value: &'a Value, field: &str) -> Option<&'a Value> {
    field
        .split('.')
        .try_fold(value, |value, key| value.get(key))
}

fn section(value: &Value, field: &str) -> std::result::Result<(), String> {
    match get(value, field) {
        Some(Value::Object(_)) => Ok(()),
        Some(_) => Err(format!("{field}: not an object")),
        None => Err(format!("{field}: missing")),
    }
}

fn text<'a>(value: &'a Value, field: &str) -> std::result::Result<&'a str, String> {
    match get(value, field) {
        Some(Value::String(text)) if text.is_empty() => Err(format!("{field}: empty")),
        Some(Value::String(text)) => Ok(text),
        Some(_) => Err(format!("{field}: not a string")),
        None => Err(format!("{field}: missing")),
    }
}

fn path(text: &str, field: &str) -> std::result::Result<(), String> {
    if text.contains('\0') {
        Err(format!("{field}: has a zero byte"))
    } else {
        Ok(())
    }
}

fn strings(values: &[Value], field: &str) -> std::result::Result<(), String> {
    for (index, value) in values.iter().enumerate() {
        let text = value
            .as_str()
            .ok_or_else(|| format!("{field}[{index}]: not a string"))?;
        path(text, &format!("{field}[{index}]"))?;
    }
    Ok(())
}

#[cfg(test)]
#[path = "bundle_tests.rs"]
mod tests;
