//! The container's device filter: a BPF program of type CGROUP_DEVICE on its cgroup, default deny.
//!
//! Called by `mod` in the runner's own process, before the container's process is born in the cgroup; execs
//! are born under it as well. The rules are those of `linux.resources.devices` with the meaning that the
//! cgroup v1 controller gave them (Documentation/admin-guide/cgroup-v1/devices.rst), as runc keeps it on
//! v2, and then those devices that every container has. What they can't mean, an exception to an exception,
//! is refused.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

use kata_like_failure::{Failure, Step};
use kata_like_spec::DEVICE_RULE;
use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, Spec};

use super::error::Result;
use super::syscall;

const MKNOD: u8 = 1;
const READ: u8 = 2;
const WRITE: u8 = 4;
const ALL: u8 = MKNOD | READ | WRITE;

const BLOCK: i32 = 1;
const CHARACTER: i32 = 2;

/// Allowed in every container: nodes may be made, and these used. Those with a path are what `devices` makes
/// there, and not allowed for its sake where the spec has a device of its own at that path.
const ALWAYS: [(&str, Devices, u8); 11] = [
    ("", (CHARACTER, None, None), MKNOD),
    ("", (BLOCK, None, None), MKNOD),
    ("/dev/null", (CHARACTER, Some(1), Some(3)), ALL),
    ("/dev/random", (CHARACTER, Some(1), Some(8)), ALL),
    ("/dev/full", (CHARACTER, Some(1), Some(7)), ALL),
    ("/dev/tty", (CHARACTER, Some(5), Some(0)), ALL),
    ("/dev/zero", (CHARACTER, Some(1), Some(5)), ALL),
    ("/dev/urandom", (CHARACTER, Some(1), Some(9)), ALL),
    ("", (CHARACTER, Some(136), None), ALL), // the terminals of devpts
    ("", (CHARACTER, Some(5), Some(2)), ALL), // ptmx
    ("", (CHARACTER, Some(10), Some(200)), ALL), // net/tun
];

/// Which devices: kind, major, minor; `None` is any.
type Devices = (i32, Option<u32>, Option<u32>);

/// What the rules come to: one answer for most, and the exceptions to it.
#[derive(Debug, Default, PartialEq, Eq)]
struct Rules {
    allow: bool,
    exceptions: BTreeMap<Devices, u8>,
}

impl Rules {
    /// `made` are the devices that the spec makes itself.
    fn of(listed: &[LinuxDeviceCgroup], made: &[LinuxDevice]) -> Result<Self> {
        let mut rules = Self::default();
        for (index, rule) in listed.iter().enumerate() {
            let field = |name: &str| format!("linux.resources.devices[{index}].{name}");
            let access = access(rule.access().as_deref(), &field("access"))?;
            let number = |value: Option<i64>, name: &str| match value {
                None | Some(-1) => Ok(None),
                Some(value) => u32::try_from(value)
                    .map(Some)
                    .map_err(|_| Failure::bad(field(name), format!("{value} is no device number"))),
            };
            let major = number(rule.major(), "major")?;
            let minor = number(rule.minor(), "minor")?;
            let kind = match rule.typ().unwrap_or(LinuxDeviceType::A) {
                LinuxDeviceType::B => BLOCK,
                LinuxDeviceType::C | LinuxDeviceType::U => CHARACTER,
                LinuxDeviceType::A if major.is_none() && minor.is_none() => {
                    rules = Self {
                        allow: rule.allow(),
                        exceptions: BTreeMap::new(),
                    };
                    continue;
                }
                LinuxDeviceType::A => {
                    return Err(Failure::bad(
                        field("type"),
                        "a rule for devices of any type can't name numbers",
                    ));
                }
                LinuxDeviceType::P => {
                    return Err(Failure::bad(field("type"), "a FIFO is no device"));
                }
            };
            let devices = (kind, major, minor);
            let field = format!("linux.resources.devices[{index}]");
            rules.add(rule.allow(), devices, access, &field)?;
        }
        let own = |path| made.iter().any(|device| device.path() == Path::new(path));
        for (path, devices, access) in ALWAYS {
            if !own(path) {
                rules.add(true, devices, access, "linux.resources.devices")?;
            }
        }
        Ok(rules)
    }

    /// A rule that says what most get takes from the exceptions; any other is one.
    fn add(&mut self, allow: bool, devices: Devices, access: u8, field: &str) -> Result<()> {
        if allow == self.allow {
            let (kind, major, minor) = devices;
            for wider in [(kind, None, minor), (kind, major, None), (kind, None, None)] {
                let held = self.exceptions.get(&wider).copied().unwrap_or_default();
                if wider != devices && held & access != 0 {
                    return Err(DEVICE_RULE.of(field));
                }
            }
        }
        let held = self.exceptions.entry(devices).or_default();
        if allow == self.allow {
            *held &= !access;
        } else {
            *held |= access;
        }
        if *held == 0 {
            self.exceptions.remove(&devices);
        }
        Ok(())
    }

    /// The program: its context is `struct bpf_cgroup_dev_ctx`, its result 1 to allow.
    fn program(&self) -> Vec<Instruction> {
        let mut program = vec![
            // r2 = type, r3 = access, r4 = major, r5 = minor
            Instruction::new(LOAD, 2, 1, 0, 0),
            Instruction::new(AND_VALUE, 2, 0, 0, 0xffff),
            Instruction::new(LOAD, 3, 1, 0, 0),
            Instruction::new(SHIFT_RIGHT, 3, 0, 0, 16),
            Instruction::new(LOAD, 4, 1, 4, 0),
            Instruction::new(LOAD, 5, 1, 8, 0),
        ];
        for (&(kind, major, minor), &access) in &self.exceptions {
            let mut rule = vec![(JUMP_UNLESS_VALUE, 2, 0, kind)];
            if access != ALL {
                rule.push((MOVE_REGISTER, 1, 3, 0));
                rule.push((AND_VALUE, 1, 0, i32::from(access)));
                // An allowing exception must cover all that is asked, a denying one any of it.
                rule.push(if self.allow {
                    (JUMP_IF_VALUE, 1, 0, 0)
                } else {
                    (JUMP_UNLESS_REGISTER, 1, 3, 0)
                });
            }
            // The kernel compares what it loads as it is: the numbers' bits, whatever their sign.
            if let Some(major) = major {
                rule.push((JUMP_UNLESS_VALUE, 4, 0, major.cast_signed()));
            }
            if let Some(minor) = minor {
                rule.push((JUMP_UNLESS_VALUE, 5, 0, minor.cast_signed()));
            }
            let end = rule.len() + 2;
            for (index, (code, to, from, value)) in rule.into_iter().enumerate() {
                let jumps = code & 0x07 == 0x06 || code & 0x07 == 0x05;
                // A rule has six instructions at most.
                let over = if jumps { (end - index - 1) as i16 } else { 0 };
                program.push(Instruction::new(code, to, from, over, value));
            }
            program.push(Instruction::new(
                MOVE_VALUE,
                0,
                0,
                0,
                i32::from(!self.allow),
            ));
            program.push(Instruction::new(EXIT, 0, 0, 0, 0));
        }
        program.push(Instruction::new(MOVE_VALUE, 0, 0, 0, i32::from(self.allow)));
        program.push(Instruction::new(EXIT, 0, 0, 0, 0));
        program
    }
}

fn access(text: Option<&str>, field: &str) -> Result<u8> {
    let mut access = 0;
    for letter in text.unwrap_or_default().chars() {
        access |= match letter {
            'm' => MKNOD,
            'r' => READ,
            'w' => WRITE,
            _ => {
                return Err(Failure::bad(
                    field,
                    format!("{letter:?} is none of r, w, m"),
                ));
            }
        };
    }
    if access == 0 {
        return Err(Failure::bad(field, "must not be empty"));
    }
    Ok(access)
}

// Opcodes, of linux/bpf.h and linux/bpf_common.h: class, size or source, operation.
const LOAD: u8 = 0x61; // 32 bits from memory
const AND_VALUE: u8 = 0x54; // 32-bit
const SHIFT_RIGHT: u8 = 0x74; // 32-bit
const MOVE_VALUE: u8 = 0xb4; // 32-bit
const MOVE_REGISTER: u8 = 0xbc; // 32-bit
const JUMP_IF_VALUE: u8 = 0x16; // 32-bit
const JUMP_UNLESS_VALUE: u8 = 0x56; // 32-bit
const JUMP_UNLESS_REGISTER: u8 = 0x5e; // 32-bit
const EXIT: u8 = 0x95;

/// `struct bpf_insn`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    value: i32,
}

impl Instruction {
    fn new(code: u8, to: u8, from: u8, offset: i16, value: i32) -> Self {
        Self {
            code,
            registers: from << 4 | to,
            offset,
            value,
        }
    }
}

/// Builds the filter of `spec` and puts it on the cgroup.
pub(super) fn attach(spec: &Spec, cgroup: BorrowedFd<'_>) -> Result<()> {
    let linux = spec.linux().as_ref();
    let listed = linux
        .and_then(|linux| linux.resources().as_ref())
        .and_then(|resources| resources.devices().as_deref())
        .unwrap_or_default();
    let made = linux
        .and_then(|linux| linux.devices().as_deref())
        .unwrap_or_default();
    let program = Rules::of(listed, made)?.program();
    let program = load(&program).step(|| "load the container's device filter")?;
    let attributes = AttachAttributes {
        target: cgroup.as_raw_fd(),
        program: program.as_raw_fd(),
        kind: 6,  // BPF_CGROUP_DEVICE
        flags: 2, // BPF_F_ALLOW_MULTI
        replace: 0,
    };
    // SAFETY: BPF_PROG_ATTACH (8) takes no address; both descriptors are open.
    unsafe { syscall::bpf(8, &attributes) }
        .step(|| "attach the device filter to the container's cgroup")?;
    Ok(())
}

/// `union bpf_attr` of BPF_PROG_LOAD, as far as it is used; the kernel takes the rest as zero.
#[repr(C)]
#[derive(Default)]
struct LoadAttributes {
    kind: u32,
    length: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
}

/// The same of BPF_PROG_ATTACH.
#[repr(C)]
struct AttachAttributes {
    target: i32,
    program: i32,
    kind: u32,
    flags: u32,
    replace: u32,
}

fn load(program: &[Instruction]) -> std::io::Result<OwnedFd> {
    let attributes = LoadAttributes {
        kind: 15, // BPF_PROG_TYPE_CGROUP_DEVICE
        length: u32::try_from(program.len())
            .map_err(|_| std::io::Error::from_raw_os_error(libc::E2BIG))?,
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        ..LoadAttributes::default()
    };
    // SAFETY: BPF_PROG_LOAD (5) reads `length` instructions from a live slice of that many, and a C
    // string; there is no log buffer. What it returns is a new descriptor that nobody else owns.
    unsafe {
        let fd = syscall::bpf(5, &attributes)?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// The cgroup's directory, to be born in and to attach to.
pub(super) fn open_cgroup(path: &Path) -> Result<OwnedFd> {
    let flags =
        rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
    rustix::fs::open(path, flags, rustix::fs::Mode::empty())
        .step(|| format!("open the container's cgroup {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runner::error::refused;

    /// What the kernel would make of `program`: an interpreter of those few opcodes.
    fn allows(rules: &Rules, kind: i32, major: u32, minor: u32, access: u8) -> bool {
        let program = rules.program();
        let context = [u32::from(access) << 16 | kind.cast_unsigned(), major, minor];
        let mut registers = [0u32; 6];
        let mut at = 0usize;
        loop {
            let instruction = program[at];
            let (to, from) = (instruction.registers & 15, instruction.registers >> 4);
            let (to, from) = (usize::from(to), usize::from(from));
            let value = instruction.value.cast_unsigned();
            let mut jump = false;
            match instruction.code {
                LOAD => registers[to] = context[instruction.offset as usize / 4],
                AND_VALUE => registers[to] &= value,
                SHIFT_RIGHT => registers[to] >>= value,
                MOVE_VALUE => registers[to] = value,
                MOVE_REGISTER => registers[to] = registers[from],
                JUMP_IF_VALUE => jump = registers[to] == value,
                JUMP_UNLESS_VALUE => jump = registers[to] != value,
                JUMP_UNLESS_REGISTER => jump = registers[to] != registers[from],
                EXIT => return registers[0] == 1,
                other => panic!("{other:#x}"),
            }
            at += 1 + if jump { instruction.offset as usize } else { 0 };
        }
    }

    fn rules(json: &str) -> Result<Rules> {
        let listed: Vec<LinuxDeviceCgroup> = serde_json::from_str(json).unwrap();
        Rules::of(&listed, &[])
    }

    #[test]
    fn the_default_is_to_deny_but_for_the_devices_of_every_container() {
        for rules in [rules("[]"), rules(r#"[{"allow": false, "access": "rwm"}]"#)] {
            let rules = rules.unwrap();
            assert!(allows(&rules, CHARACTER, 1, 3, READ | WRITE));
            assert!(allows(&rules, CHARACTER, 136, 7, READ));
            assert!(allows(&rules, BLOCK, 8, 0, MKNOD));
            assert!(!allows(&rules, BLOCK, 8, 0, READ));
            assert!(!allows(&rules, BLOCK, 8, 0, READ | MKNOD));
            assert!(!allows(&rules, CHARACTER, 1, 1, READ));
            assert!(!allows(&rules, CHARACTER, 10, 229, WRITE));
            assert!(allows(&rules, CHARACTER, 10, 200, READ | WRITE));
        }
    }

    #[test]
    fn a_device_of_the_specs_own_is_allowed_by_its_rules_only() {
        let made: Vec<LinuxDevice> = serde_json::from_str(
            r#"[{"path": "/dev/full", "type": "c", "major": 1, "minor": 7},
                {"path": "/dev/nothing", "type": "c", "major": 1, "minor": 3}]"#,
        )
        .unwrap();
        let rules = Rules::of(&[], &made).unwrap();
        assert!(!allows(&rules, CHARACTER, 1, 7, READ));
        assert!(allows(&rules, CHARACTER, 1, 7, MKNOD));
        assert!(allows(&rules, CHARACTER, 1, 3, READ));
    }

    #[test]
    fn later_rules_change_earlier_ones() {
        let rules = rules(
            r#"[{"allow": false, "access": "rwm"},
                {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rw"},
                {"allow": true, "type": "b", "major": 8, "access": "r"},
                {"allow": false, "type": "c", "major": 10, "minor": 229, "access": "w"}]"#,
        )
        .unwrap();
        assert!(allows(&rules, CHARACTER, 10, 229, READ));
        assert!(!allows(&rules, CHARACTER, 10, 229, READ | WRITE));
        assert!(allows(&rules, BLOCK, 8, 15, READ));
        assert!(!allows(&rules, BLOCK, 9, 15, READ));
    }

    #[test]
    fn a_privileged_container_may_all_but_what_is_denied() {
        let rules = rules(
            r#"[{"allow": true, "access": "rwm"},
                {"allow": false, "type": "b", "major": 8, "minor": 0, "access": "w"}]"#,
        )
        .unwrap();
        assert!(allows(&rules, BLOCK, 8, 0, READ));
        assert!(!allows(&rules, BLOCK, 8, 0, READ | WRITE));
        assert!(allows(&rules, BLOCK, 8, 1, WRITE));
    }

    #[test]
    fn what_can_not_be_denied_or_allowed_is_refused() {
        for json in [
            r#"[{"allow": true, "type": "c", "major": 7, "access": "rw"},
                {"allow": false, "type": "c", "major": 7, "minor": 1, "access": "w"}]"#,
            r#"[{"allow": true, "access": "rwm"}, {"allow": false, "type": "b", "access": "r"},
                {"allow": true, "type": "b", "major": 8, "access": "r"}]"#,
        ] {
            let error = rules(json).unwrap_err().one_line();
            assert!(error.contains("out of an earlier rule"), "{error}");
        }
        let other_access = r#"[{"allow": true, "type": "c", "major": 7, "access": "r"},
            {"allow": false, "type": "c", "major": 7, "minor": 1, "access": "w"}]"#;
        assert!(rules(other_access).is_ok());
    }

    #[test]
    fn nonsense_is_named() {
        for (json, field) in [
            (
                r#"[{"allow": true, "type": "c", "major": 1, "access": ""}]"#,
                "access",
            ),
            (r#"[{"allow": true, "type": "c", "access": "x"}]"#, "access"),
            (
                r#"[{"allow": true, "type": "c", "major": -7, "access": "r"}]"#,
                "major",
            ),
            (r#"[{"allow": true, "major": 7, "access": "r"}]"#, "type"),
        ] {
            let error = rules(json).unwrap_err();
            let field = format!("linux.resources.devices[0].{field}");
            assert_eq!(refused(&error), field);
        }
    }
}
