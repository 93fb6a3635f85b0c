//! Standard streams of containers, end to end.

use std::time::Duration;

use cella_proto::agent as proto;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::harness::{Sandbox, process, read_all, soon, stream};

/// More than any pipe or socket buffer on the way holds.
const MUCH: usize = 16 << 20;

fn pattern() -> Vec<u8> {
    (0..MUCH)
        .map(|index| (index ^ (index >> 8) ^ (index >> 16)) as u8)
        .collect()
}

fn all_streams() -> proto::Stdio {
    proto::Stdio {
        stdin: stream(1),
        stdout: stream(2),
        stderr: stream(3),
        ..Default::default()
    }
}

#[tokio::test]
async fn sixteen_mebibytes_go_through_cat_while_the_reader_stalls() {
    let Some(sandbox) = Sandbox::start().await else {
        return;
    };
    sandbox
        .create("a", &sandbox.spec(&["cat"]), all_streams())
        .await
        .unwrap();
    let [mut input, output, errors] = sandbox.accept_all().await;
    let mut events = sandbox.watch().await;
    sandbox.start_process("a", "").await.unwrap();
    let writer = tokio::spawn(async move {
        input.write_all(&pattern()).await.unwrap();
        input.shutdown().await.unwrap();
        input
    });
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!writer.is_finished(), "the reader has read nothing yet");
    assert!(
        read_all(output).await == pattern(),
        "the bytes arrive as they were"
    );
    assert_eq!(events.exit().await.exit_status, 0);
    assert_eq!(read_all(errors).await, b"");
    drop(writer.await.unwrap());
}

#[tokio::test]
async fn an_exit_is_told_at_once_and_the_output_drains_after_it() {
    let Some(sandbox) = Sandbox::start().await else {
        return;
    };
    let mut spec = sandbox.spec(&["sh", "-c", "echo last words; exit 3"]);
    spec["root"]["readonly"] = json!(true);
    let stdio = proto::Stdio {
        stdout: stream(2),
        ..Default::default()
    };
    sandbox.create("a", &spec, stdio).await.unwrap();
    let [output] = sandbox.accept_all().await;
    let mut events = sandbox.watch().await;
    sandbox.start_process("a", "").await.unwrap();
    assert_eq!(events.exit().await.exit_status, 3);
    sandbox.delete("a", "").await.unwrap();
    assert_eq!(read_all(output).await, b"last words\n");
}

#[tokio::test]
async fn a_neighbour_that_is_never_read_blocks_nobody() {
    let Some(sandbox) = Sandbox::start().await else {
        return;
    };
    let endless = sandbox.spec(&["cat", "/dev/zero"]);
    sandbox
        .create("endless", &endless, all_streams())
        .await
        .unwrap();
    let unread: [_; 3] = sandbox.accept_all().await;
    sandbox.start_process("endless", "").await.unwrap();
    let echo = sandbox.spec(&["echo", "hello"]);
    sandbox.create("b", &echo, all_streams()).await.unwrap();
    let [_input, output, _errors] = sandbox.accept_all().await;
    sandbox.start_process("b", "").await.unwrap();
    assert_eq!(read_all(output).await, b"hello\n");
    drop(unread);
}

#[tokio::test]
async fn a_terminal_echoes_resizes_and_ends() {
    let Some(sandbox) = Sandbox::start().await else {
        return;
    };
    let mut spec = sandbox.spec(&["sh", "-c", "read line; stty size; echo got $line"]);
    spec["process"]["terminal"] = json!(true);
    let stdio = proto::Stdio {
        stdin: stream(1),
        stdout: stream(2),
        rows: 20,
        columns: 70,
        ..Default::default()
    };
    sandbox.create("a", &spec, stdio).await.unwrap();
    let [mut input, output] = sandbox.accept_all().await;
    let mut events = sandbox.watch().await;
    sandbox.start_process("a", "").await.unwrap();
    let resize = proto::ResizeTerminalRequest {
        container_id: "a".to_owned(),
        rows: 33,
        columns: 101,
        ..Default::default()
    };
    sandbox
        .client
        .resize_terminal(soon(), &resize)
        .await
        .unwrap();
    input.write_all(b"word\n").await.unwrap();
    assert_eq!(read_all(output).await, b"word\r\n33 101\r\ngot word\r\n");
    assert_eq!(events.exit().await.exit_status, 0);
}

#[tokio::test]
async fn a_process_beside_the_init_has_streams_of_its_own() {
    let Some(sandbox) = Sandbox::start().await else {
        return;
    };
    sandbox.run("a", &["sleep", "1000"]).await;
    let command = process(&["sh", "-c", "tr a-z A-Z; echo oops >&2; exit 5"]);
    sandbox
        .exec("a", "e1", &command, all_streams())
        .await
        .unwrap();
    let [mut input, mut output, errors] = sandbox.accept_all().await;
    let mut events = sandbox.watch().await;
    sandbox.start_process("a", "e1").await.unwrap();
    input.write_all(b"hello").await.unwrap();
    input.shutdown().await.unwrap();
    let mut first = [0u8; 5];
    output.read_exact(&mut first).await.unwrap();
    assert_eq!(&first, b"HELLO");
    assert_eq!(read_all(errors).await, b"oops\n");
    let exit = events.exit().await;
    assert_eq!((exit.exec_id.as_str(), exit.exit_status), ("e1", 5));
    assert_eq!(read_all(output).await, b"");
    let deleted = sandbox.delete("a", "e1").await.unwrap().unwrap();
    assert_eq!(deleted.exit_status, 5);
}
