//! The container's device filter: a BPF program of type CGROUP_DEVICE on its cgroup, default deny.
//!
//! Called by `mod` in the runner's own process, before the container's process is born in the
//! cgroup; execs are born under it as well. The rules are those of `linux.resources.devices` with
//! the meaning that the cgroup v1 controller gave them
//! (Documentation/admin-guide/cgroup-v1/devices.rst), as runc keeps it on v2, and then those
//! devices that every container has. What they can't mean, an exception to an exception, is
//! refused.

use std::collections::BTreeMap;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

use kata_like_failure::{Failure, Step};
use kata_like_linux::bpf::{self, Assembler, Instruction, Kind, code};
use kata_like_spec::DEVICE_RULE;
use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, Spec};

use super::error::Result;

const MKNOD: u8 = 1;
const READ: u8 = 2;
const WRITE: u8 = 4;
const ALL: u8 = MKNOD | READ | WRITE;

const BLOCK: i32 = 1;
const CHARACTER: i32 = 2;

/// Allowed in every container: nodes may be made, and these used. Those with a path are what
/// `devices` makes there, and not allowed for its sake where the spec has a device of its own at
/// that path.
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
    fn program(&self) -> std::io::Result<Vec<Instruction>> {
        // Registers.
        const KIND: u8 = 2;
        const ACCESS: u8 = 3;
        const MAJOR: u8 = 4;
        const MINOR: u8 = 5;
        const CONTEXT: u8 = 1;
        const SPARE: u8 = CONTEXT; // once all is loaded

        let mut program = Assembler::default();
        program.add(code::LOAD, KIND, CONTEXT, 0, 0);
        program.add(code::AND_VALUE, KIND, 0, 0, 0xffff);
        program.add(code::LOAD, ACCESS, CONTEXT, 0, 0);
        program.add(code::SHIFT_RIGHT, ACCESS, 0, 0, 16);
        program.add(code::LOAD, MAJOR, CONTEXT, 4, 0);
        program.add(code::LOAD, MINOR, CONTEXT, 8, 0);
        let answer = |program: &mut Assembler, allow: bool| {
            program.add(code::MOVE_VALUE, 0, 0, 0, i32::from(allow));
            program.add(code::EXIT, 0, 0, 0, 0);
        };
        for (&(kind, major, minor), &access) in &self.exceptions {
            let next = program.label();
            program.jump(code::JUMP_UNLESS_VALUE, KIND, 0, kind, next);
            if access != ALL {
                program.add(code::MOVE_HALF, SPARE, ACCESS, 0, 0);
                program.add(code::AND_VALUE, SPARE, 0, 0, i32::from(access));
                // An allowing exception must cover all that is asked, a denying one any of it.
                if self.allow {
                    program.jump(code::JUMP_IF_VALUE, SPARE, 0, 0, next);
                } else {
                    program.jump(code::JUMP_UNLESS_REGISTER, SPARE, ACCESS, 0, next);
                }
            }
            // The kernel compares what it loads as it is: the numbers' bits, whatever their sign.
            if let Some(major) = major {
                let major = major.cast_signed();
                program.jump(code::JUMP_UNLESS_VALUE, MAJOR, 0, major, next);
            }
            if let Some(minor) = minor {
                let minor = minor.cast_signed();
                program.jump(code::JUMP_UNLESS_VALUE, MINOR, 0, minor, next);
            }
            answer(&mut program, !self.allow);
            program.place(next);
        }
        answer(&mut program, self.allow);
        program.finish()
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
    let step = || "load the container's device filter";
    let program = Rules::of(listed, made)?.program().step(step)?;
    let program = bpf::load(Kind::CgroupDevice, "devices", &program).step(step)?;
    bpf::attach_to_cgroup(&program, cgroup)
        .step(|| "attach the device filter to the container's cgroup")
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
    use std::collections::HashSet;

    use super::*;
    use crate::runner::error::refused;

    /// What the kernel would make of `program`: an interpreter of those few opcodes.
    fn allows(rules: &Rules, kind: i32, major: u32, minor: u32, access: u8) -> bool {
        says(&rules.program().unwrap(), kind, major, minor, access)
    }

    fn says(program: &[Instruction], kind: i32, major: u32, minor: u32, access: u8) -> bool {
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
                code::LOAD => registers[to] = context[instruction.offset as usize / 4],
                code::AND_VALUE => registers[to] &= value,
                code::SHIFT_RIGHT => registers[to] >>= value,
                code::MOVE_VALUE => registers[to] = value,
                code::MOVE_HALF => registers[to] = registers[from],
                code::JUMP_IF_VALUE => jump = registers[to] == value,
                code::JUMP_UNLESS_VALUE => jump = registers[to] != value,
                code::JUMP_UNLESS_REGISTER => jump = registers[to] != registers[from],
                code::EXIT => return registers[0] == 1,
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

    /// The rules of the cgroup v1 controller, word by word: a default, and single exceptions to it.
    struct Meant {
        default: bool,
        exceptions: HashSet<(Devices, u8)>,
    }

    impl Meant {
        fn by(listed: &[(bool, Option<Devices>, u8)]) -> Self {
            let (mut default, mut exceptions) = (false, HashSet::new());
            let always = ALWAYS.map(|(_, devices, access)| (true, Some(devices), access));
            for (allow, devices, access) in listed.iter().chain(&always) {
                let Some(devices) = devices else {
                    (default, exceptions) = (*allow, HashSet::new());
                    continue;
                };
                for bit in bits(*access) {
                    match *allow == default {
                        true => exceptions.remove(&(*devices, bit)),
                        false => exceptions.insert((*devices, bit)),
                    };
                }
            }
            Self {
                default,
                exceptions,
            }
        }

        fn allows(&self, kind: i32, major: u32, minor: u32, access: u8) -> bool {
            let majors = [Some(major), None].into_iter();
            let mut devices =
                majors.flat_map(|major| [(kind, major, Some(minor)), (kind, major, None)]);
            let has = |devices, bit| self.exceptions.contains(&(devices, bit));
            match self.default {
                true => !devices.any(|it| bits(access).any(|bit| has(it, bit))),
                false => devices.any(|it| bits(access).all(|bit| has(it, bit))),
            }
        }
    }

    fn bits(access: u8) -> impl Iterator<Item = u8> {
        let all = [MKNOD, READ, WRITE].into_iter();
        all.filter(move |bit| access & bit != 0)
    }

    /// Every two rules of a small alphabet, and every access to some devices under them: the
    /// program says what the rules mean, or they are refused.
    #[test]
    fn each_program_says_what_its_rules_mean() {
        let mut alphabet = vec![(true, None, ALL), (false, None, ALL)];
        for allow in [true, false] {
            for (major, minor) in [
                (None, None),
                (Some(1), None),
                (None, Some(3)),
                (Some(1), Some(3)),
            ] {
                for kind in [CHARACTER, BLOCK] {
                    for access in [READ, WRITE, READ | WRITE, ALL] {
                        alphabet.push((allow, Some((kind, major, minor)), access));
                    }
                }
            }
        }
        let (mut compared, mut refused) = (0, 0);
        for first in &alphabet {
            for second in &alphabet {
                let listed = [*first, *second];
                let Ok(rules) = rules(&json(&listed)) else {
                    refused += 1;
                    continue;
                };
                let (program, wanted) = (rules.program().unwrap(), Meant::by(&listed));
                for kind in [CHARACTER, BLOCK] {
                    for (major, minor) in [(1, 3), (1, 4), (2, 3), (2, 4), (136, 0)] {
                        for access in 1..=ALL {
                            let says = says(&program, kind, major, minor, access);
                            let meant = wanted.allows(kind, major, minor, access);
                            assert_eq!(says, meant, "{listed:?}: {kind} {major}:{minor} {access}");
                            compared += 1;
                        }
                    }
                }
            }
        }
        assert!(compared > 100_000 && refused > 100, "{compared}, {refused}");
    }

    fn json(listed: &[(bool, Option<Devices>, u8)]) -> String {
        let rules = listed.iter().map(|(allow, devices, access)| {
            let letters = [(READ, 'r'), (WRITE, 'w'), (MKNOD, 'm')].into_iter();
            let letters = letters
                .filter(|(bit, _)| access & bit != 0)
                .map(|(_, it)| it);
            let mut rule =
                serde_json::json!({"allow": allow, "access": letters.collect::<String>()});
            if let Some((kind, major, minor)) = devices {
                rule["type"] = if *kind == BLOCK { "b" } else { "c" }.into();
                rule["major"] = major.map_or(-1, i64::from).into();
                rule["minor"] = minor.map_or(-1, i64::from).into();
            }
            rule
        });
        serde_json::Value::from_iter(rules).to_string()
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
