//! Two network namespaces joined by a cable: one for a sandbox, one for its peer. Neither has a name or touches the
//! host's network, and both go with this process, however it ends.

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

use super::Error;

/// The peer's address, as the sandbox sees it.
pub(super) const THERE: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
/// Where the peer listens.
pub(super) const PORT: u16 = 5201;
/// The sandbox's own address.
const HERE: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);

/// The namespaces.
#[derive(Debug)]
pub(super) struct Pair {
    sandbox: File,
    /// Of the peer's namespace, which it keeps in being.
    listener: TcpListener,
}

impl Pair {
    /// Makes them, by ip(8).
    ///
    /// # Errors
    /// There is no ip(8), or no right to make namespaces.
    pub(super) fn make() -> Result<Self, Error> {
        // A thread belongs to a namespace: this one does nothing else, and ends.
        let made = std::thread::spawn(make).join();
        made.unwrap_or_else(|_| Err(io::Error::other("the thread that did it died")))
            .map_err(|e| Error::host("making a network namespace to measure in", e))
    }

    /// The path of the sandbox's namespace, for as long as this lives.
    pub(super) fn netns(&self) -> PathBuf {
        path_of(&self.sandbox)
    }

    /// A listener in the peer's namespace, nonblocking.
    pub(super) fn listener(&self) -> io::Result<TcpListener> {
        let listener = self.listener.try_clone()?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    }
}

fn make() -> io::Result<Pair> {
    let sandbox = enter_new()?;
    ip("link set lo up")?;
    enter_new()?;
    let other = path_of(&sandbox);
    ip(&format!(
        "link add eth0 type veth peer name eth0 netns {}",
        other.display()
    ))?;
    set_up(THERE)?;
    let listener = TcpListener::bind((THERE, PORT))?;
    move_into_link_name_space(sandbox.as_fd(), Some(LinkNameSpaceType::Network))?;
    set_up(HERE)?;
    Ok(Pair { sandbox, listener })
}

/// Moves this thread into a new network namespace.
fn enter_new() -> io::Result<File> {
    // SAFETY: the network namespace alone is unshared: no file descriptor table.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
    File::open("/proc/thread-self/ns/net")
}

/// Another process's path to the namespace, too.
fn path_of(namespace: &File) -> PathBuf {
    let (pid, fd) = (std::process::id(), namespace.as_raw_fd());
    PathBuf::from(format!("/proc/{pid}/fd/{fd}"))
}

fn set_up(address: Ipv4Addr) -> io::Result<()> {
    ip(&format!("address add {address}/30 dev eth0"))?;
    ip("link set eth0 up")
}

/// Runs ip(8) in this thread's namespace.
fn ip(words: &str) -> io::Result<()> {
    let said = Command::new("ip")
        .args(words.split(' '))
        .stdin(Stdio::null())
        .output()
        .map_err(|e| io::Error::new(e.kind(), format!("running ip (Debian: iproute2): {e}")))?;
    match said.status.success() {
        true => Ok(()),
        false => {
            let why = String::from_utf8_lossy(&said.stderr);
            Err(io::Error::other(format!("ip {words}: {}", why.trim())))
        }
    }
}
