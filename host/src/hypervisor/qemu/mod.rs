//! QEMU's `microvm` machine in software emulation, with our own devices over vhost-user: for hosts without KVM.
//!
//! One jailed `cella-vmm` serves vsock and the shared directory, and has QEMU as its companion in the same namespaces:
//! the end of either ends the other, and the door speaks `vmm.proto` with it as with one on KVM.
//!
//! | module | what lives there |
//! | --- | --- |
//! | `clock` | the frequency of the host's time stamp counter, which the guest must be told |
//! | `command` | QEMU's command line |
//! | `memory` | what QEMU's process has resident |

mod clock;
mod command;
mod memory;

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use async_trait::async_trait;
use cella_proto::vmm::{Configure, Device, Fs, Stats, StopReason, Vsock, device};

use self::command::Console;
use super::process::{self, FIRST_FD, GUEST_CID, SHARE_TAG, VmmProcess, open};
use super::{Ended, Error, Hypervisor, SavedVm, Vm, VmSpec};
use crate::error::ErrorKind;

/// The oldest QEMU that has all that is asked of it: `acpi=off` of microvm, vhost-user-vsock, memory-backend.
const OLDEST: (u32, u32) = (5, 2);

/// microvm has eight slots for devices, of which vsock, the shared directory and entropy take one each.
const MAX_NICS_AND_DISKS: usize = 5;

/// The hypervisor of this module.
#[derive(Clone, Debug)]
pub struct Qemu {
    program: PathBuf,
    clock: clock::Sample,
}

impl Qemu {
    /// The QEMU at `program`, a path, or a name that PATH leads to.
    ///
    /// # Errors
    /// [`Error::Missing`]: there is none.
    pub fn find(program: &Path) -> Result<Self, Error> {
        Ok(Self {
            program: resolve(program)?,
            clock: clock::Sample::take(),
        })
    }

    /// Its path.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Its version, checked.
    ///
    /// # Errors
    /// [`Error::Unusable`]: it cannot say its version, or is too old.
    pub fn version(&self) -> Result<String, Error> {
        let unusable = |reason| Error::Unusable {
            path: self.program.clone(),
            reason,
        };
        let said = Command::new(&self.program)
            .arg("--version")
            .stdin(Stdio::null())
            .output()
            .map_err(|e| unusable(format!("asking its version: {e}")))?;
        let text = String::from_utf8_lossy(&said.stdout).into_owned();
        let version = parse_version(&text)
            .ok_or_else(|| unusable("it does not say a version: is it QEMU?".into()))?;
        let (major, minor) = version;
        if version < OLDEST {
            return Err(unusable(format!(
                "QEMU {major}.{minor} is too old: {}.{} or newer is needed",
                OLDEST.0, OLDEST.1
            )));
        }
        Ok(format!("{major}.{minor}"))
    }
}

#[async_trait]
impl Hypervisor for Qemu {
    fn name(&self) -> &'static str {
        "qemu"
    }

    async fn boot(&self, spec: VmSpec) -> Result<Box<dyn Vm>, Error> {
        if spec.nics.len().saturating_add(spec.disks.len()) > MAX_NICS_AND_DISKS {
            return Err(Error::Refused {
                id: spec.id,
                kind: ErrorKind::InvalidArgument,
                message: format!(
                    "QEMU's microvm has room for {MAX_NICS_AND_DISKS} network interfaces and disks, not {} and {}",
                    spec.nics.len(),
                    spec.disks.len()
                ),
            });
        }
        open("opening the guest kernel", &spec.kernel)?;
        open("opening the guest image", &spec.initrd)?;
        let (vm, configure, fds) = self.spawn(&spec)?;
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        match vm.boot(configure, &fds).await {
            Ok(()) => Ok(Box::new(QemuVm {
                process: vm,
                qemu: self.clone(),
            })),
            Err(error @ Error::Gone { .. }) => Err(self.version().err().unwrap_or(error)),
            Err(error) => Err(error),
        }
    }
}

/// A running cella-vmm with a QEMU beside it.
struct QemuVm {
    process: VmmProcess,
    qemu: Qemu,
}

#[async_trait]
impl Vm for QemuVm {
    fn pid(&self) -> u32 {
        self.process.pid()
    }

    async fn pause(&self) -> Result<(), Error> {
        self.process.pause().await
    }

    async fn resume(&self) -> Result<(), Error> {
        self.process.resume().await
    }

    async fn stop(&self) -> Result<(), Error> {
        self.process.stop().await
    }

    async fn wait(&self) -> Ended {
        let mut ended = self.process.wait().await;
        // It may be too old for its command line: that says more than what it complained of.
        if ended.reason == StopReason::STOP_REASON_FAILURE
            && let Err(why) = self.qemu.version()
        {
            ended.message = why.to_string();
        }
        ended
    }

    /// Refused by the VMM: the machine is not its own.
    async fn snapshot(&self, files: &SavedVm) -> Result<(), Error> {
        self.process.snapshot(files).await
    }

    async fn stats(&self) -> Result<Stats, Error> {
        let mut stats = self.process.stats().await?;
        // QEMU's memory is part of the price; the guest's memory is what QEMU has of it.
        if let Some(qemu) = memory::of_companion(self.pid()) {
            stats.rss_kib = stats.rss_kib.saturating_add(qemu.own_kib);
            stats.guest_rss_kib = qemu.guest_kib;
        }
        Ok(stats)
    }
}

impl Qemu {
    /// Starts the VMM and QEMU in its jail, and says what to configure the VMM with.
    fn spawn(&self, spec: &VmSpec) -> Result<(VmmProcess, Configure, Vec<OwnedFd>), Error> {
        let action = || format!("starting {}", self.program.display());
        let host = |error| Error::host(action(), error);
        let (vsock, its_vsock) = UnixStream::pair().map_err(host)?;
        let (share, its_share) = UnixStream::pair().map_err(host)?;
        let mut inherited: Vec<OwnedFd> = vec![its_vsock.into(), its_share.into()];
        let console = match &spec.console {
            Some(file) => {
                let (console, fd) = console(file.as_fd(), FIRST_FD + 2).map_err(host)?;
                inherited.push(fd);
                Some(console)
            }
            None => None,
        };
        let first_nic_fd = FIRST_FD.saturating_add(i32::try_from(inherited.len()).unwrap_or(0));
        for nic in &spec.nics {
            inherited.push(nic.tap.try_clone().map_err(host)?);
        }
        for disk in &spec.disks {
            inherited.push(disk.image.try_clone().map_err(host)?.into());
        }
        let line = command::Line {
            vsock_fd: FIRST_FD,
            share_fd: FIRST_FD + 1,
            console,
            first_nic_fd,
            tsc_khz: self.clock.khz(),
        };
        let mut arguments: Vec<OsString> = vec!["--companion".into(), (&self.program).into()];
        arguments.extend(["--companion-kernel".into(), (&spec.kernel).into()]);
        arguments.extend(["--companion-initrd".into(), (&spec.initrd).into()]);
        for (number, _) in (FIRST_FD..).zip(&inherited) {
            arguments.extend(["--companion-fd".into(), number.to_string().into()]);
        }
        arguments.push("--".into());
        arguments.extend(line.arguments(spec).into_iter().map(OsString::from));
        let inherited: Vec<_> = inherited.iter().map(AsFd::as_fd).collect();
        let vm = process::spawn(spec, &arguments, &inherited)?;
        let listener = UnixListener::bind(&spec.vsock)
            .map_err(|e| Error::host(format!("binding {}", spec.vsock.display()), e))?;
        let fds = vec![listener.into(), vsock.into(), share.into()];
        Ok((vm, configure(), fds))
    }
}

/// The indexes are those of the descriptors that [`Qemu::spawn`] returns.
fn configure() -> Configure {
    let device = |device, socket| Device {
        device: Some(device),
        vhost_user_fd: Some(socket),
        ..Default::default()
    };
    let vsock = device::Device::Vsock(Vsock {
        guest_cid: GUEST_CID,
        listener_fd: 0,
        ..Default::default()
    });
    let share = device::Device::Fs(Fs {
        tag: SHARE_TAG.into(),
        ..Default::default()
    });
    Configure {
        devices: vec![device(vsock, 1), device(share, 2)],
        ..Default::default()
    }
}

/// A descriptor that QEMU can use for the guest's console, which it will have as number `fd`.
fn console(file: std::os::fd::BorrowedFd<'_>, fd: i32) -> io::Result<(Console, OwnedFd)> {
    if rustix::net::sockopt::socket_type(file).is_ok() {
        return Ok((Console::Socket(fd), file.try_clone_to_owned()?));
    }
    // QEMU insists on a descriptor that is for writing only.
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let file = OpenOptions::new().append(true).open(path)?;
    Ok((Console::File(fd), file.into()))
}

/// The program's path, without symbolic links: it must be found in a root that has only parts of the host's.
fn resolve(program: &Path) -> Result<PathBuf, Error> {
    let missing = |source| Error::Missing {
        what: "looking for QEMU (install qemu-system-x86, or name it with --qemu):",
        path: program.into(),
        source,
    };
    let found = if program.components().count() > 1 {
        Some(program.to_path_buf())
    } else {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path)
            .map(|dir| dir.join(program))
            .find(|file| rustix::fs::access(file, rustix::fs::Access::EXEC_OK).is_ok())
    };
    let found = found.ok_or_else(|| missing(io::ErrorKind::NotFound.into()))?;
    rustix::fs::access(&found, rustix::fs::Access::EXEC_OK).map_err(|e| missing(e.into()))?;
    let found = found.canonicalize().map_err(missing)?;
    match found.is_file() {
        true => Ok(found),
        false => Err(missing(io::Error::other("it is no file"))),
    }
}

/// The two leading numbers of `QEMU emulator version 7.2.22 (...)`.
fn parse_version(text: &str) -> Option<(u32, u32)> {
    let (_, rest) = text.split_once("version ")?;
    let mut numbers = rest.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        let debian = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg)\nCopyright (c)";
        assert_eq!(parse_version(debian), Some((7, 2)));
        assert_eq!(parse_version("QEMU emulator version 10.0"), Some((10, 0)));
        for text in ["", "version", "version x.y", "GNU bash, version"] {
            assert_eq!(parse_version(text), None, "{text}");
        }
    }

    #[test]
    fn a_qemu_that_is_not_there_is_named() {
        for name in ["/nonexistent/qemu", "no-such-qemu"] {
            let error = Qemu::find(Path::new(name)).unwrap_err().to_string();
            assert!(
                error.contains(name) && error.contains("qemu-system-x86"),
                "{error}"
            );
        }
    }
}
