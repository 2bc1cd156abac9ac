//! Calls that change what runs already: freezing, limits, the clock, devices.

use std::time::Duration;

use kata_like_agent_protocol::agent;
use kata_like_proxy::wire::Method;

use super::{ASK, Agent, Limit, MAKE, host_time_ns, request_for};
use kata_like_failure::Failure;

/// How long a guest may take to set its clock.
const SET_TIME: Duration = Duration::from_secs(5);

impl Agent {
    /// Freezes a container; answered when all its processes stand still.
    pub async fn pause(&self, container: &str) -> Result<(), Failure> {
        let request = request_for(container);
        let what = format!("pause container {container} in the guest");
        self.call(&what, Limit::of(ASK), Method::Pause, &request)
            .await
    }

    /// Lets a paused container go on.
    pub async fn resume(&self, container: &str) -> Result<(), Failure> {
        let request = request_for(container);
        let what = format!("resume container {container} in the guest");
        self.call(&what, Limit::of(ASK), Method::Resume, &request)
            .await
    }

    /// Changes a container's limits: an OCI `linux.resources` object as JSON.
    pub async fn update(&self, container: &str, resources: &[u8]) -> Result<(), Failure> {
        let request = agent::UpdateRequest {
            container: container.to_owned(),
            resources: resources.to_vec(),
            ..Default::default()
        };
        let what = format!("update container {container} in the guest");
        self.call(&what, Limit::of(ASK), Method::Update, &request)
            .await
    }

    /// Sets the guest's clock by the host's. The time is taken when the call is sent.
    pub async fn set_time(&self) -> Result<(), Failure> {
        let request = agent::SetTimeRequest {
            host_time_ns: host_time_ns(),
            ..Default::default()
        };
        let what = "set the guest's clock";
        self.call(what, Limit::of(SET_TIME), Method::SetTime, &request)
            .await
    }

    /// Connects to a port of the guest's loopback, and joins the connection to the stream that is
    /// dialled with this token afterwards.
    pub async fn connect(&self, port: u16, token: [u8; 16]) -> Result<(), Failure> {
        let request = agent::ConnectRequest {
            port: port.into(),
            token: token.to_vec(),
            ..Default::default()
        };
        let what = format!("connect to port {port} in the guest");
        self.call(&what, Limit::of(ASK), Method::Connect, &request)
            .await
    }

    /// Binds the device that the VMM has put into a slot.
    pub async fn bind_device(&self, slot: u32) -> Result<(), Failure> {
        let request = agent::DeviceRequest {
            slot,
            ..Default::default()
        };
        let what = format!("bind the device in slot {slot} in the guest");
        self.call(&what, Limit::of(MAKE), Method::BindDevice, &request)
            .await
    }

    /// Takes the device in a slot from its driver, before the VMM empties it.
    pub async fn unbind_device(&self, slot: u32, limit: Duration) -> Result<(), Failure> {
        let request = agent::DeviceRequest {
            slot,
            ..Default::default()
        };
        let what = format!("unbind the device in slot {slot} in the guest");
        self.call(
            &what,
            Limit::within(MAKE, limit),
            Method::UnbindDevice,
            &request,
        )
        .await
    }
}
