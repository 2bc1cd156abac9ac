//! Attacks from within a jail: each is made behind all of it, and behind parts of it.
//!
//! The unit tests of the VMM and of the fs server give their jail as a [`Subject`]. Here a process
//! closes that jail, in a little host of its own ([`host`]), and makes one attack. Nothing that it
//! does reaches the machine that the test runs on. An [`Attack`] names the layers each of which
//! stops it: so [`check`] sees that each of them does when the others are left out, and that
//! without all of them the attack succeeds.

pub mod attacks;
pub mod host;

use std::fmt;

use kata_like_jail::layers::Layer;
use rustix::io::Errno;
use rustix::process::Resource;
use rustix::thread::UnshareFlags;

use host::World;

/// Something that stands in an attacker's way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wall {
    /// The filters of system calls.
    Seccomp,
    /// A namespace from birth.
    Namespace(UnshareFlags),
    /// Another layer of the jail.
    Layer(Layer),
}

/// Landlock.
pub const LANDLOCK: Wall = Wall::Layer(Layer::Landlock);

impl fmt::Display for Wall {
    fn fmt(&self, to: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Seccomp => to.write_str("seccomp"),
            Self::Namespace(UnshareFlags::NEWPID) => to.write_str("PID namespace"),
            Self::Namespace(UnshareFlags::NEWNET) => to.write_str("network namespace"),
            Self::Namespace(UnshareFlags::NEWIPC) => to.write_str("IPC namespace"),
            Self::Namespace(UnshareFlags::NEWUTS) => to.write_str("UTS namespace"),
            Self::Namespace(UnshareFlags::NEWCGROUP) => to.write_str("cgroup namespace"),
            Self::Namespace(other) => write!(to, "{other:?}"),
            Self::Layer(Layer::Mounts) => to.write_str("mount namespace"),
            Self::Layer(Layer::Root) => to.write_str("root"),
            Self::Layer(Layer::User) => to.write_str("user"),
            Self::Layer(Layer::Capabilities) => to.write_str("capabilities"),
            Self::Layer(Layer::Descriptors) => to.write_str("closed descriptors"),
            Self::Layer(Layer::Limit(what)) => write!(to, "limit of {}", limit(*what)),
            Self::Layer(other) => write!(to, "{other:?}"),
        }
    }
}

fn limit(what: Resource) -> &'static str {
    match what {
        Resource::As => "addresses",
        Resource::Core => "core dumps",
        Resource::Fsize => "file size",
        Resource::Nofile => "descriptors",
        Resource::Nproc => "processes",
        _ => "a resource",
    }
}

/// A process with a jail.
pub struct Subject<'a> {
    /// What the docs call it.
    pub name: &'static str,
    /// The names of the threads whose filters it closes.
    pub filters: &'a [&'static str],
    /// Closes the jail; the descriptors of the world stay open.
    pub jail: &'a dyn Fn(&World) -> Result<(), String>,
    /// Whether the world's files are looked for below the share.
    pub has_share: bool,
}

/// What is tried.
pub struct Attack {
    /// In a few words.
    pub name: &'static str,
    /// Done in the jail.
    pub act: fn(&World) -> rustix::io::Result<()>,
    /// Whether the little host has suffered, as seen by it; the number is the attacker's. Without
    /// it an act that succeeds is one.
    pub harm: Option<fn(&World, i32) -> bool>,
    /// Each of these stops it.
    pub stopped_by: &'static [Wall],
}

/// How an attack ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It has done what it wanted.
    Reached,
    /// A filter has killed the attacker.
    Killed,
    /// The kernel has refused it.
    Refused(Errno),
    /// All calls were made, and nothing came of it outside of the jail.
    NoEffect,
    /// There was no attack: a step before it failed, which standard error tells.
    Failed,
}

/// The kernel's refusals, by their names.
const ERRORS: [(Errno, &str); 11] = [
    (Errno::PERM, "EPERM"),
    (Errno::NOENT, "ENOENT"),
    (Errno::SRCH, "ESRCH"),
    (Errno::BADF, "EBADF"),
    (Errno::AGAIN, "EAGAIN"),
    (Errno::NOMEM, "ENOMEM"),
    (Errno::ACCESS, "EACCES"),
    (Errno::MFILE, "EMFILE"),
    (Errno::FBIG, "EFBIG"),
    (Errno::CONNREFUSED, "ECONNREFUSED"),
    (Errno::ROFS, "EROFS"),
];

impl fmt::Display for Outcome {
    fn fmt(&self, to: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Reached => to.write_str("**reached**"),
            Self::Killed => to.write_str("killed"),
            Self::Refused(errno) => {
                let known = ERRORS.iter().find(|(known, _)| known == errno);
                match known {
                    Some((_, name)) => to.write_str(name),
                    None => write!(to, "errno {}", errno.raw_os_error()),
                }
            }
            Self::NoEffect => to.write_str("no effect"),
            Self::Failed => to.write_str("not made"),
        }
    }
}

/// Makes the attack behind all layers but those `without`.
pub fn attempt(subject: &Subject, attack: &Attack, without: &[Wall]) -> Outcome {
    host::run(subject, attack, without)
}

/// Makes each attack behind the whole jail, without Landlock, without seccomp, behind each of the
/// layers that stop it alone, and behind none of those. Returns the table of the first three, as
/// Markdown, or all that is not as it must be.
pub fn check(subject: &Subject, attacks: &[Attack]) -> Result<String, Vec<String>> {
    let mut table = String::from(
        "| what is tried | whole jail | without Landlock | without seccomp | each alone stops it |\n\
         |---|---|---|---|---|\n",
    );
    let mut wrong = Vec::new();
    for attack in attacks {
        let mut row = format!("| {} |", attack.name);
        for without in [&[][..], &[LANDLOCK], &[Wall::Seccomp]] {
            let outcome = attempt(subject, attack, without);
            // Some layers have no second behind them, and `stopped_by` says so.
            let may_pass = attack.stopped_by == without;
            if outcome == Outcome::Failed || (outcome == Outcome::Reached) != may_pass {
                wrong.push(format!("{} without {without:?}: {outcome:?}", attack.name));
            }
            row += &format!(" {outcome} |");
        }
        let names: Vec<_> = attack.stopped_by.iter().map(Wall::to_string).collect();
        table += &format!("{row} {} |\n", names.join(", "));
        wrong.extend(each_alone(subject, attack));
    }
    match wrong.is_empty() {
        true => Ok(table),
        false => Err(wrong),
    }
}

/// Each layer that stops the attack does so alone; without all of them it succeeds.
fn each_alone(subject: &Subject, attack: &Attack) -> Vec<String> {
    let mut wrong = Vec::new();
    for alone in attack.stopped_by {
        let others = attack.stopped_by.iter().copied();
        let others: Vec<_> = others.filter(|wall| wall != alone).collect();
        let outcome = attempt(subject, attack, &others);
        if matches!(outcome, Outcome::Reached | Outcome::Failed) {
            wrong.push(format!("{} behind {alone} alone: {outcome:?}", attack.name));
        }
    }
    let outcome = attempt(subject, attack, attack.stopped_by);
    if outcome != Outcome::Reached {
        let names: Vec<_> = attack.stopped_by.iter().map(Wall::to_string).collect();
        wrong.push(format!(
            "{} without {}: {outcome:?}",
            attack.name,
            names.join(", ")
        ));
    }
    wrong
}
