//! Bytes over a connection into a container: how long a message takes there and back, and how many go one way.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use serde_json::{Value, json};

use super::Error;
use super::process::median;

/// Bytes of a message that goes there and back.
const MESSAGE: usize = 64;
/// How often it does; the median counts.
const ROUND_TRIPS: usize = 100;
/// Bytes written or read at once.
const PIECE: usize = 64 << 10;

/// What the container's end of a connection does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Sends back what comes.
    Echo,
    /// Takes what comes, then sends one byte.
    Sink,
    /// Sends as many MiB, then ends.
    Source(u32),
}

impl Way {
    /// A name that can be a container's id.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Echo => "echo",
            Self::Sink => "sink",
            Self::Source(_) => "source",
        }
    }

    /// The command that does it on its standard streams.
    pub(super) fn command(self) -> Vec<String> {
        let script = match self {
            Self::Echo => "exec /bin/busybox cat".into(),
            Self::Sink => "/bin/busybox cat > /dev/null; echo".into(),
            Self::Source(mib) => {
                let blocks = u64::from(mib) << 4;
                format!("exec /bin/busybox dd if=/dev/zero bs=64k count={blocks} 2> /dev/null")
            }
        };
        ["/bin/busybox", "sh", "-c", &script]
            .map(str::to_owned)
            .into()
    }
}

/// The sending half of a connection.
pub(super) trait Sender: Write + Send {
    /// Tells the other end that nothing more comes.
    fn end(&self) -> io::Result<()>;
}

impl Sender for UnixStream {
    fn end(&self) -> io::Result<()> {
        self.shutdown(Shutdown::Write)
    }
}

impl Sender for TcpStream {
    fn end(&self) -> io::Result<()> {
        self.shutdown(Shutdown::Write)
    }
}

/// This side's end of a connection.
pub(super) struct Wire {
    pub(super) to: Box<dyn Sender>,
    pub(super) from: Box<dyn Read + Send>,
}

/// Opens a connection for each way, one after the other, and measures with it.
pub(super) async fn measure(
    mib: u32,
    open: impl AsyncFn(Way) -> Result<Wire, Error>,
) -> Result<Value, Error> {
    let echo = open(Way::Echo).await?;
    let round_trip_us = on_thread(move || round_trip_us(echo)).await?;
    let sink = open(Way::Sink).await?;
    let to_guest = on_thread(move || to_guest(sink, mib)).await?;
    let source = open(Way::Source(mib)).await?;
    let from_guest = on_thread(move || from_guest(source, mib)).await?;
    Ok(json!({
        "mib": mib,
        "round_trip_us": round_trip_us,
        "to_guest_mib_per_s": to_guest,
        "from_guest_mib_per_s": from_guest,
    }))
}

/// Blocking work, while this process's events go on.
async fn on_thread<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, Error> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|e| Err(io::Error::other(e)))
        .map_err(|e| Error::host("measuring a connection", e))
}

fn round_trip_us(mut wire: Wire) -> io::Result<f64> {
    let sent = [0x5a; MESSAGE];
    let mut rounds = Vec::with_capacity(ROUND_TRIPS);
    for _ in 0..ROUND_TRIPS {
        let mut received = [0; MESSAGE];
        let begin = Instant::now();
        wire.to.write_all(&sent)?;
        wire.from.read_exact(&mut received)?;
        rounds.push(begin.elapsed().as_secs_f64() * 1e6);
        if received != sent {
            return Err(io::Error::other("what came back is not what was sent"));
        }
    }
    wire.to.end()?;
    Ok(median(rounds))
}

/// MiB a second from the first byte sent to the answer after the last.
fn to_guest(mut wire: Wire, mib: u32) -> io::Result<f64> {
    let piece = vec![0; PIECE];
    let begin = Instant::now();
    for _ in 0..u64::from(mib) << 4 {
        wire.to.write_all(&piece)?;
    }
    wire.to.end()?;
    wire.from.read_exact(&mut [0])?;
    Ok(f64::from(mib) / begin.elapsed().as_secs_f64())
}

/// MiB a second from the first bytes that come to the last.
fn from_guest(mut wire: Wire, mib: u32) -> io::Result<f64> {
    let mut piece = vec![0; PIECE];
    let first = wire.from.read(&mut piece)?;
    let begin = Instant::now();
    let mut rest = 0_u64;
    loop {
        match wire.from.read(&mut piece)? {
            0 => break,
            read => rest += read as u64,
        }
    }
    let all = rest + first as u64;
    if all != u64::from(mib) << 20 {
        let what = format!("{all} bytes came of {mib} MiB");
        return Err(io::Error::other(what));
    }
    Ok(rest as f64 / f64::from(1 << 20) / begin.elapsed().as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A connection whose other end is this process of the host.
    fn wire(way: Way) -> (Wire, std::process::Child) {
        use std::os::fd::OwnedFd;
        let (ours, theirs) = UnixStream::pair().unwrap();
        let command = way.command();
        let child = std::process::Command::new(&command[0])
            .args(&command[1..])
            .stdin(OwnedFd::from(theirs.try_clone().unwrap()))
            .stdout(OwnedFd::from(theirs))
            .spawn()
            .unwrap();
        let from = Box::new(ours.try_clone().unwrap());
        let to = Box::new(ours);
        (Wire { to, from }, child)
    }

    #[test]
    fn every_way_is_measured_to_its_end() {
        if !std::path::Path::new("/bin/busybox").exists() {
            println!("SKIPPED: /bin/busybox (busybox-static)");
            return;
        }
        let (echo, mut child) = wire(Way::Echo);
        assert!(round_trip_us(echo).unwrap() > 0.0);
        assert!(child.wait().unwrap().success());
        let (sink, mut child) = wire(Way::Sink);
        assert!(to_guest(sink, 4).unwrap() > 0.0);
        assert!(child.wait().unwrap().success());
        let (source, mut child) = wire(Way::Source(4));
        assert!(from_guest(source, 4).unwrap() > 0.0);
        assert!(child.wait().unwrap().success());
        // What is cut short is no measurement.
        let (source, mut child) = wire(Way::Source(3));
        let error = from_guest(source, 4).unwrap_err().to_string();
        assert!(error.contains("of 4 MiB"), "{error}");
        assert!(child.wait().unwrap().success());
    }
}
