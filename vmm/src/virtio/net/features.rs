//! The features of the network device (virtio 1.2, 5.1.3).

/// VIRTIO_NET_F_CSUM: the driver may leave a frame's checksum to the device.
pub const FEATURE_CSUM: u64 = 1 << 0;
/// VIRTIO_NET_F_GUEST_CSUM: the device may leave a frame's checksum to the driver.
pub const FEATURE_GUEST_CSUM: u64 = 1 << 1;
/// VIRTIO_NET_F_MTU: the MTU is in the configuration.
pub const FEATURE_MTU: u64 = 1 << 3;
/// VIRTIO_NET_F_MAC: the address is in the configuration.
pub const FEATURE_MAC: u64 = 1 << 5;
/// VIRTIO_NET_F_GUEST_TSO4, _TSO6: the driver takes TCP segments longer than the MTU.
pub const FEATURE_GUEST_TSO4: u64 = 1 << 7;
pub const FEATURE_GUEST_TSO6: u64 = 1 << 8;
/// VIRTIO_NET_F_HOST_TSO4, _TSO6: the device takes them.
pub const FEATURE_HOST_TSO4: u64 = 1 << 11;
pub const FEATURE_HOST_TSO6: u64 = 1 << 12;
/// VIRTIO_NET_F_MRG_RXBUF: a frame may fill several receive buffers.
pub const FEATURE_MERGEABLE: u64 = 1 << 15;

/// All that it offers besides those of its rings.
pub const FEATURES: u64 = FEATURE_CSUM
    | FEATURE_GUEST_CSUM
    | FEATURE_MTU
    | FEATURE_MAC
    | FEATURE_GUEST_TSO4
    | FEATURE_GUEST_TSO6
    | FEATURE_HOST_TSO4
    | FEATURE_HOST_TSO6
    | FEATURE_MERGEABLE;
