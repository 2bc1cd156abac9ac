//! Debian packages: the machine's own suite installed, newer suites unpacked beside the system.
//!
//! `prepare` calls this. Newer suites have package lists of their own, so nothing of them can get
//! into the system. The mirror is the one that this machine's apt uses.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::HostError;

/// Runs a program and returns its standard output; its error output is in the error.
pub fn output(step: &str, command: &mut Command) -> Result<String, HostError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("LC_ALL", "C")
        .output()
        .map_err(|source| HostError::Spawn {
            step: step.into(),
            program: program.clone(),
            source,
        })?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        let tail: Vec<&str> = text.lines().rev().take(5).collect();
        return Err(HostError::Program {
            step: step.into(),
            program,
            status: output.status.to_string(),
            stderr: tail.into_iter().rev().collect::<Vec<_>>().join("; "),
        });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Installs the packages of `wanted` whose program is missing; each entry is (program, package).
pub fn install(wanted: &[(&str, &str)]) -> Result<(), HostError> {
    let missing: Vec<&str> = wanted
        .iter()
        .filter(|(program, _)| find_program(program).is_none())
        .map(|(_, package)| *package)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    eprintln!("test-host: installing {}", missing.join(", "));
    output("update apt's lists", Command::new("apt-get").arg("update"))?;
    let mut apt = Command::new("apt-get");
    apt.args(["install", "-y", "--no-install-recommends"])
        .args(&missing);
    output("install packages of this machine's own suite", &mut apt)?;
    Ok(())
}

/// Looks a program up as a shell would, also in the administrator's directories.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    path.split(':')
        .chain(["/usr/sbin", "/sbin"])
        .map(|directory| Path::new(directory).join(name))
        .find(|candidate| candidate.is_file())
}

/// apt with lists of its own for Debian's newer suites.
pub struct Beside {
    directory: PathBuf,
    config: PathBuf,
}

impl Beside {
    /// Fetches the lists of `suites` into `directory`.
    pub fn update(directory: &Path, suites: &[&str]) -> Result<Self, HostError> {
        eprintln!("test-host: fetching the lists of {}", suites.join(", "));
        output("update apt's lists", Command::new("apt-get").arg("update"))?;
        let mirror = own_mirror()?;
        for part in ["lists/partial", "cache/archives/partial", "parts", "debs"] {
            let path = directory.join(part);
            fs::create_dir_all(&path).map_err(HostError::file("create", &path))?;
        }
        let sources: String = suites
            .iter()
            .map(|suite| format!("deb [signed-by={KEYRING}] {mirror} {suite} main\n"))
            .collect();
        write(&directory.join("sources.list"), &sources)?;
        let here = directory.display();
        let config = directory.join("apt.conf");
        write(
            &config,
            &format!(
                "Dir::State::lists \"{here}/lists\";\nDir::State::status \"/dev/null\";\n\
                 Dir::Cache \"{here}/cache\";\nDir::Etc::sourcelist \"{here}/sources.list\";\n\
                 Dir::Etc::sourceparts \"{here}/parts\";\nDir::Etc::preferencesparts \"{here}/parts\";\n\
                 Dir::Etc::preferences \"/dev/null\";\nAPT::Sandbox::User \"root\";\n\
                 Acquire::Languages \"none\";\nAcquire::IndexTargets::deb::DEP-11::DefaultEnabled \"false\";\n"
            ),
        )?;
        let beside = Self {
            directory: directory.into(),
            config,
        };
        output(
            "fetch the lists of newer suites",
            beside.apt("apt-get").arg("update"),
        )?;
        Ok(beside)
    }

    /// The name and version of the kernel package for which `linux-image-amd64` of a suite stands.
    pub fn kernel(&self, suite: &str) -> Result<String, HostError> {
        let step = "look up the kernel of the test host";
        let mut show = self.apt("apt-cache");
        let text = output(
            step,
            show.arg("show").arg(format!("linux-image-amd64/{suite}")),
        )?;
        text.lines()
            .find_map(|line| {
                let (name, version) = line.strip_prefix("Depends: ")?.split_once(" (= ")?;
                Some(format!("{name}={}", version.split(')').next()?))
            })
            .ok_or_else(|| HostError::Missing {
                step,
                why: format!("no Depends line in: {text}"),
            })
    }

    /// Downloads one package (`name/suite` or `name=version`) and unpacks it to `target`.
    pub fn unpack(&self, package: &str, target: &Path) -> Result<(), HostError> {
        self.fetch(self.apt("apt-get"), package, target)
    }

    /// The same for a package of the machine's own suite.
    pub fn unpack_own(&self, package: &str, target: &Path) -> Result<(), HostError> {
        self.fetch(Command::new("apt-get"), package, target)
    }

    /// Downloads packages of the machine's own suite and all that they depend on, as if nothing
    /// were installed, and unpacks them to `target`.
    pub fn unpack_all(&self, packages: &[&str], target: &Path) -> Result<(), HostError> {
        eprintln!(
            "test-host: fetching {} and what they need",
            packages.join(", ")
        );
        let debs = self.empty_directory()?;
        let mut archives = std::ffi::OsString::from("Dir::Cache::archives=");
        archives.push(&debs);
        let mut apt = Command::new("apt-get");
        apt.args(["-o", "APT::Sandbox::User=root"])
            .args(["-o", "Dir::State::status=/dev/null", "-o"])
            .arg(archives)
            .args(["install", "--download-only", "--no-install-recommends"])
            .arg("--yes")
            .args(packages);
        output(&format!("download {}", packages.join(", ")), &mut apt)?;
        unpack_debs(&debs, target)
    }

    fn fetch(&self, mut apt: Command, package: &str, target: &Path) -> Result<(), HostError> {
        eprintln!("test-host: fetching {package}");
        let debs = self.empty_directory()?;
        output(
            &format!("download {package}"),
            apt.args(["-o", "APT::Sandbox::User=root", "download", package])
                .current_dir(&debs),
        )?;
        unpack_debs(&debs, target)
    }

    /// An empty directory for downloads.
    fn empty_directory(&self) -> Result<PathBuf, HostError> {
        let debs = self.directory.join("debs");
        fs::remove_dir_all(&debs).map_err(HostError::file("empty", &debs))?;
        let partial = debs.join("partial"); // apt expects it of an archive
        fs::create_dir_all(&partial).map_err(HostError::file("create", &partial))?;
        Ok(debs)
    }

    fn apt(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.arg("-c").arg(&self.config);
        command
    }
}

/// Unpacks every downloaded package in `debs`. If there is none this fails.
fn unpack_debs(debs: &Path, target: &Path) -> Result<(), HostError> {
    fs::create_dir_all(target).map_err(HostError::file("create", target))?;
    let found = fs::read_dir(debs).map_err(HostError::file("read", debs))?;
    let found = found.flatten().map(|entry| entry.path());
    let mut unpacked = 0;
    for path in found.filter(|path| path.extension().is_some_and(|it| it == "deb")) {
        output(
            &format!("unpack {}", path.display()),
            Command::new("dpkg-deb").arg("-x").arg(&path).arg(target),
        )?;
        unpacked += 1;
    }
    match unpacked {
        0 => Err(HostError::Missing {
            step: "unpack a package",
            why: format!("apt downloaded nothing for {}", target.display()),
        }),
        _ => Ok(()),
    }
}

/// Debian's own keys, which every Debian machine has.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The mirror from which this machine's own suite comes.
fn own_mirror() -> Result<String, HostError> {
    let step = "find this machine's Debian mirror";
    let release = fs::read_to_string("/etc/os-release")
        .map_err(HostError::file("read", "/etc/os-release"))?;
    let codename = release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .unwrap_or("stable")
        .trim_matches('"');
    let mut list = Command::new("apt-get");
    list.args([
        "indextargets",
        "--format",
        "$(CODENAME) $(REPO_URI)",
        "Created-By: Packages",
    ]);
    let targets = output(step, &mut list)?;
    targets
        .lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(name, _)| *name == codename)
        .map(|(_, uri)| uri.to_owned())
        .ok_or_else(|| HostError::Missing {
            step,
            why: format!("no source for {codename}"),
        })
}

fn write(path: &Path, text: &str) -> Result<(), HostError> {
    fs::write(path, text).map_err(HostError::file("write", path))
}
