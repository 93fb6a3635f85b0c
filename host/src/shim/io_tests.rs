//! Streams against FIFOs whose readers come late, go away, or never come.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use super::*;

fn fifo(dir: &tempfile::TempDir, name: &str) -> String {
    let path = dir.path().join(name);
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &path,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    path.to_str().unwrap().to_owned()
}

/// Streams whose guest's ends are in the hand of the test.
fn streams() -> (Streams, UnixStream, UnixStream) {
    let (stdin, guest_stdin) = UnixStream::pair().unwrap();
    let (stdout, guest_stdout) = UnixStream::pair().unwrap();
    let streams = Streams {
        stdin: Some(stdin),
        stdout: Some(stdout),
        stderr: None,
    };
    (streams, guest_stdin, guest_stdout)
}

#[tokio::test]
async fn output_waits_for_the_next_reader_and_ends_with_the_stream() {
    let dir = tempfile::tempdir().unwrap();
    let stdio = Stdio {
        stdout: fifo(&dir, "out"),
        ..Stdio::default()
    };
    let mut io = Io::open(&stdio, "c", "n").await.unwrap();
    let (streams, _stdin, mut guest) = streams();
    io.connect(streams).unwrap();
    // A reader that comes and goes, as containerd does when it restarts.
    drop(
        OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&stdio.stdout)
            .unwrap(),
    );
    guest.write_all(b"first ").unwrap();
    let reader = tokio::task::spawn_blocking({
        let path = stdio.stdout.clone();
        move || {
            let mut text = String::new();
            File::open(path).unwrap().read_to_string(&mut text).unwrap();
            text
        }
    });
    guest.write_all(b"second").unwrap();
    drop(guest);
    io.finish(Duration::from_secs(60)).await;
    assert_eq!(reader.await.unwrap(), "first second");
}

#[tokio::test]
async fn an_output_that_nobody_reads_is_given_up_at_the_limit() {
    let dir = tempfile::tempdir().unwrap();
    let stdio = Stdio {
        stdout: fifo(&dir, "out"),
        ..Stdio::default()
    };
    let mut io = Io::open(&stdio, "c", "n").await.unwrap();
    let (streams, _stdin, guest) = streams();
    io.connect(streams).unwrap();
    guest.set_nonblocking(true).unwrap();
    let mut guest = guest;
    // More than the FIFO and the socket hold.
    while guest.write(&[0; 65536]).is_ok() {}
    drop(guest);
    io.finish(Duration::from_millis(50)).await;
}

#[tokio::test]
async fn input_ends_after_close_and_its_last_writer() {
    let dir = tempfile::tempdir().unwrap();
    let stdio = Stdio {
        stdin: fifo(&dir, "in"),
        ..Stdio::default()
    };
    let mut io = Io::open(&stdio, "c", "n").await.unwrap();
    let (streams, guest, _stdout) = streams();
    io.connect(streams).unwrap();
    io.open_stdin().unwrap();
    let reading = tokio::task::spawn_blocking(move || {
        let mut guest = guest;
        let mut text = String::new();
        guest.read_to_string(&mut text).unwrap();
        text
    });
    // Two clients one after another: the first one's end is not the input's.
    for text in ["one ", "two"] {
        let mut writer = OpenOptions::new().write(true).open(&stdio.stdin).unwrap();
        writer.write_all(text.as_bytes()).unwrap();
    }
    assert!(!reading.is_finished());
    io.close_stdin();
    assert_eq!(reading.await.unwrap(), "one two");
    io.finish(Duration::ZERO).await;
}

#[tokio::test]
async fn files_are_appended_to_and_nonsense_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sub/log");
    let stdio = Stdio {
        stdout: format!("file://{}", path.display()),
        ..Stdio::default()
    };
    for text in ["a", "b"] {
        let mut io = Io::open(&stdio, "c", "n").await.unwrap();
        let (streams, _stdin, mut guest) = streams();
        io.connect(streams).unwrap();
        guest.write_all(text.as_bytes()).unwrap();
        drop(guest);
        io.finish(Duration::from_secs(60)).await;
    }
    assert_eq!(std::fs::read_to_string(path).unwrap(), "ab");
    for (wrong, kind) in [
        ("/nonexistent/fifo", ErrorKind::NotFound),
        ("npipe://x", ErrorKind::Unimplemented),
    ] {
        let stdio = Stdio {
            stdout: wrong.into(),
            ..Stdio::default()
        };
        assert_eq!(Io::open(&stdio, "c", "n").await.unwrap_err().kind(), kind);
    }
}
