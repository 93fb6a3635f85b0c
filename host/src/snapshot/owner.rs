//! How another process asks a sandbox's owner, which alone can, to save it: a line on the socket `owner` in the sandbox's directory,
//! which root alone can reach. The line is the absolute path of the snapshot to be; the answer is an [`Answer`] in JSON.

use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

use super::{refuse, save};
use crate::error::ErrorKind;
use crate::paths::Paths;
use crate::sandbox::dir::SandboxDir;
use crate::sandbox::{Error, Sandbox};

/// The longest line, either way: a path, or an error around it.
const MAX_LINE: u64 = 16 * 1024;

/// What became of it.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    Saved,
    Failed { kind: ErrorKind, message: String },
}

/// Saves the owned sandbox whenever it is asked to; ends only with an error of the socket.
///
/// # Errors
/// The socket cannot be made.
pub async fn serve(paths: &Paths, sandbox: &Sandbox) -> Result<std::convert::Infallible, Error> {
    let path = sandbox.dir().owner();
    let action = || format!("listening at {}", path.display());
    let listener = UnixListener::bind(&path).map_err(|e| Error::host(action(), e))?;
    loop {
        let (stream, _) = listener
            .accept()
            .await
            .map_err(|e| Error::host(action(), e))?;
        if let Err(error) = answer(paths, sandbox, stream).await {
            // Whoever asked has gone.
            tracing::debug!("{}: {error}", path.display());
        }
    }
}

async fn answer(paths: &Paths, sandbox: &Sandbox, stream: UnixStream) -> std::io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut target = Vec::new();
    BufReader::new(read.take(MAX_LINE))
        .read_until(b'\n', &mut target)
        .await?;
    // A line that was cut is no path: nothing is written for it.
    if target.pop() != Some(b'\n') {
        return Ok(());
    }
    let target = PathBuf::from(std::ffi::OsString::from_vec(target));
    let answer = match save(paths, sandbox, &target).await {
        Ok(()) => Answer::Saved,
        Err(error) => Answer::Failed {
            kind: error.kind(),
            message: error.to_string(),
        },
    };
    write.write_all(&serde_json::to_vec(&answer)?).await
}

/// Has the owner of the sandbox in `dir` save it to `target`, an absolute path.
///
/// # Errors
/// The owner's, with their kinds; `FailedPrecondition`: it does not save sandboxes.
pub async fn ask(dir: &SandboxDir, target: &Path) -> Result<(), Error> {
    let path = dir.owner();
    let action = || format!("asking the owner of sandbox {} to save it", dir.id());
    let bytes = target.as_os_str().as_bytes();
    if bytes.contains(&b'\n') || bytes.len() as u64 >= MAX_LINE {
        return Err(refuse("a snapshot's path is one line, of 16 KiB at most"));
    }
    if !path.exists() {
        return Err(refuse(format!(
            "{}: it is not one of this command's",
            action()
        )));
    }
    let asked = async {
        let mut stream = UnixStream::connect(&path).await?;
        stream.write_all(&[bytes, b"\n"].concat()).await?;
        let mut answer = Vec::new();
        stream.take(MAX_LINE).read_to_end(&mut answer).await?;
        Ok(answer)
    };
    let answer: std::io::Result<Vec<u8>> = asked.await;
    let answer = answer.map_err(|e| Error::host(action(), e))?;
    match serde_json::from_slice(&answer) {
        Ok(Answer::Saved) => Ok(()),
        Ok(Answer::Failed { kind, message }) => Err(Error::state(kind, message)),
        Err(_) => Err(Error::state(
            ErrorKind::Unavailable,
            format!("{}: it has ended", action()),
        )),
    }
}
