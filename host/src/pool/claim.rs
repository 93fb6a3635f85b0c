//! How an idle clone changes hands.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;

use super::wire::{self, Ask, Given};
use super::{PREFIX, cgroup};
use crate::hypervisor::HandedVm;
use crate::paths::Paths;
use crate::sandbox::Error;
use crate::sandbox::dir::{BootLock, OwnerLock, SandboxDir};
use crate::template::Key;

/// An idle clone that is this process's. Dropping it ends it.
#[derive(Debug)]
pub struct Claimed {
    dir: SandboxDir,
    parts: Option<Parts>,
}

#[derive(Debug)]
struct Parts {
    vm: HandedVm,
    lock: OwnerLock,
    booting: BootLock,
}

/// An idle clone of the template `key` with `vcpus` CPUs, if there is one: a machine that runs cannot get more.
pub fn claim(paths: &Paths, key: &Key, vcpus: u32) -> Option<Claimed> {
    match ask(paths, key, vcpus) {
        Ok(claimed) => Some(claimed),
        Err(error) => {
            tracing::debug!("claiming an idle sandbox: {error}");
            None
        }
    }
}

fn ask(paths: &Paths, key: &Key, vcpus: u32) -> io::Result<Claimed> {
    let socket = UnixStream::connect(super::socket(paths))?;
    wire::prepare(&socket)?;
    let key = key.as_str().to_owned();
    wire::send(&socket, &Ask { key, vcpus }, &[])?;
    let (given, fds) = wire::receive::<Given>(&socket)?;
    let Ok([control, pidfd, lock, booting]) = <[_; 4]>::try_from(fds) else {
        return Err(io::Error::other("not the four descriptors of a sandbox"));
    };
    if !given.id.starts_with(PREFIX) {
        return Err(io::Error::other("not the id of an idle sandbox"));
    }
    let dir = SandboxDir::new(paths, &given.id).map_err(io::Error::other)?;
    Ok(Claimed {
        dir,
        parts: Some(Parts {
            vm: HandedVm {
                control,
                pidfd,
                pid: given.pid,
            },
            lock: OwnerLock::of(File::from(lock)),
            booting: BootLock::of(File::from(booting)),
        }),
    })
}

impl Claimed {
    /// Makes it the sandbox of `dir`, in this process's cgroup.
    ///
    /// # Errors
    /// `AlreadyExists`: a living owner has the directory. After any error nothing is left of it.
    pub fn settle(mut self, dir: &SandboxDir) -> Result<(HandedVm, OwnerLock, BootLock), Error> {
        let Some(parts) = self.parts.take() else {
            return Err(Error::host("claiming", io::Error::other("it was claimed")));
        };
        let settled = cgroup::join(parts.vm.pid)
            .map_err(|e| Error::host(format!("moving VMM {} to this cgroup", parts.vm.pid), e))
            .and_then(|()| dir.adopt(&self.dir));
        match settled {
            Ok(()) => Ok((parts.vm, parts.lock, parts.booting)),
            Err(error) => {
                self.parts = Some(parts);
                Err(error)
            }
        }
    }
}

impl Drop for Claimed {
    fn drop(&mut self) {
        if let Some(parts) = self.parts.take() {
            // The VMM ends with its control socket.
            drop(parts.vm);
            if let Err(error) = self.dir.remove() {
                tracing::warn!("removing idle sandbox {}: {error}", self.dir.id());
            }
        }
    }
}
