//! The one process of a pod on the host that reads what the guest's agent sends.
//!
//! The shim starts it with the connection of the agent, which it alone reads. It makes the calls
//! that the shim asks for (`serve`), and tells what was answered in words of its own (`wire`), with
//! each text cleaned and cut, and each number in its range. Whoever takes it over has no file, no
//! capability and few system calls; the shim looks at each of its words again.
//!
//! What must hold: how much the agent may send is decided by `gate`, how often by `follow`. Nothing
//! here opens, names or starts anything.

mod call;
mod event;
mod figures;
mod follow;
#[cfg(feature = "fuzz")]
pub mod fuzz;
mod gate;
mod pace;
pub mod serve;
pub mod wire;

pub use event::{Event, NameQuestion, clean};
pub use figures::{CPU_KEYS, DeviceIo, EVENT_KEYS, HugePages, MEMORY_KEYS, Stats};
pub use pace::Pace;
