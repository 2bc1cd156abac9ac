//! A network namespace's interfaces, addresses, routes and neighbours, read and set over rtnetlink.
//!
//! The shim reads what the pod's namespace on the host holds, and the agent makes the same in the guest:
//! both need the same few messages of the kernel's, so this is all there is of them. One blocking socket,
//! one request at a time, each with a deadline; another that tells of changes. Deliberately absent: async, and every attribute
//! that nobody here carries. Facts: rtnetlink(7), Linux Documentation/userspace-api/netlink, include/uapi.

mod address;
mod changes;
mod link;
mod message;
mod neighbour;
mod route;
mod socket;

pub use address::Address;
pub use changes::Changes;
pub use link::{Change, Link};
pub use message::{Attributes, Message, address_bytes, number, text};
pub use neighbour::Neighbour;
pub use route::{Hop, Route};
pub use socket::Socket;

/// A route or a neighbour with the names of the interfaces in it, which have other numbers in another namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named<T> {
    /// The names, in the order of its own numbers.
    pub interfaces: Vec<String>,
    /// The thing itself.
    pub it: T,
}

#[cfg(test)]
mod tests;
