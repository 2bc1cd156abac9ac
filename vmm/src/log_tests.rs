//! Rings as the kernel writes them, and as an attacker does.
