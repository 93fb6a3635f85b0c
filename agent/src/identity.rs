//! What no two guests may have in common, though both are clones of one template: read for whoever checks it.

use std::io;
use std::mem::size_of;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use cella_proto::agent::IdentityResponse;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use rustix::time::{ClockId, Timespec};

use crate::error::Error;

/// The ports of the connections, listener and caller: low ones, which no program is given by chance.
const PORTS: [(u16, u16); 2] = [(41, 43), (47, 53)];
/// The kernel adds its clock to a sequence number in units of 64 ns (net/core/secure_seq.c).
const CLOCK_SHIFT: u32 = 6;
/// Queue of TCP_REPAIR_QUEUE (linux/tcp.h).
const TCP_SEND_QUEUE: libc::c_int = 2;

/// What Identity answers. Needs /proc and the loopback device.
///
/// # Errors
/// [`Error::System`]: the kernel refuses something.
pub fn identity() -> Result<IdentityResponse, Error> {
    let mut random = vec![0; 16];
    rustix::rand::getrandom(&mut random[..], rustix::rand::GetRandomFlags::empty())
        .map_err(|errno| system("drawing random bytes")(errno.into()))?;
    let tcp_starts = PORTS
        .iter()
        .map(|&(listener, caller)| tcp_start(listener, caller))
        .collect::<io::Result<_>>()
        .map_err(system("reading a sequence number of TCP's"))?;
    Ok(IdentityResponse {
        hostname: rustix::system::uname()
            .nodename()
            .to_string_lossy()
            .into_owned(),
        boot_id: read("/proc/sys/kernel/random/boot_id")?,
        uuid: read("/proc/sys/kernel/random/uuid")?,
        random,
        tcp_starts,
        wall_ns: i64::try_from(nanoseconds(ClockId::Realtime)).unwrap_or(i64::MAX),
        monotonic_ns: nanoseconds(ClockId::Monotonic),
        boottime_ns: nanoseconds(ClockId::Boottime),
        ..Default::default()
    })
}

/// The first sequence number of a connection between two ports of the loopback device, less the clock.
fn tcp_start(listener: u16, caller: u16) -> io::Result<u32> {
    let address = |port| SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
    let (door, call) = (socket()?, socket()?);
    for (socket, port) in [(&door, listener), (&call, caller)] {
        sockopt::set_socket_reuseaddr(socket, true)?;
        rustix::net::bind(socket, &address(port))?;
    }
    rustix::net::listen(&door, 1)?;
    match rustix::net::connect(&call, &address(listener)) {
        Ok(()) | Err(Errno::INPROGRESS) => {}
        Err(errno) => return Err(errno.into()),
    }
    let clock = nanoseconds(ClockId::Realtime) >> CLOCK_SHIFT;
    // A socket under repair tells its numbers, and is closed without a word: nothing lingers.
    set_tcp(call.as_fd(), libc::TCP_REPAIR, 1)?;
    set_tcp(call.as_fd(), libc::TCP_REPAIR_QUEUE, TCP_SEND_QUEUE)?;
    let sequence = get_tcp(call.as_fd(), libc::TCP_QUEUE_SEQ)?;
    // Both wrap around, as sequence numbers do.
    Ok(sequence.wrapping_sub(clock as u32))
}

fn socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    Ok(rustix::net::socket_with(
        AddressFamily::INET,
        SocketType::STREAM,
        flags,
        None,
    )?)
}

fn set_tcp(socket: BorrowedFd<'_>, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the value lives across the call and its size is the one given.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            option,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    checked(done)
}

fn get_tcp(socket: BorrowedFd<'_>, option: libc::c_int) -> io::Result<u32> {
    let mut value = 0_u32;
    let mut len = size_of::<u32>() as libc::socklen_t;
    // SAFETY: the value and its length live across the call, and the length is the value's.
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            option,
            (&raw mut value).cast(),
            &raw mut len,
        )
    };
    checked(done).map(|()| value)
}

fn checked(result: libc::c_int) -> io::Result<()> {
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn nanoseconds(clock: ClockId) -> u64 {
    let Timespec { tv_sec, tv_nsec } = rustix::time::clock_gettime(clock);
    let seconds = u64::try_from(tv_sec).unwrap_or(0);
    let nanoseconds = u64::try_from(tv_nsec).unwrap_or(0);
    seconds
        .saturating_mul(1_000_000_000)
        .saturating_add(nanoseconds)
}

fn read(path: &str) -> Result<String, Error> {
    let text = std::fs::read_to_string(path).map_err(system(&format!("reading {path}")))?;
    Ok(text.trim().to_owned())
}

fn system(what: &str) -> impl FnOnce(io::Error) -> Error {
    let what = what.to_owned();
    move |source| Error::System { what, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_whole_and_its_sequence_starts_are_the_kernels_alone() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: root");
            return;
        }
        let (one, other) = (identity().unwrap(), identity().unwrap());
        assert_eq!(one.boot_id, other.boot_id);
        assert_eq!(one.boot_id.len(), 36);
        assert_ne!(one.uuid, other.uuid);
        assert_ne!(one.random, other.random);
        assert!(one.wall_ns > 0 && one.monotonic_ns <= other.monotonic_ns);
        // The same kernel has the same secret: without its clock the numbers are the same but for the time that the
        // reading takes, within a tenth of a second.
        let tolerance = 100_000_000 >> CLOCK_SHIFT;
        assert_eq!(one.tcp_starts.len(), 2);
        for (one, other) in one.tcp_starts.iter().zip(&other.tcp_starts) {
            let apart = one.wrapping_sub(*other).cast_signed().unsigned_abs();
            assert!(apart < tolerance, "{apart}");
        }
        assert_ne!(one.tcp_starts[0], one.tcp_starts[1]);
    }
}
