//! What [`crate::icount`] measures: the agent's work for requests of a host that is not there.

use cella_proto::agent::{CreateContainerRequest, SetUpSandboxRequest};

use super::Agent;
use crate::error::Error;
use crate::icount::{ContainerSteps, Steps};

impl Agent {
    /// Prepares the guest and sets the pod up.
    pub(crate) fn measure_set_up(&self, steps: &mut Steps) -> Result<(), Error> {
        self.prepare()?;
        steps.done("prepared");
        self.set_sandbox_up(&SetUpSandboxRequest {
            hostname: "measured".to_owned(),
            ..Default::default()
        })?;
        steps.done("set-up");
        Ok(())
    }

    /// The life of a container without streams.
    pub(crate) async fn measure_container(
        &self,
        id: &str,
        spec: &[u8],
        steps: &mut Steps,
        [created, started, ended, deleted]: ContainerSteps,
    ) -> Result<(), Error> {
        let request = CreateContainerRequest {
            container_id: id.to_owned(),
            spec: spec.to_vec(),
            ..Default::default()
        };
        self.make_container(&request).await?;
        steps.done(created);
        self.start_process(id, "").await?;
        steps.done(started);
        self.containers.get(id)?.ended().await;
        steps.done(ended);
        self.delete_container(id).await?;
        steps.done(deleted);
        Ok(())
    }
}
