//! SetUpSandbox.

use cella_proto::agent::SetUpSandboxRequest;

use super::{Agent, lock};
use crate::error::Error;

/// What SetUpSandbox leaves for the containers.
#[derive(Debug, Default)]
pub(super) struct State {
    set_up: bool,
}

impl Agent {
    /// Sets the pod up, once. A set-up that failed may be tried again.
    pub(super) fn set_sandbox_up(&self, request: &SetUpSandboxRequest) -> Result<(), Error> {
        self.prepare()?;
        let mut state = lock(&self.sandbox);
        if state.set_up {
            return Err(Error::State {
                operation: "setting up",
                what: "the sandbox".to_owned(),
                state: "it is set up already",
            });
        }
        crate::sandbox::set_up(request)?;
        state.set_up = true;
        Ok(())
    }
}
