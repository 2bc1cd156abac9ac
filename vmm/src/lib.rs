//! One KVM microVM: the parts that `main` puts together, and that the fuzz targets call.

pub mod virtio;
