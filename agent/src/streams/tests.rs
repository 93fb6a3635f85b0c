//! The streams over unix sockets, with this process in the places of the container's process and of the host.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::*;

const PORT: u32 = 7;
/// More than any pipe or socket buffer on the way holds.
const MUCH: usize = 16 << 20;

/// A host that listens on [`PORT`], and what it is called by.
struct Host {
    dir: tempfile::TempDir,
    listener: UnixListener,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join(format!("host-{PORT}"))).unwrap();
        Self { dir, listener }
    }

    fn transport(&self) -> Transport {
        Transport::Unix(self.dir.path().to_owned())
    }

    /// The next connection, after its token.
    fn accept(&self) -> (u8, UnixStream) {
        let (mut stream, _) = self.listener.accept().unwrap();
        let mut token = [0u8; TOKEN];
        stream.read_exact(&mut token).unwrap();
        assert_eq!(token, [token[0]; TOKEN]);
        (token[0], stream)
    }
}

fn stream(token: u8) -> protobuf::MessageField<agent::Stream> {
    protobuf::MessageField::some(agent::Stream {
        port: PORT,
        token: vec![token; TOKEN],
        ..Default::default()
    })
}

fn pattern() -> Vec<u8> {
    (0..MUCH)
        .map(|index| (index ^ (index >> 8) ^ (index >> 16)) as u8)
        .collect()
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

/// Runs the streams of `stdio` on a runtime of their own until every task has ended.
fn in_background(
    transport: Transport,
    stdio: agent::Stdio,
) -> (JoinHandle<()>, std::sync::mpsc::Receiver<ProcessEnds>) {
    let (sender, receiver) = std::sync::mpsc::channel();
    let task = thread::spawn(move || {
        let runtime = runtime();
        runtime.block_on(async {
            let streams = Streams::open(&transport, &stdio, false).await.unwrap();
            let (ends, pipes) = streams.pipes().unwrap();
            sender.send(ends).unwrap();
            pipes.run();
            while runtime.metrics().num_alive_tasks() > 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
    });
    (task, receiver)
}

#[test]
fn sixteen_mebibytes_go_in_and_out_while_the_reader_stalls() {
    let host = Host::new();
    let stdio = agent::Stdio {
        stdin: stream(1),
        stdout: stream(2),
        ..Default::default()
    };
    let (task, ends) = in_background(host.transport(), stdio);
    let mut connections = [host.accept(), host.accept()];
    connections.sort_by_key(|(token, _)| *token);
    let [(1, mut input), (2, mut output)] = connections else {
        panic!("the tokens are not those of the request");
    };
    let mut ends = ends.recv().unwrap();
    assert!(ends.stderr.is_none());
    // The container's process: copies its input to its output, then ends.
    let process = thread::spawn(move || {
        let mut stdin = File::from(ends.stdin.take().unwrap());
        let mut stdout = File::from(ends.stdout.take().unwrap());
        std::io::copy(&mut stdin, &mut stdout).unwrap()
    });
    let writer = thread::spawn(move || {
        input.write_all(&pattern()).unwrap();
        input.shutdown(std::net::Shutdown::Write).unwrap();
        input
    });
    thread::sleep(Duration::from_millis(300));
    assert!(!process.is_finished(), "the reader has read nothing yet");
    let mut read = Vec::new();
    output.read_to_end(&mut read).unwrap();
    assert!(read == pattern(), "the bytes arrive as they were");
    assert_eq!(process.join().unwrap(), MUCH as u64);
    drop(writer.join().unwrap());
    drop(output);
    task.join().unwrap();
}

#[test]
fn what_a_process_wrote_before_its_end_is_not_lost() {
    let host = Host::new();
    let stdio = agent::Stdio {
        stderr: stream(3),
        ..Default::default()
    };
    let (task, ends) = in_background(host.transport(), stdio);
    let (_, mut errors) = host.accept();
    let ends = ends.recv().unwrap();
    let mut stderr = File::from(ends.stderr.unwrap());
    stderr.write_all(b"last words").unwrap();
    drop(stderr);
    // Long after the end.
    thread::sleep(Duration::from_millis(200));
    assert!(
        !task.is_finished(),
        "the connection is kept until the host closes it"
    );
    let mut read = String::new();
    errors.read_to_string(&mut read).unwrap();
    assert_eq!(read, "last words");
    drop(errors);
    task.join().unwrap();
}

#[test]
fn a_stdin_that_nobody_reads_any_more_is_closed() {
    let host = Host::new();
    let stdio = agent::Stdio {
        stdin: stream(1),
        ..Default::default()
    };
    let (task, ends) = in_background(host.transport(), stdio);
    let (_, mut input) = host.accept();
    drop(ends.recv().unwrap());
    let mut nothing = [0u8; 1];
    assert_eq!(
        input.read(&mut nothing).unwrap(),
        0,
        "the host learns of it"
    );
    task.join().unwrap();
}

#[test]
fn an_output_that_the_host_has_closed_is_a_broken_pipe() {
    let host = Host::new();
    let stdio = agent::Stdio {
        stdout: stream(2),
        ..Default::default()
    };
    let (task, ends) = in_background(host.transport(), stdio);
    drop(host.accept());
    let mut stdout = File::from(ends.recv().unwrap().stdout.unwrap());
    let written = stdout.write_all(&pattern()).unwrap_err();
    assert_eq!(written.kind(), std::io::ErrorKind::BrokenPipe);
    task.join().unwrap();
}

#[test]
fn a_reader_that_never_reads_blocks_nobody_else() {
    let host = Host::new();
    let stdio = agent::Stdio {
        stdout: stream(2),
        stderr: stream(3),
        ..Default::default()
    };
    let (task, ends) = in_background(host.transport(), stdio);
    let mut connections = [host.accept(), host.accept()];
    connections.sort_by_key(|(token, _)| *token);
    let [(_, stalled), (_, mut errors)] = connections;
    let mut ends = ends.recv().unwrap();
    let mut stdout = File::from(ends.stdout.take().unwrap());
    let blocked = thread::spawn(move || stdout.write_all(&pattern()));
    let mut stderr = File::from(ends.stderr.take().unwrap());
    let writer = thread::spawn(move || stderr.write_all(&pattern()));
    let mut read = Vec::new();
    errors.read_to_end(&mut read).unwrap();
    assert!(
        read == pattern(),
        "the neighbour's bytes arrive as they were"
    );
    writer.join().unwrap().unwrap();
    assert!(!blocked.is_finished(), "and the stalled stream still waits");
    drop((stalled, errors));
    assert!(blocked.join().unwrap().is_err());
    task.join().unwrap();
}

#[test]
fn a_terminal_is_an_input_an_output_and_a_size() {
    let host = Host::new();
    let stdio = agent::Stdio {
        stdin: stream(1),
        stdout: stream(2),
        ..Default::default()
    };
    let transport = host.transport();
    let (size_sender, sizes) = std::sync::mpsc::channel();
    let task = thread::spawn(move || {
        let runtime = runtime();
        runtime.block_on(async {
            let streams = Streams::open(&transport, &stdio, true).await.unwrap();
            let (master, slave) = pty();
            let terminal = streams.attach(master).unwrap();
            terminal.resize(33, 101).unwrap();
            let size = rustix::termios::tcgetwinsize(&slave).unwrap();
            size_sender
                .send((size.ws_row, size.ws_col, File::from(slave)))
                .unwrap();
            drop(terminal);
            while runtime.metrics().num_alive_tasks() > 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
    });
    let mut connections = [host.accept(), host.accept()];
    connections.sort_by_key(|(token, _)| *token);
    let [(_, mut input), (_, mut output)] = connections;
    let (rows, columns, mut slave) = sizes.recv().unwrap();
    assert_eq!((rows, columns), (33, 101));
    input.write_all(b"line\n").unwrap();
    let mut line = [0u8; 16];
    assert_eq!(slave.read(&mut line).unwrap(), 5);
    slave.write_all(b"answer\n").unwrap();
    drop(slave);
    let mut read = String::new();
    output.read_to_string(&mut read).unwrap();
    assert_eq!(
        read, "line\r\nanswer\r\n",
        "the echo, the answer and the end"
    );
    drop((input, output));
    task.join().unwrap();
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let runtime = runtime();
    let transport = Transport::Unix(Path::new("/nonexistent").to_owned());
    let open = |stdio: agent::Stdio, terminal| {
        runtime
            .block_on(Streams::open(&transport, &stdio, terminal))
            .unwrap_err()
    };
    let mut short = agent::Stdio {
        stdin: stream(1),
        ..Default::default()
    };
    short.stdin.as_mut().unwrap().token.pop();
    assert!(matches!(
        open(short, false),
        Error::Invalid {
            stream: "stdin",
            ..
        }
    ));
    let stderr = agent::Stdio {
        stderr: stream(1),
        ..Default::default()
    };
    assert!(matches!(
        open(stderr.clone(), true),
        Error::Invalid {
            stream: "stderr",
            ..
        }
    ));
    assert!(matches!(
        open(stderr, false),
        Error::Connect {
            stream: "stderr",
            port: PORT,
            ..
        }
    ));
}

fn pty() -> (OwnedFd, OwnedFd) {
    use rustix::fs::{Mode, OFlags};
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap();
    let slave = rustix::fs::open(name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap();
    (master, slave)
}

/// A process's pipes on a runtime that runs only when it is asked to.
struct Replaced {
    host: Host,
    runtime: tokio::runtime::Runtime,
    replacements: Replacements,
    ends: ProcessEnds,
}

impl Replaced {
    fn new(stdio: agent::Stdio) -> Self {
        let host = Host::new();
        let runtime = runtime();
        let (replacements, ends) = runtime.block_on(async {
            let streams = Streams::open(&host.transport(), &stdio, false).await;
            let mut streams = streams.unwrap();
            let replacements = streams.replacements();
            let (ends, pipes) = streams.pipes().unwrap();
            pipes.run();
            (replacements, ends)
        });
        Self {
            host,
            runtime,
            replacements,
            ends,
        }
    }

    fn rest(&self) {
        let rest = async { tokio::time::sleep(Duration::from_millis(50)).await };
        self.runtime.block_on(rest);
    }

    fn attach(&self, stdio: agent::Stdio) {
        self.runtime.block_on(async {
            let streams = Streams::open(&self.host.transport(), &stdio, false).await;
            streams.unwrap().take_over(&self.replacements).await;
        });
        self.rest();
    }
}

#[test]
fn input_that_was_cut_goes_on_over_another_connection() {
    let stdin = || agent::Stdio {
        stdin: stream(1),
        ..Default::default()
    };
    let mut process = Replaced::new(stdin());
    // With its token unread: the connection is reset.
    drop(process.host.listener.accept().unwrap());
    process.rest();
    process.attach(stdin());
    let (_, mut input) = process.host.accept();
    input.write_all(b"in").unwrap();
    process.rest();
    let mut stdin = File::from(process.ends.stdin.take().unwrap());
    let mut read = [0; 2];
    stdin.read_exact(&mut read).unwrap();
    assert_eq!(&read, b"in");
    process.attach(agent::Stdio::default());
    assert_eq!(stdin.read(&mut read).unwrap(), 0, "none: the stream's end");
}

#[test]
fn output_goes_on_over_another_connection() {
    let stdout = || agent::Stdio {
        stdout: stream(1),
        ..Default::default()
    };
    let mut process = Replaced::new(stdout());
    let mut stdout_of_process = File::from(process.ends.stdout.take().unwrap());
    let (_, mut first) = process.host.accept();
    stdout_of_process.write_all(b"one").unwrap();
    process.rest();
    process.attach(stdout());
    let (_, mut second) = process.host.accept();
    stdout_of_process.write_all(b"two").unwrap();
    drop(stdout_of_process);
    process.rest();
    let mut text = String::new();
    first.read_to_string(&mut text).unwrap();
    second.read_to_string(&mut text).unwrap();
    assert_eq!(text, "onetwo");
}
