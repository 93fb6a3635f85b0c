//! A container that is made, run and deleted before the guest is saved. What takes longer the first time (the guest's kernel
//! makes its caches, the agent's pages are mapped, one fault each) is done for every clone; on KVM without hardware that is
//! more than half of a first container's time.

use oci_spec::runtime::{Mount, Spec};
use serde_json::json;

use super::Error;
use crate::image::Image;
use crate::sandbox::stdio::{self, Wanted};
use crate::sandbox::{self, Sandbox};
use crate::spec::{self, SpecOptions};

/// The one id that the agent of a template's guest makes a container of.
const ID: &str = "rehearsal";
/// Its root in the guest, an empty directory.
const ROOT: &str = "/run/cella/rehearsal";
/// Its program, which is the agent's own file, does nothing when it is asked to.
const PROGRAM: [&str; 2] = ["/init", "--rehearse"];

/// Has the guest of `sandbox` make, run and delete a container as images have it, of its own files.
pub(super) async fn rehearse(sandbox: &Sandbox) -> Result<(), Error> {
    let spec = container(sandbox)?;
    let wanted = Wanted {
        stdin: true,
        terminal: None,
    };
    let (stdio, pending) = stdio::listen(&sandbox.dir().sockets(), wanted)?;
    let (_, streams) = tokio::try_join!(sandbox.create(ID, &spec, stdio), pending.accept())?;
    sandbox.start(ID, "").await?;
    let exit = sandbox.wait(ID, "").await?;
    sandbox.delete(ID, "").await?;
    drop(streams);
    match exit.exit_status {
        0 => Ok(()),
        status => Err(Error::Guest(format!(
            "the container that is rehearsed ended with {status}"
        ))),
    }
}

fn container(sandbox: &Sandbox) -> Result<Spec, sandbox::Error> {
    let bind = json!({
        "destination": PROGRAM[0], "type": "bind", "source": PROGRAM[0], "options": ["bind", "ro"],
    });
    let bind: Mount = serde_json::from_value(bind)
        .map_err(|e| sandbox::Error::host("describing a container's mount", e))?;
    let options = SpecOptions {
        root: ROOT.into(),
        args: PROGRAM.map(str::to_owned).to_vec(),
        mounts: vec![bind],
        ..SpecOptions::default()
    };
    // Whatever is no image's: an empty directory.
    let empty = sandbox.dir().share();
    Ok(spec::for_image(
        &Image::from_rootfs(&empty)?,
        &options,
        &empty,
    )?)
}
