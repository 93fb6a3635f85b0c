//! The network of a pod: the interfaces of a network namespace, as CNI made them, become the guest's.
//!
//! Each interface is joined to a tap by redirects both ways, so that whatever arrives at it reaches the guest, and
//! whatever the guest sends leaves by it. The guest's interface has the same name, hardware address, MTU, addresses
//! and routes; the namespace's own are left as they are, for CNI to find, but hear nothing any more.
//!
//! | file | what lives there |
//! | --- | --- |
//! | `netlink` | how the kernel is asked |
//! | `facts` | what a namespace has |
//! | `tap` | the other end of the guest's interface |
//! | `spare` | interfaces before they have a namespace |
//! | `redirect` | how the two are joined |
//! | `steer` | how connections made inside of the namespace are caught |
//!
//! A thread belongs to a namespace: all of this happens on threads made for it, never on one that runs anything else.

mod error;
mod facts;
mod netlink;
mod redirect;
mod spare;
mod steer;
mod tap;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use cella_proto::agent::{Interface, Neighbor, Route};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde::{Deserialize, Serialize};

pub use self::error::Error;
use self::facts::{Facts, Link};
use self::netlink::{Message, Netlink};
pub use self::spare::{SPARE_ADDRESS, spares};
use crate::hypervisor::Nic;

/// Interfaces of a namespace that a guest can have.
const MAX_INTERFACES: usize = 8;

/// Taps are named by this and their number. The name is a lock: a namespace serves one sandbox at a time.
const TAP: &str = "cella";

/// `NS_GET_NSTYPE` (ioctl_ns(2)): `_IO(0xb7, 3)`.
const NS_GET_NSTYPE: libc::Ioctl = 0xb703;

/// The network that a guest gets of a namespace; none by default.
#[derive(Debug, Default)]
pub struct Network {
    /// For the hypervisor, one for each interface.
    pub nics: Vec<Nic>,
    /// For the agent.
    pub interfaces: Vec<Interface>,
    /// For the agent.
    pub routes: Vec<Route>,
    /// For the agent.
    pub neighbors: Vec<Neighbor>,
    /// What [`Network::join`] is about to do; write it down before.
    pub joints: Joints,
}

/// What was done to a namespace, so that it can be undone by whoever finds this written down.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Joints {
    /// The namespace.
    pub netns: PathBuf,
    /// Each interface by name, and the index of its tap, which is never used again in the namespace.
    pub interfaces: Vec<(String, u32)>,
}

/// Where TCP connections arrive that are made inside of the namespace. Dropping it closes it.
#[derive(Debug)]
pub struct Entrance {
    listener: TcpListener,
    _link: OwnedFd,
}

impl Network {
    /// Reads the namespace at `netns` as it is now and makes a tap for each interface. Dropping the result undoes it.
    ///
    /// # Errors
    /// See [`Error`]: no namespace, the host's own, one in use.
    pub async fn open(netns: &Path) -> Result<Self, Error> {
        inside_async(netns, |netns, netlink| {
            let doing = |action: &str, source| system(netns, action, source);
            let facts = Facts::read(netlink).map_err(|e| doing("reading what it has", e))?;
            if facts.links.len() > MAX_INTERFACES {
                return Err(Error::Unsupported {
                    path: netns.into(),
                    what: format!("it has more than {MAX_INTERFACES} interfaces"),
                });
            }
            let mut nics = Vec::new();
            let mut interfaces = Vec::new();
            for (number, link) in facts.links.iter().enumerate() {
                let (nic, index) = make_nic(netns, netlink, number, link)?;
                nics.push(nic);
                interfaces.push((link.name.clone(), index));
            }
            Ok(Self {
                nics,
                interfaces: facts.interfaces,
                routes: facts.routes,
                neighbors: facts.neighbors,
                joints: Joints {
                    netns: netns.into(),
                    interfaces,
                },
            })
        })
        .await
    }

    /// Joins the interfaces and their taps, and opens the entrance for whoever connects inside of the namespace, if
    /// this host's kernel can. Undo it by [`Joints::undo`].
    ///
    /// # Errors
    /// The kernel refused; what was joined until then is to be undone.
    pub async fn join(&self) -> Result<Option<Entrance>, Error> {
        let joints = self.joints.clone();
        inside_async(&self.joints.netns, move |netns, netlink| {
            for (name, tap) in &joints.interfaces {
                let joined = match redirect::index_of(netlink, name) {
                    Ok(Some(index)) => redirect::add(netlink, index, *tap)
                        .and_then(|()| redirect::add(netlink, *tap, index)),
                    Ok(None) => Err(io::ErrorKind::NotFound.into()),
                    Err(error) => Err(error),
                };
                joined.map_err(|e| {
                    system(netns, &format!("joining interface {name} and its tap"), e)
                })?;
            }
            if joints.interfaces.is_empty() {
                return Ok(None);
            }
            let entrance = Entrance::open(netns);
            if let Err(error) = &entrance {
                tracing::warn!("port-forward will not work: {error}");
            }
            Ok(entrance.ok())
        })
        .await
    }
}

impl Entrance {
    /// Opens it for the namespace of the calling thread, which `netns` names.
    fn open(netns: &Path) -> Result<Self, Error> {
        let doing = |action: &str, source| system(netns, action, source);
        // The first is for both families, where there are both.
        let listener = TcpListener::bind("[::]:0")
            .or_else(|_| TcpListener::bind("0.0.0.0:0"))
            .map_err(|e| doing("listening in it", e))?;
        listener
            .set_nonblocking(true)
            .map_err(|e| doing("listening in it", e))?;
        let file = File::open("/proc/thread-self/ns/net").map_err(|e| doing("opening it", e))?;
        let link = steer::steer(file.as_fd(), listener.as_fd())
            .map_err(|e| doing("steering connections by BPF", e))?;
        Ok(Self {
            listener,
            _link: link,
        })
    }

    /// Where they arrive; nonblocking. The local address of a connection is the one that was dialled.
    pub fn listener(&self) -> &TcpListener {
        &self.listener
    }
}

impl Joints {
    /// The interfaces' names, in the guest's order.
    pub fn names(&self) -> Vec<String> {
        let interfaces = self.interfaces.iter();
        interfaces.map(|(name, _)| name.clone()).collect()
    }

    /// Takes the redirects off the namespace's interfaces. The taps, and what is on them, go with their descriptors.
    /// Nothing is wrong with a namespace that is gone, or that another sandbox has got meanwhile.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn undo(&self) -> Result<(), Error> {
        let undone = inside(&self.netns, |netns, netlink| {
            for (name, tap) in &self.interfaces {
                let removed = match redirect::index_of(netlink, name) {
                    Ok(Some(index)) => redirect::remove(netlink, index, *tap),
                    Ok(None) => Ok(()),
                    Err(error) => Err(error),
                };
                removed.map_err(|e| {
                    system(netns, &format!("parting interface {name} and its tap"), e)
                })?;
            }
            Ok(())
        });
        match undone {
            // The path is free, or something else is there now.
            Err(Error::NoNamespace { .. } | Error::NotANamespace { .. } | Error::Host { .. }) => {
                Ok(())
            }
            other => other,
        }
    }
}

/// A tap for `link`, up and of its size, and the tap's index.
fn make_nic(
    netns: &Path,
    netlink: &mut Netlink,
    number: usize,
    link: &Link,
) -> Result<(Nic, u32), Error> {
    let mtu = u16::try_from(link.mtu).map_err(|_| Error::Unsupported {
        path: netns.into(),
        what: format!("interface {} has an MTU of {}", link.name, link.mtu),
    })?;
    let name = format!("{TAP}{number}");
    let tap = tap::make(&name).map_err(|e| match e.kind() {
        io::ErrorKind::ResourceBusy => Error::InUse { path: netns.into() },
        _ => system(netns, &format!("making tap {name}"), e),
    })?;
    // The guest speaks on this wire, the namespace does not. A kernel without IPv6 has no such file.
    let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
    let index = redirect::index_of(netlink, &name)
        .and_then(|index| index.ok_or_else(|| io::ErrorKind::NotFound.into()))
        .and_then(|index| set_up(netlink, index, link.mtu).map(|()| index))
        .map_err(|e| system(netns, &format!("setting tap {name} up"), e))?;
    let nic = Nic {
        tap,
        mac: link.mac,
        mtu,
    };
    Ok((nic, index))
}

/// Gives an interface an MTU and brings it up.
fn set_up(netlink: &mut Netlink, index: u32, mtu: u32) -> io::Result<()> {
    // struct ifinfomsg: family and type, index, flags and their mask.
    let up = libc::IFF_UP as u32;
    let header: Vec<u8> = [0, index, up, up]
        .iter()
        .flat_map(|number: &u32| number.to_ne_bytes())
        .collect();
    netlink
        .ask(Message::new(libc::RTM_NEWLINK, 0, &header).with(libc::IFLA_MTU, &mtu.to_ne_bytes()))
}

/// [`inside`] for asynchronous code.
async fn inside_async<T: Send + 'static>(
    netns: &Path,
    work: impl FnOnce(&Path, &mut Netlink) -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let path = netns.to_owned();
    tokio::task::spawn_blocking(move || inside(&path, work))
        .await
        .unwrap_or_else(|e| Err(system(netns, "running a thread", io::Error::other(e))))
}

/// Runs `work` in the namespace at `netns`, on a thread of its own that ends with it.
fn inside<T: Send>(
    netns: &Path,
    work: impl FnOnce(&Path, &mut Netlink) -> Result<T, Error> + Send,
) -> Result<T, Error> {
    let file = open(netns)?;
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("netns".into());
        let body = move || {
            let namespace = Some(LinkNameSpaceType::Network);
            move_into_link_name_space(file.as_fd(), namespace)
                .map_err(|e| system(netns, "entering it", e.into()))?;
            let mut netlink =
                Netlink::open().map_err(|e| system(netns, "opening a netlink socket", e))?;
            work(netns, &mut netlink)
        };
        thread
            .spawn_scoped(scope, body)
            .map_err(|e| system(netns, "making a thread", e))?
            .join()
            .unwrap_or_else(|_| {
                let died = io::Error::other("the thread that did it died");
                Err(system(netns, "working in it", died))
            })
    })
}

/// Opens a namespace that is one, and not the host's.
fn open(netns: &Path) -> Result<File, Error> {
    let missing = |source| Error::NoNamespace {
        path: netns.into(),
        source,
    };
    // A FIFO would have the opening wait for a writer, so what is there is looked at first.
    let not_one = || Error::NotANamespace { path: netns.into() };
    if !std::fs::metadata(netns).map_err(missing)?.is_file() {
        return Err(not_one());
    }
    let file = File::open(netns).map_err(missing)?;
    use std::os::fd::AsRawFd;
    // SAFETY: this request has no argument.
    let kind = unsafe { libc::ioctl(file.as_raw_fd(), NS_GET_NSTYPE) };
    if kind != libc::CLONE_NEWNET {
        return Err(not_one());
    }
    let own = std::fs::metadata("/proc/thread-self/ns/net").map_err(missing)?;
    let meta = file.metadata().map_err(missing)?;
    match (own.dev(), own.ino()) == (meta.dev(), meta.ino()) {
        true => Err(Error::Host { path: netns.into() }),
        false => Ok(file),
    }
}

fn system(netns: &Path, action: &str, source: io::Error) -> Error {
    Error::System {
        path: netns.into(),
        action: action.to_owned(),
        source,
    }
}
