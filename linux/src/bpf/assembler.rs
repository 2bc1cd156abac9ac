//! BPF instructions by their names, and jumps to labels.
//!
//! Just what the programs here need (linux/bpf.h, linux/bpf_common.h,
//! Documentation/bpf/standardization).

use std::io;

/// Operation codes: class, size or source, operation.
pub mod code {
    /// 32 bits from memory.
    pub const LOAD: u8 = 0x61;
    /// A value of 32 bits to memory.
    pub const STORE_VALUE: u8 = 0x62;
    /// A map's address, by its descriptor. Takes two instructions, the second of which is all zero.
    pub const LOAD_MAP: u8 = 0x18;
    /// 64-bit.
    pub const ADD_VALUE: u8 = 0x07;
    /// 32-bit.
    pub const AND_VALUE: u8 = 0x54;
    /// 32-bit.
    pub const SHIFT_RIGHT: u8 = 0x74;
    /// 32-bit.
    pub const MOVE_VALUE: u8 = 0xb4;
    /// 64-bit.
    pub const MOVE_REGISTER: u8 = 0xbf;
    /// 32-bit.
    pub const MOVE_HALF: u8 = 0xbc;
    /// Always.
    pub const JUMP: u8 = 0x05;
    /// 32-bit.
    pub const JUMP_IF_VALUE: u8 = 0x16;
    /// 64-bit.
    pub const JUMP_IF_NULL: u8 = 0x15;
    /// 32-bit.
    pub const JUMP_UNLESS_VALUE: u8 = 0x56;
    /// 32-bit.
    pub const JUMP_UNLESS_REGISTER: u8 = 0x5e;
    /// One of the kernel's helpers, by its number.
    pub const CALL: u8 = 0x85;
    /// Returns register 0.
    pub const EXIT: u8 = 0x95;
}

/// `struct bpf_insn`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    /// One of [`code`].
    pub code: u8,
    /// The target register below, the source register above.
    pub registers: u8,
    /// Of memory, or how many instructions a jump leaves out.
    pub offset: i16,
    /// The immediate value.
    pub value: i32,
}

/// A place in a program that jumps lead to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Label(usize);

/// A program that is being written.
#[derive(Debug, Default)]
pub struct Assembler {
    instructions: Vec<Instruction>,
    /// Where the jumps are, and where they lead.
    jumps: Vec<(usize, Label)>,
    places: Vec<Option<usize>>,
}

impl Assembler {
    /// A label that is still to be placed.
    pub fn label(&mut self) -> Label {
        self.places.push(None);
        Label(self.places.len() - 1)
    }

    /// The label means the instruction that is added next.
    pub fn place(&mut self, label: Label) {
        if let Some(place) = self.places.get_mut(label.0) {
            *place = Some(self.instructions.len());
        }
    }

    /// Adds an instruction: its code, target and source register, offset and value.
    pub fn add(&mut self, code: u8, to: u8, from: u8, offset: i16, value: i32) {
        self.instructions.push(Instruction {
            code,
            registers: from << 4 | to,
            offset,
            value,
        });
    }

    /// Adds a jump: its code, the registers and the value that it compares, and where it leads.
    pub fn jump(&mut self, code: u8, to: u8, from: u8, value: i32, target: Label) {
        self.jumps.push((self.instructions.len(), target));
        self.add(code, to, from, 0, value);
    }

    /// The program. Fails if a jump leads to a label that was not placed, backwards or too far.
    pub fn finish(mut self) -> io::Result<Vec<Instruction>> {
        for (at, label) in self.jumps {
            let place = self.places.get(label.0).copied().flatten();
            let over = place.and_then(|place| place.checked_sub(at + 1));
            let over = over.and_then(|over| i16::try_from(over).ok());
            match (self.instructions.get_mut(at), over) {
                (Some(jump), Some(over)) => jump.offset = over,
                _ => {
                    let why = "a jump of a BPF program leads nowhere";
                    return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
                }
            }
        }
        Ok(self.instructions)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jumps_count_what_they_leave_out() {
        let mut program = Assembler::default();
        let (near, far) = (program.label(), program.label());
        program.jump(code::JUMP_IF_VALUE, 2, 0, 7, near);
        program.jump(code::JUMP, 0, 0, 0, far);
        program.place(near);
        program.add(code::MOVE_VALUE, 0, 0, 0, 1);
        program.place(far);
        program.add(code::EXIT, 0, 0, 0, 0);
        let offsets: Vec<_> = program
            .finish()
            .unwrap()
            .iter()
            .map(|instruction| instruction.offset)
            .collect();
        assert_eq!(offsets, [1, 1, 0, 0]);
    }

    #[test]
    fn a_label_must_be_placed_behind_its_jumps() {
        let mut program = Assembler::default();
        let nowhere = program.label();
        program.jump(code::JUMP, 0, 0, 0, nowhere);
        assert!(program.finish().is_err());
        let mut program = Assembler::default();
        let back = program.label();
        program.place(back);
        program.jump(code::JUMP, 0, 0, 0, back);
        assert!(program.finish().is_err());
    }
}
