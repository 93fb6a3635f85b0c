//! A guest image with a minimal container in it, whose creation and start the agent's measuring mode carries out: its root
//! holds one program of three instructions, and it has the specification that the host makes for such an image.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use cella_host::image::{ImageRef, Store};
use cella_host::spec::{SpecOptions, for_image};

use super::Error;
use super::count::{piped, said};

/// Where the agent looks for it.
const MEASURED: &str = "measured";
/// exit(0)
const PROGRAM: &str = ".globl _start\n_start: xor %edi, %edi; mov $60, %eax; syscall\n";

/// `initrd` with the container's archive behind it, in `dir`.
///
/// # Errors
/// No compiler, no cpio, or a file that cannot be written.
pub fn archive(initrd: &Path, dir: &Path) -> Result<PathBuf, Error> {
    let system = |doing, path: &Path| Error::system(doing, path.display().to_string());
    let top = dir.join("container");
    let rootfs = top.join(MEASURED).join("rootfs");
    for name in ["dev", "proc", "sys"] {
        let path = rootfs.join(name);
        fs::create_dir_all(&path).map_err(system("making", &path))?;
    }
    compile(&rootfs.join("true"), dir)?;
    let spec = top.join(MEASURED).join("config.json");
    fs::write(&spec, specification(&rootfs, dir)?).map_err(system("writing", &spec))?;
    let names = [
        "",
        "/config.json",
        "/rootfs",
        "/rootfs/dev",
        "/rootfs/proc",
        "/rootfs/sys",
        "/rootfs/true",
    ];
    let names: String = names
        .iter()
        .flat_map(|name| [MEASURED, name, "\0"])
        .collect();
    let mut cpio = Command::new("cpio");
    cpio.args([
        "--null",
        "-o",
        "-H",
        "newc",
        "-R",
        "0:0",
        "--reproducible",
        "--quiet",
    ]);
    let container = piped(
        cpio.current_dir(&top),
        names.as_bytes(),
        "archiving the measured container",
    )?;
    let mut both = fs::read(initrd).map_err(system("reading", initrd))?;
    // Each archive begins at a multiple of 4.
    both.resize(both.len().next_multiple_of(4), 0);
    both.extend(container);
    let path = dir.join("initrd-with-container.cpio");
    fs::write(&path, both).map_err(system("writing", &path))?;
    Ok(path)
}

fn compile(program: &Path, dir: &Path) -> Result<(), Error> {
    let source = dir.join("true.s");
    fs::write(&source, PROGRAM).map_err(Error::system("writing", source.display()))?;
    let mut gcc = Command::new("gcc");
    gcc.args(["-static", "-nostdlib", "-s", "-o"])
        .arg(program)
        .arg(&source);
    said(&mut gcc, "compiling the measured container's program").map(drop)
}

/// As `cella run` has it made for a root file system without an image's wishes.
fn specification(rootfs: &Path, dir: &Path) -> Result<String, Error> {
    let store = Store::open(dir.join("store"))?;
    let image = store.prepare(&ImageRef::parse(&format!("rootfs:{}", rootfs.display()))?)?;
    let options = SpecOptions {
        root: Path::new("/").join(MEASURED).join("rootfs"),
        args: vec!["/true".to_owned()],
        hostname: Some(MEASURED.to_owned()),
        ..SpecOptions::default()
    };
    let spec = for_image(&image, &options, rootfs)?;
    serde_json::to_string(&spec).map_err(|error| Error::Count(error.to_string()))
}
