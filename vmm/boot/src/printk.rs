//! Where the guest's kernel keeps its log. The kernel's build records this, since the ring is the
//! kernel's own structure (kernel/printk/printk_ringbuffer.h) and no interface.

use serde::{Deserialize, Serialize};

/// Address and offsets of the printk ring, in bytes. Installed beside the kernel as `printk.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrintkLayout {
    /// Guest-physical address of the variable `prb`, which points to the ring.
    pub prb: u64,
    /// `desc_ring` in `struct printk_ringbuffer`.
    pub desc_ring: u64,
    /// `text_data_ring` in `struct printk_ringbuffer`.
    pub text_ring: u64,
    /// `count_bits` in `struct prb_desc_ring`.
    pub count_bits: u64,
    /// `descs` in `struct prb_desc_ring`.
    pub descs: u64,
    /// `infos` in `struct prb_desc_ring`.
    pub infos: u64,
    /// `head_id` in `struct prb_desc_ring`.
    pub head_id: u64,
    /// `tail_id` in `struct prb_desc_ring`.
    pub tail_id: u64,
    /// `size_bits` in `struct prb_data_ring`.
    pub size_bits: u64,
    /// `data` in `struct prb_data_ring`.
    pub data: u64,
    /// Size of `struct prb_desc`.
    pub desc_size: u64,
    /// `state_var` in `struct prb_desc`.
    pub desc_state: u64,
    /// `text_blk_lpos.begin` in `struct prb_desc`.
    pub desc_begin: u64,
    /// `text_blk_lpos.next` in `struct prb_desc`.
    pub desc_next: u64,
    /// Size of `struct printk_info`.
    pub info_size: u64,
    /// `seq` in `struct printk_info`.
    pub info_seq: u64,
    /// `ts_nsec` in `struct printk_info`.
    pub info_time: u64,
    /// `text_len` in `struct printk_info`.
    pub info_text_len: u64,
    /// The byte of `flags:5, level:3` in `struct printk_info`.
    pub info_level: u64,
}
