//! Calls that change what runs already: freezing, limits, the clock, devices.

use std::time::Duration;

use kata_like_agent_protocol::agent;
use ttrpc::context::with_duration;

use super::{ASK, Agent, MAKE, host_time_ns, request_for};
use kata_like_failure::Failure;

/// How long a guest may take to set its clock.
const SET_TIME: Duration = Duration::from_secs(5);

impl Agent {
    /// Freezes a container; answered when all its processes stand still.
    pub async fn pause(&self, container: &str) -> Result<(), Failure> {
        let request = request_for(container);
        let client = self.client.clone();
        let work = async move { client.pause(with_duration(ASK), &request).await };
        let what = format!("pause container {container} in the guest");
        self.call(&what, ASK, work).await.map(drop)
    }

    /// Lets a paused container go on.
    pub async fn resume(&self, container: &str) -> Result<(), Failure> {
        let request = request_for(container);
        let client = self.client.clone();
        let work = async move { client.resume(with_duration(ASK), &request).await };
        let what = format!("resume container {container} in the guest");
        self.call(&what, ASK, work).await.map(drop)
    }

    /// Changes a container's limits: an OCI `linux.resources` object as JSON.
    pub async fn update(&self, container: &str, resources: &[u8]) -> Result<(), Failure> {
        let request = agent::UpdateRequest {
            container: container.to_owned(),
            resources: resources.to_vec(),
            ..Default::default()
        };
        let client = self.client.clone();
        let work = async move { client.update(with_duration(ASK), &request).await };
        let what = format!("update container {container} in the guest");
        self.call(&what, ASK, work).await.map(drop)
    }

    /// Sets the guest's clock by the host's. The time is taken when the call is sent.
    pub async fn set_time(&self) -> Result<(), Failure> {
        let client = self.client.clone();
        let work = async move {
            let request = agent::SetTimeRequest {
                host_time_ns: host_time_ns(),
                ..Default::default()
            };
            client.set_time(with_duration(SET_TIME), &request).await
        };
        self.call("set the guest's clock", SET_TIME, work)
            .await
            .map(drop)
    }

    /// Connects to a port of the guest's loopback, and joins the connection to the stream that is
    /// dialled with this token afterwards.
    pub async fn connect(&self, port: u16, token: [u8; 16]) -> Result<(), Failure> {
        let request = agent::ConnectRequest {
            port: port.into(),
            token: token.to_vec(),
            ..Default::default()
        };
        let client = self.client.clone();
        let work = async move { client.connect(with_duration(ASK), &request).await };
        let what = format!("connect to port {port} in the guest");
        self.call(&what, ASK, work).await.map(drop)
    }

    /// Binds the device that the VMM has put into a slot.
    pub async fn bind_device(&self, slot: u32) -> Result<(), Failure> {
        let request = agent::DeviceRequest {
            slot,
            ..Default::default()
        };
        let client = self.client.clone();
        let work = async move { client.bind_device(with_duration(MAKE), &request).await };
        let what = format!("bind the device in slot {slot} in the guest");
        self.call(&what, MAKE, work).await.map(drop)
    }

    /// Takes the device in a slot from its driver, before the VMM empties it.
    pub async fn unbind_device(&self, slot: u32, limit: Duration) -> Result<(), Failure> {
        let request = agent::DeviceRequest {
            slot,
            ..Default::default()
        };
        let client = self.client.clone();
        let work = async move { client.unbind_device(with_duration(MAKE), &request).await };
        let what = format!("unbind the device in slot {slot} in the guest");
        self.call(&what, limit, work).await.map(drop)
    }
}
