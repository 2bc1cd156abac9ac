//! The image: from PVH's entry in 32-bit mode to [`kata_like_raw_guest::run`], and what the
//! compiler expects of a C library.
//!
//! Facts: Xen's PVH boot ABI (docs/misc/pvh.pandoc); Intel SDM volume 3, 4.5 and 10.8.5.

#![no_std]
#![no_main]

use core::arch::{asm, global_asm};
use core::panic::PanicInfo;

// The first 4 GiB are mapped as they are, in pages of 2 MiB. The local APIC's timer (vector 32)
// ends a `hlt`; there is no other interrupt, and a fault is a triple fault.
global_asm!(
    r#"
    .section .note.Xen, "a"
    .balign 4
    .long 4, 4, 18
    .asciz "Xen"
    .long start

    .section .text.start, "ax"
    .code32
    .globl start
start:
    cli
    cld
    movl %ebx, %esi
    movl $tables, %edi
    xorl %eax, %eax
    movl $(6 * 1024), %ecx
    rep stosl
    movl $(tables + 0x1000 + 3), tables
    movl $(tables + 0x2000 + 3), %eax
    movl $(tables + 0x1000), %edi
    movl $4, %ecx
1:  movl %eax, (%edi)
    addl $0x1000, %eax
    addl $8, %edi
    loop 1b
    movl $0x83, %eax
    movl $(tables + 0x2000), %edi
    movl $(4 * 512), %ecx
2:  movl %eax, (%edi)
    addl $0x200000, %eax
    addl $8, %edi
    loop 2b
    movl $0x620, %eax
    movl %eax, %cr4
    movl $tables, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx
    rdmsr
    orl $0x100, %eax
    wrmsr
    movl $0x80000033, %eax
    movl %eax, %cr0
    lgdt gdt_pointer
    ljmp $8, $start64

    .code64
start64:
    movl $16, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl $stack_top, %esp
    movl $tick, %eax
    movw %ax, idt + 512
    movw $8, idt + 514
    movw $0x8e00, idt + 516
    shrl $16, %eax
    movw %ax, idt + 518
    lidt idt_pointer
    movb $0xff, %al
    outb %al, $0x21
    outb %al, $0xa1
    movl $0xfee00000, %edx
    movl $0x1ff, 0xf0(%rdx)
    movl $0xb, 0x3e0(%rdx)
    movl $0x20, 0x320(%rdx)
    movl %esi, %edi
    call enter
    ud2

tick:
    pushq %rax
    movl $0xfee000b0, %eax
    movl $0, (%rax)
    popq %rax
    iretq

    .section .rodata
    .balign 8
gdt:
    .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff
gdt_pointer:
    .word 23
    .long gdt
idt_pointer:
    .word 4095
    .quad idt

    .section .bss
    .balign 4096
tables:
    .skip 6 * 4096
idt:
    .skip 4096
    .skip 65536
stack_top:
"#,
    options(att_syntax)
);

#[unsafe(no_mangle)]
extern "C" fn enter(start_info: u64) -> ! {
    kata_like_raw_guest::run(start_info)
}

#[panic_handler]
fn panic(panic: &PanicInfo) -> ! {
    kata_like_raw_guest::say!("panic: {}", panic.message());
    kata_like_raw_guest::machine::end()
}

#[unsafe(no_mangle)]
extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    // SAFETY: the compiler calls it for two areas of `count` bytes that don't overlap.
    unsafe {
        asm!("rep movsb", inout("rcx") count => _, inout("rdi") to => _, inout("rsi") from => _);
    }
    to
}

#[unsafe(no_mangle)]
extern "C" fn memmove(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    if to.addr().wrapping_sub(from.addr()) >= count {
        return memcpy(to, from, count);
    }
    // SAFETY: the compiler calls it for two areas of `count` bytes. The bytes are copied from the
    // last one on, since `to` lies within the source.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") count => _,
            inout("rdi") to.wrapping_add(count).wrapping_sub(1) => _,
            inout("rsi") from.wrapping_add(count).wrapping_sub(1) => _);
    }
    to
}

#[unsafe(no_mangle)]
extern "C" fn memset(to: *mut u8, byte: i32, count: usize) -> *mut u8 {
    // SAFETY: the compiler calls it for an area of `count` bytes.
    unsafe {
        asm!("rep stosb", inout("rcx") count => _, inout("rdi") to => _, in("al") byte as u8);
    }
    to
}

#[unsafe(no_mangle)]
extern "C" fn memcmp(one: *const u8, other: *const u8, count: usize) -> i32 {
    for at in 0..count {
        // SAFETY: the compiler calls it for two areas of `count` bytes.
        let (one, other) = unsafe { (one.add(at).read_volatile(), other.add(at).read_volatile()) };
        if one != other {
            return i32::from(one) - i32::from(other);
        }
    }
    0
}

#[unsafe(no_mangle)]
extern "C" fn bcmp(one: *const u8, other: *const u8, count: usize) -> i32 {
    memcmp(one, other, count)
}

/// The standard library's parts name it. Nothing unwinds here.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}
