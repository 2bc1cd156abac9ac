//! Changes the limits of a container.

use std::sync::Arc;

use super::Pod;
use super::limits::{fits, parse};
use kata_like_failure::{Failure, Kind};

impl Pod {
    /// Changes a container's limits: an OCI `linux.resources` object as JSON.
    pub async fn update(self: Arc<Self>, id: String, resources: Vec<u8>) -> Result<(), Failure> {
        let (container, init) = self.find(&id, "")?;
        if init.life().has_exited() {
            return Err(Failure::new(
                Kind::Failed,
                "cannot update a stopped container".to_owned(),
            ));
        }
        let sandbox = container.sandbox()?;
        let wanted = parse(&resources)?;
        let limits = *container.host_side.limits();
        fits(&wanted, limits, &sandbox.memory, sandbox.vcpus)?;
        sandbox.guest.agent.update(&id, &resources).await?;
        *container.host_side.limits() = limits.changed_by(&wanted);
        Ok(())
    }
}
