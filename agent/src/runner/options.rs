//! A mount's options, sorted: what the mount gets, what the file system gets, and how it
//! propagates.
//!
//! Called by `mounts`. The names are those of mount(8) that runc knows. Anything else in the list
//! belongs to the file system (`size=64k`). For a bind mount it has no meaning, as for the kernel.

use kata_like_failure::Failure;
use kata_like_linux::mount::MountAttributes;
use kata_like_spec::MAPPED_OPTION;

use super::error::Result;

// From linux/mount.h.
const RDONLY: u64 = 0x1;
const NOSUID: u64 = 0x2;
const NODEV: u64 = 0x4;
const NOEXEC: u64 = 0x8;
const ATIME: u64 = 0x70;
const NOATIME: u64 = 0x10;
const STRICTATIME: u64 = 0x20;
const NODIRATIME: u64 = 0x80;
const NOSYMFOLLOW: u64 = 0x20_0000;

/// The attribute of a mount that nothing can be written through.
pub(super) const READ_ONLY: u64 = RDONLY;

/// The options of one mount.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Options {
    /// The mount is a bind mount, whatever its type says.
    pub(super) bind: bool,
    /// A bind mount takes the mounts below it along.
    pub(super) recursive: bool,
    /// What to set and clear on the mount itself.
    pub(super) attributes: MountAttributes,
    /// What to set and clear on the mount and on all below.
    pub(super) below: MountAttributes,
    /// Propagation, each as `MS_…`, and whether it includes the mounts below.
    pub(super) propagation: Vec<(u64, bool)>,
    /// Flags and parameters of the file system.
    pub(super) parameters: Vec<(String, Option<String>)>,
    /// A tmpfs begins with a copy of what it covers.
    pub(super) copy_up: bool,
}

impl Options {
    /// Sorts the options. `field` is the list's path in the spec.
    pub(super) fn parse(listed: &[String], field: &str) -> Result<Self> {
        let mut options = Self::default();
        for option in listed {
            options.add(option, field)?;
        }
        Ok(options)
    }

    fn add(&mut self, option: &str, field: &str) -> Result<()> {
        if let Some((bits, clear)) = attribute(option) {
            change(&mut self.attributes, bits, clear);
            return Ok(());
        }
        if let Some((bits, clear)) = option.strip_prefix('r').and_then(attribute)
            && !matches!(option, "relatime")
        {
            change(&mut self.below, bits, clear);
            return Ok(());
        }
        if let Some(propagation) = propagation(option) {
            self.propagation.push(propagation);
            return Ok(());
        }
        match option {
            "" | "defaults" | "async" | "loud" | "silent" | "nomand" | "norelatime" | "remount"
            | "nolazytime" => {}
            "bind" => self.bind = true,
            "rbind" => (self.bind, self.recursive) = (true, true),
            "tmpcopyup" => self.copy_up = true,
            "idmap" | "ridmap" => {
                return Err(MAPPED_OPTION.of(format_args!("{field}: {option:?}")));
            }
            _ => {
                let (key, value) = match option.split_once('=') {
                    Some((key, value)) => (key, Some(value.to_owned())),
                    None => (option, None),
                };
                self.parameters.push((key.to_owned(), value));
            }
        }
        Ok(())
    }

    /// Finds the value of a parameter of the file system. The last one counts.
    pub(super) fn parameter(&self, key: &str) -> Option<&str> {
        self.parameters
            .iter()
            .rev()
            .find(|(name, _)| name == key)?
            .1
            .as_deref()
    }
}

/// Finds the bits of a mount's attribute, and whether the option clears them.
fn attribute(option: &str) -> Option<(u64, bool)> {
    Some(match option {
        "ro" => (RDONLY, false),
        "rw" => (RDONLY, true),
        "nosuid" => (NOSUID, false),
        "suid" => (NOSUID, true),
        "nodev" => (NODEV, false),
        "dev" => (NODEV, true),
        "noexec" => (NOEXEC, false),
        "exec" => (NOEXEC, true),
        "noatime" => (NOATIME, false),
        "strictatime" => (STRICTATIME, false),
        "relatime" | "atime" | "nostrictatime" => (0, false),
        "nodiratime" => (NODIRATIME, false),
        "diratime" => (NODIRATIME, true),
        "nosymfollow" => (NOSYMFOLLOW, false),
        "symfollow" => (NOSYMFOLLOW, true),
        _ => return None,
    })
}

fn change(attributes: &mut MountAttributes, bits: u64, clear: bool) {
    // The three ways of access times are one value of several bits. To set one, all are cleared.
    if bits & ATIME != 0 || bits == 0 {
        attributes.clear |= ATIME;
        attributes.set &= !ATIME;
        attributes.set |= bits;
    } else if clear {
        attributes.set &= !bits;
        attributes.clear |= bits;
    } else {
        attributes.clear &= !bits;
        attributes.set |= bits;
    }
}

fn propagation(option: &str) -> Option<(u64, bool)> {
    let (name, recursive) = match option {
        "rprivate" | "rshared" | "rslave" | "runbindable" => (&option[1..], true),
        name => (name, false),
    };
    let flag = match name {
        "private" => libc::MS_PRIVATE,
        "shared" => libc::MS_SHARED,
        "slave" => libc::MS_SLAVE,
        "unbindable" => libc::MS_UNBINDABLE,
        _ => return None,
    };
    Some((flag, recursive))
}

/// Finds the propagation that `linux.rootfsPropagation` names.
pub(super) fn root_propagation(name: &str) -> Result<Option<(u64, bool)>> {
    match name {
        "" => Ok(None),
        name => propagation(name).map(Some).ok_or_else(|| {
            Failure::bad(
                "linux.rootfsPropagation",
                format!("{name:?} is none of (r)shared, (r)slave, (r)private, (r)unbindable"),
            )
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[&str]) -> Options {
        let options: Vec<_> = options.iter().map(ToString::to_string).collect();
        Options::parse(&options, "mounts[0].options").unwrap()
    }

    #[test]
    fn the_mount_and_the_file_system_get_their_own() {
        let options = parse(&[
            "nosuid",
            "strictatime",
            "mode=755",
            "size=65536k",
            "newinstance",
        ]);
        assert_eq!(options.attributes.set, NOSUID | STRICTATIME);
        assert_eq!(options.parameter("mode"), Some("755"));
        assert_eq!(options.parameters.len(), 3);
        assert!(!options.bind);
    }

    #[test]
    fn the_last_option_wins() {
        let options = parse(&["ro", "rw", "noatime", "relatime"]);
        assert_eq!(options.attributes.set, 0);
        assert_eq!(options.attributes.clear, RDONLY | ATIME);
        assert_eq!(parse(&["rw", "ro"]).attributes.set, RDONLY);
    }

    #[test]
    fn a_bind_mount_may_change_all_below_it() {
        let options = parse(&["rbind", "rro", "rprivate", "ro"]);
        assert!(options.bind && options.recursive);
        assert_eq!(options.below.set, RDONLY);
        assert_eq!(options.attributes.set, RDONLY);
        assert_eq!(options.propagation, [(libc::MS_PRIVATE, true)]);
        assert_eq!(parse(&["relatime"]).below, MountAttributes::default());
    }

    #[test]
    fn id_mapped_mounts_are_refused() {
        let error = Options::parse(&["idmap".to_owned()], "mounts[3].options").unwrap_err();
        assert_eq!(
            error.to_string(),
            "mounts[3].options: \"idmap\" is not supported: mounts with mapped ids are not made yet"
        );
    }
}
