//! A container that is made before the guest is saved, up to its command, which there is not. What takes longer the first time
//! (the guest's kernel makes its caches, the agent's pages are mapped, one fault each) is done for every clone; on KVM
//! without hardware that is more than half of a first container's time.

use std::time::Duration;

use oci_spec::runtime::Spec;

use super::Error;
use crate::image::Image;
use crate::sandbox::stdio::{self, Wanted};
use crate::sandbox::{self, Sandbox, StartFailure};
use crate::spec::{self, SpecOptions};

/// The one id that the agent of a template's guest makes a container of.
const ID: &str = "rehearsal";
/// Its root in the guest, an empty directory.
const ROOT: &str = "/run/cella/rehearsal";
/// Its command. There is no program in the guest but the agent, which no container may run.
const COMMAND: &str = "/rehearsal";
/// How long it may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// Has the guest of `sandbox` make a container as images have it, until it does not find its command.
pub(super) async fn rehearse(sandbox: &Sandbox) -> Result<(), Error> {
    let spec = container(sandbox)?;
    let wanted = Wanted {
        stdin: true,
        terminal: None,
    };
    let (stdio, pending) = stdio::listen(&sandbox.dir().sockets(), wanted)?;
    let made = async { tokio::try_join!(sandbox.create(ID, &spec, stdio), pending.accept()) };
    match tokio::time::timeout(PATIENCE, made).await {
        Ok(Err(error)) if error.start_failure() == Some(StartFailure::NotFound) => Ok(()),
        Ok(Err(error)) => Err(error.into()),
        Ok(Ok(_)) => Err(Error::Guest(format!("the guest has a {COMMAND}"))),
        Err(_) => Err(Error::Guest(format!(
            "the guest made no container within {} s",
            PATIENCE.as_secs()
        ))),
    }
}

fn container(sandbox: &Sandbox) -> Result<Spec, sandbox::Error> {
    let options = SpecOptions {
        root: ROOT.into(),
        args: vec![COMMAND.to_owned()],
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
