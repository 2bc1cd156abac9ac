// SPDX-License-Identifier: Apache-2.0
// Where the fields of the printk ring lie. Compiled to assembly, never linked, by `build`, with the flags of the
// kernel's own kernel/printk/printk.c; each line `->name $value` becomes an entry of printk.json, which the VMM reads
// to show the log of a guest. The structures are in kernel/printk/printk_ringbuffer.h and in no stable interface.
#include <linux/dev_printk.h>
#include <linux/kernel.h>
#include <linux/stddef.h>
#include "printk_ringbuffer.h"

#define RECORD(name, value) asm volatile("\n.ascii \"->" #name " %0\"" : : "i"(value))

void record_layout(void);
void record_layout(void)
{
	RECORD(desc_ring, offsetof(struct printk_ringbuffer, desc_ring));
	RECORD(text_ring, offsetof(struct printk_ringbuffer, text_data_ring));
	RECORD(count_bits, offsetof(struct prb_desc_ring, count_bits));
	RECORD(descs, offsetof(struct prb_desc_ring, descs));
	RECORD(infos, offsetof(struct prb_desc_ring, infos));
	RECORD(head_id, offsetof(struct prb_desc_ring, head_id));
	RECORD(tail_id, offsetof(struct prb_desc_ring, tail_id));
	RECORD(size_bits, offsetof(struct prb_data_ring, size_bits));
	RECORD(data, offsetof(struct prb_data_ring, data));
	RECORD(desc_size, sizeof(struct prb_desc));
	RECORD(desc_state, offsetof(struct prb_desc, state_var));
	RECORD(desc_begin, offsetof(struct prb_desc, text_blk_lpos.begin));
	RECORD(desc_next, offsetof(struct prb_desc, text_blk_lpos.next));
	RECORD(info_size, sizeof(struct printk_info));
	RECORD(info_seq, offsetof(struct printk_info, seq));
	RECORD(info_time, offsetof(struct printk_info, ts_nsec));
	RECORD(info_text_len, offsetof(struct printk_info, text_len));
	// `u8 flags:5; u8 level:3;` follow `facility`: bit-fields have no offset, their byte has.
	RECORD(info_level, offsetof(struct printk_info, facility) + sizeof(((struct printk_info *)0)->facility));
}
