//! The tasks that move a stream's bytes. Each returns when its stream has ended, for whatever reason: an error on
//! one end closes the other, which is how the process and the host learn of it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::RecvFlags;
use rustix::pipe::SpliceFlags;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::line::Line;
use crate::transport::Connection;

/// Bytes moved by one splice at most: what a pipe holds, and one vsock packet.
const SPLICE: usize = 64 << 10;
/// Bytes of a terminal's input or output on their way.
pub(super) const TERMINAL_BUFFER: usize = 4096;
/// Moves after which a stream that never waits lets the agent's other tasks go first.
const MOVES: u32 = 8;

/// From the host to the process's standard input, until either closes it.
pub(super) async fn into_pipe(mut line: Line, pipe: AsyncFd<OwnedFd>) {
    let into = &pipe;
    let carry = |from: Arc<Connection>| async move { splice_all(from.socket(), into).await };
    tokio::select! {
        // Both ends close here; the process reads to the end of what the pipe holds.
        _ = line.carry(carry) => {}
        // Nobody is left who could read: the host need not keep the stream.
        _ = pipe.ready(Interest::ERROR) => {}
    }
}

/// From the process's standard output or error to the host, until the last writer is gone and the host has read
/// it all.
pub(super) async fn out_of_pipe(pipe: AsyncFd<OwnedFd>, mut line: Line) {
    let from = &pipe;
    let carry = |into: Arc<Connection>| async move { splice_all(from, into.socket()).await };
    if line.carry(carry).await.is_ok() {
        drop(pipe);
        finish(line.connection()).await;
    }
}

/// From the host to the terminal. The end of the host's input says nothing to a terminal.
pub(super) async fn into_terminal(mut line: Line, master: Arc<AsyncFd<OwnedFd>>) {
    let terminal = &master;
    let carry = |from: Arc<Connection>| async move {
        let mut buffer = [0u8; TERMINAL_BUFFER];
        loop {
            match receive(&from, &mut buffer).await? {
                0 => return Ok(()),
                length => write_all(terminal, buffer.get(..length).unwrap_or_default()).await?,
            }
        }
    };
    // Whichever way it ends, it is the stream's end.
    let _ = line.carry(carry).await;
}

/// From the terminal to the host, until the last process has closed the terminal and the host has read it all. A host
/// that has closed the connection, or never wanted it, does not stop the processes: their output is dropped.
pub(super) async fn out_of_terminal(master: Arc<AsyncFd<OwnedFd>>, mut line: Option<Line>) {
    let terminal = &master;
    let carry = |into: Arc<Connection>| async move {
        let mut buffer = [0u8; TERMINAL_BUFFER];
        while let Some(output) = output(terminal, &mut buffer).await {
            into.send_all(output).await?;
        }
        Ok(())
    };
    if let Some(open) = &mut line
        && open.carry(carry).await.is_err()
    {
        line = None;
    }
    let mut buffer = [0u8; TERMINAL_BUFFER];
    while output(&master, &mut buffer).await.is_some() {}
    drop(master);
    if let Some(line) = line {
        finish(line.connection()).await;
    }
}

/// What comes out of the terminal; nothing more comes after `None`. The kernel reports a terminal's hangup as EIO, once its
/// output is read.
async fn output<'a>(master: &AsyncFd<OwnedFd>, buffer: &'a mut [u8]) -> Option<&'a [u8]> {
    match read(master, buffer).await {
        Ok(length @ 1..) => buffer.get(..length),
        _ => None,
    }
}

/// Moves bytes until `source` ends. One of the two is a pipe, and the socket is nonblocking.
async fn splice_all(source: &AsyncFd<OwnedFd>, sink: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let mut moves = 0u32;
    loop {
        let mut readable = source.readable().await?;
        let mut writable = sink.writable().await?;
        let moved = rustix::pipe::splice(
            source.get_ref(),
            None,
            sink.get_ref(),
            None,
            SPLICE,
            SpliceFlags::NONBLOCK | SpliceFlags::MOVE,
        );
        match moved {
            Ok(0) => return Ok(()),
            Ok(_) => {
                moves = moves.wrapping_add(1);
                if moves.is_multiple_of(MOVES) {
                    tokio::task::yield_now().await;
                }
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                // splice does not say which of the two would have blocked.
                let (source_ready, sink_ready) = poll(source, sink)?;
                if !source_ready {
                    readable.clear_ready();
                }
                if !sink_ready {
                    writable.clear_ready();
                }
                if source_ready && sink_ready {
                    // It has become ready since.
                    tokio::task::yield_now().await;
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Whether `source` can be read and `sink` written just now.
fn poll(source: &AsyncFd<OwnedFd>, sink: &AsyncFd<OwnedFd>) -> io::Result<(bool, bool)> {
    let mut polled = [
        PollFd::new(source, PollFlags::IN),
        PollFd::new(sink, PollFlags::OUT),
    ];
    rustix::event::poll(&mut polled, Some(&Timespec::default()))?;
    let [source, sink] = &polled;
    Ok((!source.revents().is_empty(), !sink.revents().is_empty()))
}

/// Ends the stream and keeps the connection until the host has closed it. Were it closed here, the kernel would
/// throw away what a slow host has not read yet after a time of its own.
async fn finish(connection: &Connection) {
    connection.finish();
    let mut ignored = [0u8; 64];
    while let Ok(1..) = receive(connection, &mut ignored).await {}
}

async fn receive(connection: &Connection, buffer: &mut [u8]) -> io::Result<usize> {
    let socket = connection.socket();
    loop {
        let mut ready = socket.readable().await?;
        let received = ready.try_io(|socket| {
            let (length, _) = rustix::net::recv(socket, &mut *buffer, RecvFlags::empty())?;
            Ok(length)
        });
        if let Ok(received) = received {
            return received;
        }
    }
}

async fn read(descriptor: &AsyncFd<OwnedFd>, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        let mut ready = descriptor.readable().await?;
        let read = ready.try_io(|descriptor| Ok(rustix::io::read(descriptor, &mut *buffer)?));
        if let Ok(read) = read {
            return read;
        }
    }
}

async fn write_all(descriptor: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let mut ready = descriptor.writable().await?;
        let written = ready.try_io(|descriptor| Ok(rustix::io::write(descriptor, bytes)?));
        if let Ok(written) = written {
            bytes = bytes.get(written?..).unwrap_or_default();
        }
    }
    Ok(())
}
