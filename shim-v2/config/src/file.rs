//! The configuration's files: each is parsed, checked and laid over what was there before.
//!
//! A later file overrides an earlier one key by key. A value is checked in the file that sets it,
//! so that the error can name the line.

use std::fs;
use std::io::{self, Read};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use toml::Spanned;

use crate::{Config, DIRECTORY, HugePages, LogLevel, prefix_of_running_program};

/// No configuration file is longer.
const MAX_FILE: u64 = 256 * 1024;

/// From what a guest can boot in to 1 TiB.
const MEMORY_MIB: RangeInclusive<u32> = 64..=1024 * 1024;
/// The VMM has no more.
const MAX_VCPUS: RangeInclusive<u8> = 1..=32;
/// In seconds.
const BOOT_DEADLINE: RangeInclusive<u32> = 1..=600;

/// Why the configuration can't be used. One line: the file, the line in it, the key.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the message says what each field is")]
pub enum ConfigError {
    /// A file or the drop-ins' directory could not be read.
    #[error("read configuration {}", path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// A file that is too long to be a configuration.
    #[error("read configuration {}: longer than {MAX_FILE} bytes", path.display())]
    TooLong { path: PathBuf },
    /// Not TOML, an unknown key, a value of the wrong type or out of its range.
    #[error("read configuration {} line {line}, key `{key}`: {why}", path.display())]
    Value {
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// The key, as far as the line has one.
        key: String,
        /// What is wrong with it.
        why: String,
    },
}

impl Config {
    /// The configuration of this host, for the program that runs.
    pub fn load() -> Result<Self, ConfigError> {
        Self::load_from(Path::new(DIRECTORY), &prefix_of_running_program())
    }

    /// The configuration in one file of the caller's choice, which takes the place of the host's:
    /// containerd's `ConfigPath` option of the runtime.
    pub fn load_file(path: &Path) -> Result<Self, ConfigError> {
        let mut config = Self::defaults(&prefix_of_running_program());
        apply(path, &mut config)?;
        Ok(config)
    }

    /// The configuration in `directory`, over the defaults for `prefix`. A missing directory or
    /// file sets nothing.
    pub fn load_from(directory: &Path, prefix: &Path) -> Result<Self, ConfigError> {
        let mut config = Self::defaults(prefix);
        for path in in_order(directory)? {
            apply(&path, &mut config)?;
        }
        Ok(config)
    }
}

/// The keys of a file, each of them optional.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Keys {
    vmm: Option<Spanned<PathBuf>>,
    fsd: Option<Spanned<PathBuf>>,
    proxy: Option<Spanned<PathBuf>>,
    kernel: Option<Spanned<PathBuf>>,
    initrd: Option<Spanned<PathBuf>>,
    printk: Option<Spanned<PathBuf>>,
    memory_mib: Option<Spanned<u32>>,
    max_vcpus: Option<Spanned<u8>>,
    hugepages: Option<HugePages>,
    log_level: Option<LogLevel>,
    selinux: Option<bool>,
    boot_deadline_seconds: Option<Spanned<u32>>,
}

/// The files of a configuration directory, in the order in which they apply.
pub(crate) fn in_order(directory: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let main = directory.join("config.toml");
    let drop_ins = directory.join("config.d");
    let mut files = Vec::new();
    match fs::read_dir(&drop_ins) {
        Ok(entries) => {
            for entry in entries {
                let path = entry
                    .map_err(|source| read_error(&drop_ins, source))?
                    .path();
                if path
                    .extension()
                    .is_some_and(|extension| extension == "toml")
                {
                    files.push(path);
                }
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(source) => return Err(read_error(&drop_ins, source)),
    }
    files.sort();
    match fs::symlink_metadata(&main) {
        Ok(_) => files.insert(0, main),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(source) => return Err(read_error(&main, source)),
    }
    Ok(files)
}

/// Lays the file at `path` over `config`.
pub(crate) fn apply(path: &Path, config: &mut Config) -> Result<(), ConfigError> {
    let text = read(path)?;
    let keys: Keys = toml::from_str(&text).map_err(|error| {
        // Without a span the fault is at the end of the file.
        let start = error.span().map_or(text.len(), |span| span.start);
        value_error(path, &text, start, error.message().replace('\n', ", "))
    })?;
    let file = File { path, text: &text };
    if let Some(vmm) = file.absolute(keys.vmm)? {
        config.vmm = vmm;
    }
    if let Some(fsd) = file.absolute(keys.fsd)? {
        config.fsd = fsd;
    }
    if let Some(proxy) = file.absolute(keys.proxy)? {
        config.proxy = proxy;
    }
    if let Some(kernel) = file.absolute(keys.kernel)? {
        config.kernel = kernel;
    }
    if let Some(initrd) = file.absolute(keys.initrd)? {
        config.initrd = initrd;
    }
    if let Some(printk) = file.absolute(keys.printk)? {
        config.printk = printk;
    }
    if let Some(memory) = keys.memory_mib {
        config.memory_mib = file.even(&memory)?;
        file.within(memory, MEMORY_MIB)?;
    }
    if let Some(vcpus) = keys.max_vcpus {
        config.max_vcpus = file.within(vcpus, MAX_VCPUS)?;
    }
    if let Some(deadline) = keys.boot_deadline_seconds {
        let seconds = file.within(deadline, BOOT_DEADLINE)?;
        config.boot_deadline = Duration::from_secs(seconds.into());
    }
    config.hugepages = keys.hugepages.unwrap_or(config.hugepages);
    config.log_level = keys.log_level.unwrap_or(config.log_level);
    config.selinux = keys.selinux.unwrap_or(config.selinux);
    Ok(())
}

/// A file whose values are being checked.
struct File<'a> {
    path: &'a Path,
    text: &'a str,
}

impl File<'_> {
    fn absolute(&self, value: Option<Spanned<PathBuf>>) -> Result<Option<PathBuf>, ConfigError> {
        let Some(value) = value else { return Ok(None) };
        if !value.get_ref().is_absolute() {
            return Err(self.refuse(&value, "is not an absolute path".into()));
        }
        Ok(Some(value.into_inner()))
    }

    fn within<T>(&self, value: Spanned<T>, range: RangeInclusive<T>) -> Result<T, ConfigError>
    where
        T: PartialOrd + std::fmt::Display,
    {
        if !range.contains(value.get_ref()) {
            let (least, most) = (range.start(), range.end());
            let why = format!("{} is not within {least} to {most}", value.get_ref());
            return Err(self.refuse(&value, why));
        }
        Ok(value.into_inner())
    }

    fn even(&self, value: &Spanned<u32>) -> Result<u32, ConfigError> {
        match value.get_ref() {
            number if number % 2 == 0 => Ok(*number),
            number => Err(self.refuse(value, format!("{number} is not even"))),
        }
    }

    fn refuse<T>(&self, value: &Spanned<T>, why: String) -> ConfigError {
        value_error(self.path, self.text, value.span().start, why)
    }
}

fn read(path: &Path) -> Result<String, ConfigError> {
    let file = fs::File::open(path).map_err(|source| read_error(path, source))?;
    let mut text = String::new();
    file.take(MAX_FILE + 1)
        .read_to_string(&mut text)
        .map_err(|source| read_error(path, source))?;
    if text.len() as u64 > MAX_FILE {
        return Err(ConfigError::TooLong { path: path.into() });
    }
    Ok(text)
}

fn read_error(path: &Path, source: io::Error) -> ConfigError {
    ConfigError::Read {
        path: path.into(),
        source,
    }
}

/// Finds line and key of the byte at `start`.
fn value_error(path: &Path, text: &str, start: usize, why: String) -> ConfigError {
    let before = text.get(..start).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let content = text.lines().nth(line - 1).unwrap_or_default();
    let key = content.split('=').next().unwrap_or_default().trim();
    ConfigError::Value {
        path: path.into(),
        line,
        key: key.into(),
        why,
    }
}
