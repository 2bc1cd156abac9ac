//! The layers of a jail, each of which a test can leave out to see what it is good for.
//!
//! Only a build with the feature `leave-out` can, and only by a call of its own code: no program
//! makes it, and nothing from outside is looked at. The feature comes by the tests' dependencies
//! alone, so what is shipped has all layers ([`LEAVE_OUT`]).

use rustix::process::Resource;

/// Something that a process gives up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// The descriptors that it does not need.
    Descriptors,
    /// The mount namespace.
    Mounts,
    /// The root directory.
    Root,
    /// The user, and all capabilities with it.
    User,
    /// The capabilities, of a process that stays root.
    Capabilities,
    /// All that Landlock knows.
    Landlock,
    /// The limit of a resource.
    Limit(Resource),
    /// The list of system calls of a kind of thread, by the thread's name.
    Filter(&'static str),
}

/// Is in a program in which layers can be left out, and in no other.
#[cfg(feature = "leave-out")]
pub static LEAVE_OUT: &str = "kata-like-jail: a test build, whose layers can be left out";

#[cfg(feature = "leave-out")]
static LEFT_OUT: std::sync::Mutex<Vec<Layer>> = std::sync::Mutex::new(Vec::new());

/// From now on the process closes its jail without these layers.
#[cfg(feature = "leave-out")]
pub fn leave_out(layers: &[Layer]) {
    *kata_like_linux::lock(&LEFT_OUT) = layers.to_vec();
}

/// Whether the layer is to be closed.
#[cfg(feature = "leave-out")]
pub fn is_kept(layer: Layer) -> bool {
    let marked = std::hint::black_box(LEAVE_OUT);
    marked.is_empty() || !kata_like_linux::lock(&LEFT_OUT).contains(&layer)
}

/// Whether the layer is to be closed: it is.
#[cfg(not(feature = "leave-out"))]
pub fn is_kept(_: Layer) -> bool {
    true
}
