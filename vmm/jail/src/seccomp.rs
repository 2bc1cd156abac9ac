//! Seccomp filters: one allow-list per process.
