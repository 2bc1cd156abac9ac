//! A network namespace's interfaces, addresses, routes and neighbours, read and set over rtnetlink.
//!
//! The shim reads the pod's namespace on the host, and the agent makes the same in the guest. Both
//! need the same few messages of the kernel, and this crate has only these. One blocking socket
//! serves one request at a time, each with a deadline; another socket reports changes. Deliberately
//! absent: async, and every attribute that neither side carries. Facts: rtnetlink(7), Linux
//! Documentation/userspace-api/netlink, include/uapi.

mod address;
mod changes;
mod link;
mod message;
mod neighbour;
mod route;
mod socket;

pub use address::Address;
pub use changes::Changes;
pub use link::{Change, Link, loopback_up};
pub use message::{Attributes, Message, address_bytes, number, text};
pub use neighbour::Neighbour;
pub use route::{Hop, Route};
pub use socket::Socket;

/// A route or a neighbour, with the names of its interfaces: in another namespace they have other
/// numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named<T> {
    /// The names, in the order of the interface numbers in `it`.
    pub interfaces: Vec<String>,
    /// The route or neighbour.
    pub it: T,
}

#[cfg(test)]
mod tests;
