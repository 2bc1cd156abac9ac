//! The header before each frame (`struct virtio_net_hdr_v1`; virtio 1.2, 5.1.6).
//!
//! The tap has the same header, so a frame from the host passes to the driver as it is. A driver's
//! header is copied once and checked whole by [`checked`]. Only the checked copy reaches the host's
//! kernel, which uses its numbers when it computes checksums and cuts segments.

use super::features::{FEATURE_CSUM, FEATURE_HOST_TSO4, FEATURE_HOST_TSO6};

/// In bytes.
pub const SIZE: usize = 12;

/// The length of an Ethernet header in bytes.
pub const ETHERNET: usize = 14;
/// The length of an 802.1Q tag in bytes.
pub const VLAN_TAG: usize = 4;

/// The longest frame: an IP packet is no longer than its own length field can say.
pub const MAX_FRAME: usize = ETHERNET + VLAN_TAG + 65_535;

/// VIRTIO_NET_HDR_F_NEEDS_CSUM.
const NEEDS_CSUM: u8 = 1;

/// VIRTIO_NET_HDR_GSO_NONE, _TCPV4, _TCPV6.
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;

/// A driver's header for the host, if it fits the `length` bytes of the frame and the negotiated
/// features. Fields without a meaning are cleared.
pub fn checked(header: [u8; SIZE], length: usize, features: u64) -> Option<[u8; SIZE]> {
    let [flags, kind, h0, h1, s0, s1, c0, c1, o0, o1, _, _] = header;
    let number = |low, high| usize::from(u16::from_le_bytes([low, high]));
    if !(ETHERNET..=MAX_FRAME).contains(&length) {
        return None;
    }
    if flags & NEEDS_CSUM == 0 {
        // A segment to be cut has no checksum that could be right.
        return (kind == GSO_NONE).then_some([0; SIZE]);
    }
    let (start, offset) = (number(c0, c1), number(o0, o1));
    if features & FEATURE_CSUM == 0 || start < ETHERNET || start + offset + 2 > length {
        return None;
    }
    let (headers, segment) = (number(h0, h1), number(s0, s1));
    let allowed = match kind {
        GSO_NONE => return Some([NEEDS_CSUM, 0, 0, 0, 0, 0, c0, c1, o0, o1, 0, 0]),
        GSO_TCPV4 => FEATURE_HOST_TSO4,
        GSO_TCPV6 => FEATURE_HOST_TSO6,
        _ => return None,
    };
    let fits = segment > 0 && headers <= length && features & allowed != 0;
    fits.then_some([NEEDS_CSUM, kind, h0, h1, s0, s1, c0, c1, o0, o1, 0, 0])
}

#[cfg(test)]
mod tests {
    use super::super::features::FEATURES;
    use super::*;
    use proptest::prelude::*;

    fn header(flags: u8, kind: u8, numbers: [u16; 4]) -> [u8; SIZE] {
        let mut header = [flags, kind, 0, 0, 0, 0, 0, 0, 0, 0, 0xaa, 0xbb];
        for (field, number) in header[2..10].chunks_mut(2).zip(numbers) {
            field.copy_from_slice(&number.to_le_bytes());
        }
        header
    }

    /// The numbers of a TCP segment over IPv4 whose headers have no options.
    const TCP: [u16; 4] = [54, 1448, 34, 16];

    #[test]
    fn what_a_driver_may_ask_for_passes_and_the_rest_is_cleared() {
        let plain = header(0, 0, [1, 2, 3, 4]);
        assert_eq!(checked(plain, 60, FEATURES), Some([0; SIZE]));
        let mut sum = header(1, 0, [0, 0, 34, 16]);
        sum[10..].fill(0);
        assert_eq!(checked(header(1, 0, TCP), 60, FEATURES), Some(sum));
        for kind in [1, 4] {
            let mut long = header(1, kind, TCP);
            long[10..].fill(0);
            assert_eq!(checked(header(1, kind, TCP), 60_000, FEATURES), Some(long));
        }
        // Only the device sets DATA_VALID and RSC_INFO.
        assert_eq!(checked(header(0xfe, 0, TCP), 60, FEATURES), Some([0; SIZE]));
    }

    #[test]
    fn what_does_not_fit_the_frame_or_the_features_is_refused() {
        let good = header(1, 1, TCP);
        assert!(checked(good, MAX_FRAME, FEATURES).is_some());
        for length in [0, 13, 51, MAX_FRAME + 1] {
            assert_eq!(checked(good, length, FEATURES), None, "{length}");
        }
        for (flags, kind, numbers) in [
            (0, 1, TCP),                 // cut, but without a checksum to compute
            (1, 1, [54, 0, 34, 16]),     // cut into nothing
            (1, 1, [101, 1448, 34, 16]), // headers longer than the frame
            (1, 0, [0, 0, 98, 1]),       // a checksum behind the frame
            (1, 0, [0, 0, u16::MAX, u16::MAX]),
            (1, 0, [0, 0, 13, 16]), // a checksum over the Ethernet header
            (1, 3, TCP),            // UDP
            (1, 5, TCP),
            (1, 0x81, TCP), // ECN
            (1, 0xff, TCP),
        ] {
            assert_eq!(checked(header(flags, kind, numbers), 100, FEATURES), None);
        }
        for without in [FEATURE_CSUM, FEATURE_HOST_TSO4] {
            assert_eq!(checked(good, 60_000, FEATURES & !without), None);
        }
        let six = header(1, 4, TCP);
        assert_eq!(checked(six, 60_000, FEATURES & !FEATURE_HOST_TSO6), None);
    }

    proptest! {
        /// Whatever a driver writes, a header that passes points into the frame and asks for
        /// negotiated features.
        #[test]
        fn nothing_that_passes_points_outside(
            flags in any::<u8>(),
            kind in prop_oneof![4 => 0u8..6, 1 => any::<u8>()],
            numbers in any::<[u16; 4]>(),
            length in 0usize..70_000,
            features in any::<u64>(),
        ) {
            let Some(header) = checked(header(flags, kind, numbers), length, features) else {
                return Ok(());
            };
            let number = |at: usize| usize::from(u16::from_le_bytes([header[at], header[at + 1]]));
            prop_assert!(length <= MAX_FRAME);
            prop_assert!(header[0] <= 1 && header[10..] == [0, 0]);
            if header[0] == 1 {
                prop_assert!(features & FEATURE_CSUM != 0);
                prop_assert!(number(6) + number(8) + 2 <= length);
            }
            match header[1] {
                0 => prop_assert_eq!(number(4), 0),
                1 => prop_assert!(features & FEATURE_HOST_TSO4 != 0 && number(4) > 0),
                4 => prop_assert!(features & FEATURE_HOST_TSO6 != 0 && number(4) > 0),
                _ => prop_assert!(false, "kind {}", header[1]),
            }
            prop_assert!(number(2) <= length);
        }
    }
}
