//! Standard streams under load: what is sent arrives, and a reader that is slow or asleep holds up nobody else.

use std::io::{Read, Write};
use std::process::Stdio;
use std::time::{Duration, Instant};

use super::host;
use super::pod::Pod;
use cella_tests::{finish, wait};
use sha2::{Digest, Sha256};

const MIB: usize = 1 << 20;

/// Bytes that do not repeat within what is sent.
fn bytes(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Sends `sent` through `cat` in a container, reading the answer in pieces of `piece` bytes; the reader first waits.
fn there_and_back(sent: &[u8], piece: usize, first_wait: Duration) {
    let Some(host) = host() else { return };
    let image = host.busybox();
    let mut child = host
        .command(&["run", "-i", &image, "cat"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let expected = Sha256::digest(sent);
    let input = sent.to_vec();
    let feeding = std::thread::spawn(move || stdin.write_all(&input));
    std::thread::sleep(first_wait);
    let mut digest = Sha256::new();
    let mut received = 0;
    let mut buffer = vec![0; piece];
    loop {
        let len = stdout.read(&mut buffer).unwrap();
        if len == 0 {
            break;
        }
        received += len;
        digest.update(&buffer[..len]);
    }
    feeding.join().unwrap().unwrap();
    assert_eq!(received, sent.len());
    assert_eq!(digest.finalize(), expected);
    finish(child, b"").expect_status(0);
    host.assert_clean();
}

#[test]
fn sixteen_mebibytes_there_and_back() {
    there_and_back(&bytes(16 * MIB), 64 << 10, Duration::ZERO);
}

#[test]
fn two_hundred_fifty_six_mebibytes_there_and_back() {
    let begin = Instant::now();
    there_and_back(&bytes(256 * MIB), MIB, Duration::ZERO);
    println!("256 MiB there and back: {:?}", begin.elapsed());
}

#[test]
fn a_reader_that_stalls_gets_everything_later() {
    // Long enough that every buffer on the way is full.
    there_and_back(&bytes(8 * MIB), 1000, Duration::from_secs(5));
}

#[test]
fn a_reader_that_never_reads_blocks_nobody_else() {
    let Some(pod) = Pod::boot("1") else { return };
    let mut deaf = pod
        .host
        .command(&["exec", "c", "sh", "-c", "echo up >&2; cat /dev/zero"])
        .spawn()
        .unwrap();
    let mut up = [0; 3];
    deaf.stderr.as_mut().unwrap().read_exact(&mut up).unwrap();
    // Its standard output is a pipe that nobody reads: the container's end blocks, and no other.
    for round in 0..5 {
        assert_eq!(pod.sh(&format!("echo {round}")).trim(), round.to_string());
    }
    let sent = bytes(4 * MIB);
    let said = pod
        .host
        .cella_with_input(&["exec", "-i", "c", "wc", "-c"], &sent)
        .expect_status(0);
    assert_eq!(said.stdout.trim(), sent.len().to_string());
    deaf.kill().unwrap();
    deaf.wait().unwrap();
    pod.end();
}

#[test]
fn the_end_of_the_input_is_not_the_end_of_the_output() {
    let Some(pod) = Pod::boot("2") else { return };
    let script = "cat > /tmp/in; sleep 1; echo; wc -c < /tmp/in; echo failed >&2; exit 5";
    let sent = bytes(100_001);
    let said = pod
        .host
        .cella_with_input(&["exec", "-i", "c", "sh", "-c", script], &sent)
        .expect_status(5);
    assert_eq!(said.stdout.trim(), "100001");
    assert_eq!(said.stderr, "failed\n");
    pod.end();
}

#[test]
fn a_reader_that_leaves_ends_the_writer() {
    let Some(pod) = Pod::boot("1") else { return };
    let mut child = pod.host.command(&["exec", "c", "yes"]).spawn().unwrap();
    let mut some = [0; 10];
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut some).unwrap();
    drop(stdout);
    let status = wait(&mut child, Duration::from_secs(30));
    assert_ne!(status, 0);
    assert_eq!(pod.sh("pgrep yes || echo none").trim(), "none");
    pod.end();
}

#[test]
fn signals_reach_the_command() {
    let Some(host) = host() else { return };
    let image = host.busybox();
    let script = "trap 'echo got; exit 9' USR1; echo up; while :; do sleep 1 & wait $!; done";
    let mut child = host
        .command(&["run", "--name", "s", &image, "sh", "-c", script])
        .spawn()
        .unwrap();
    let mut up = [0; 3];
    child.stdout.as_mut().unwrap().read_exact(&mut up).unwrap();
    host.cella(&["kill", "s", "USR1"]).expect_status(0);
    let said = finish(child, b"").expect_status(9);
    assert_eq!(said.stdout, "got\n");
    host.assert_clean();
}
