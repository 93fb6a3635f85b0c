//! `cella-vmm`: one virtual machine in one jailed process, driven over the socket that `--control` names.

use std::ffi::OsString;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use cella_vmm::control::{self, Context, ControlError, now_us};
use cella_vmm::jail::{self, Jail, JailError, Program};

const HELP: &str = "\
cella-vmm: one KVM virtual machine in a jailed process, driven over vmm.proto by the program that starts it

    cella-vmm --control FD --share DIR --sockets DIR --uid N --gid N [--pid-fd FD] [--name ID]
        [--companion PATH [--companion-kernel FILE] [--companion-initrd FILE] [--companion-fd FD]... -- ARG...]

    --control FD    an inherited SOCK_SEQPACKET socket to the starting program
    --share DIR     the directory that the guest's virtiofs serves
    --sockets DIR   the directory of the sockets that the guest's vsock connects to, each named after its port
    --uid N         the user that the process becomes
    --gid N         the group that the process becomes
    --pid-fd FD     where to write the jailed process's id, decimal: it is not the id of the process started
    --name ID       what log lines and process listings call the machine
    --companion PATH
                    another hypervisor that runs the machine, as a process beside this one, unprivileged, in the same
                    namespaces and a root of its own; this one serves its devices, over vhost-user
    --companion-kernel FILE, --companion-initrd FILE
                    what the companion finds as /boot/kernel and /boot/initrd, until the guest uses a device
    --companion-fd FD
                    a descriptor that it inherits
    -- ARG...       its arguments
    --help          this text
    --version       the version

Example (as a door runs it, with the socket as descriptor 3):
    cella-vmm --control 3 --share /run/cella/web/share --sockets /run/cella/web/vsock --uid 990 --gid 990
";

const STDERR: RawFd = 2;

/// What the command line asks for.
#[derive(Debug, PartialEq, Eq)]
struct Options {
    control: RawFd,
    share: PathBuf,
    sockets: PathBuf,
    uid: u32,
    gid: u32,
    pid_fd: Option<RawFd>,
    name: Option<String>,
    companion: Option<Program>,
}

#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0} (see --help)")]
    Usage(String),
    #[error("entering the jail: {0}")]
    Jail(#[from] JailError),
    #[error(transparent)]
    Control(#[from] ControlError),
}

fn main() -> ExitCode {
    let entered_us = now_us();
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    match arguments.first().and_then(|first| first.to_str()) {
        Some("--help") => {
            print!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Some("--version") => {
            println!("cella-vmm {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        _ => {}
    }
    let mut name = String::new();
    match parse(arguments).and_then(|options| {
        name = options
            .name
            .as_ref()
            .map(|id| format!("{id}: "))
            .unwrap_or_default();
        run(options, entered_us)
    }) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("cella-vmm: {name}{failure}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: Options, entered_us: u64) -> Result<(), Failure> {
    let mut kept = vec![options.control, STDERR];
    kept.extend(options.companion.iter().flat_map(|program| &program.fds));
    let entered = jail::enter(&Jail {
        share: Some(options.share),
        sockets: Some(options.sockets),
        uid: options.uid,
        gid: options.gid,
        keep_fds: kept,
        companion: options.companion,
        pid_fd: options.pid_fd,
    })?;
    // SAFETY: the door made this descriptor for us, nothing else in the process knows of it, and `parse` has
    // checked that it is none of the standard ones.
    let control = unsafe { OwnedFd::from_raw_fd(options.control) };
    control::run(Context {
        control,
        companion: entered.companion,
        smaps: entered.smaps,
        confine: Arc::new(|kind| jail::confine(kind).map_err(std::io::Error::other)),
        entered_us,
        jailed_us: now_us(),
    })?;
    Ok(())
}

fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Options, Failure> {
    let (mut control, mut share, mut sockets) = (None, None, None);
    let (mut uid, mut gid, mut pid_fd, mut name) = (None, None, None, None);
    let mut companion: Option<Program> = None;
    let mut arguments = arguments.into_iter();
    while let Some(flag) = arguments.next() {
        let flag = flag.to_string_lossy().into_owned();
        if flag == "--" {
            of_companion(&mut companion, &flag)?.arguments = arguments.collect();
            break;
        }
        let value = arguments
            .next()
            .ok_or_else(|| Failure::Usage(format!("{flag} is unknown or lacks its value")))?;
        match flag.as_str() {
            "--control" => control = Some(number(&flag, &value)?),
            "--share" => share = Some(PathBuf::from(value)),
            "--sockets" => sockets = Some(PathBuf::from(value)),
            "--uid" => uid = Some(number(&flag, &value)?),
            "--gid" => gid = Some(number(&flag, &value)?),
            "--pid-fd" => pid_fd = Some(descriptor(&flag, number(&flag, &value)?)?),
            "--name" => name = Some(value.to_string_lossy().into_owned()),
            "--companion" => companion.get_or_insert_default().path = PathBuf::from(value),
            "--companion-kernel" | "--companion-initrd" => {
                let name = flag.replace("--companion-", "");
                let program = of_companion(&mut companion, &flag)?;
                program.files.push((PathBuf::from(value), name));
            }
            "--companion-fd" => {
                let fd = descriptor(&flag, number(&flag, &value)?)?;
                of_companion(&mut companion, &flag)?.fds.push(fd);
            }
            _ => return Err(Failure::Usage(format!("{flag} is unknown"))),
        }
    }
    let missing = |flag: &str| Failure::Usage(format!("{flag} is missing"));
    let control: u32 = control.ok_or_else(|| missing("--control"))?;
    Ok(Options {
        control: descriptor("--control", control)?,
        share: share.ok_or_else(|| missing("--share"))?,
        sockets: sockets.ok_or_else(|| missing("--sockets"))?,
        uid: uid.ok_or_else(|| missing("--uid"))?,
        gid: gid.ok_or_else(|| missing("--gid"))?,
        pid_fd,
        name,
        companion,
    })
}

/// The companion that `flag` says something of.
fn of_companion<'a>(
    companion: &'a mut Option<Program>,
    flag: &str,
) -> Result<&'a mut Program, Failure> {
    companion
        .as_mut()
        .ok_or_else(|| Failure::Usage(format!("{flag} comes after --companion")))
}

/// A descriptor that the door has made for us: none of the standard ones.
fn descriptor(flag: &str, number: u32) -> Result<RawFd, Failure> {
    RawFd::try_from(number)
        .ok()
        .filter(|&fd| fd > STDERR)
        .ok_or_else(|| Failure::Usage(format!("{flag} {number} cannot be a descriptor of ours")))
}

fn number(flag: &str, value: &std::ffi::OsStr) -> Result<u32, Failure> {
    value
        .to_str()
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| Failure::Usage(format!("{flag} {}: not a number", value.to_string_lossy())))
}
