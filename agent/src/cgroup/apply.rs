//! Writes limits into the files of a cgroup: all of them or none.
//!
//! Called by `cgroup.rs` for a new cgroup and for an update. What can be checked without a write is
//! checked before the first one. If the kernel then refuses a value, the values before it are
//! written back. What the kernel has done for a limit, such as freeing memory, cannot be taken
//! back.

use std::fs;
use std::io;
use std::path::Path;

use kata_like_failure::{Failure, Step, one_line};
use kata_like_spec::MISSING_FILE;
use rustix::io::Errno;

use super::file::{write, writing};
use super::limits::{Limits, Need, Setting, ranges};

/// Applies `limits` to the cgroup in `directory`.
pub fn apply(directory: &Path, limits: &Limits) -> Result<(), Failure> {
    let mut settings = Vec::new();
    for setting in &limits.0 {
        if applies(directory, setting)? {
            settings.push(setting);
        }
    }
    let mut written: Vec<(&Setting, io::Result<String>)> = Vec::new();
    for setting in settings {
        let before = fs::read_to_string(directory.join(&setting.file));
        if let Err(error) = fs::write(directory.join(&setting.file), &setting.value) {
            take_back(directory, &written);
            let step = writing(directory, &setting.file, &setting.value);
            return Err(match Errno::from_io_error(&error) {
                Some(Errno::INVAL | Errno::RANGE) => bad(setting, &step),
                _ => Failure::failed(step, error).during(format!("set {}", field(setting))),
            });
        }
        written.push((setting, before));
    }
    Ok(())
}

/// Refuses an update that would take memory in use, if the caller asked for that check.
pub fn check_use(directory: &Path, only_below: Option<u64>) -> Result<(), Failure> {
    let Some(limit) = only_below else {
        return Ok(());
    };
    let file = "memory.current";
    let text = fs::read_to_string(directory.join(file)).step(|| "ask for the memory in use")?;
    match text.trim().parse::<u64>() {
        Ok(used) if used >= limit => Err(Failure::bad(
            "linux.resources.memory.checkBeforeUpdate",
            format!("{limit} bytes are not more than the {used} in use"),
        )),
        Ok(_) => Ok(()),
        Err(error) => Err(Failure::failed(format!("read {text:?} from {file}"), error)),
    }
}

fn take_back(directory: &Path, written: &[(&Setting, io::Result<String>)]) {
    for (setting, before) in written.iter().rev() {
        let result = match before {
            Ok(before) => write(directory, &setting.file, before).map_err(|error| one_line(&error)),
            Err(error) => Err(error.to_string()),
        };
        if let Err(error) = result {
            log::warn!("take {} back: {error}", field(setting));
        }
    }
}

fn applies(directory: &Path, setting: &Setting) -> Result<bool, Failure> {
    let there = directory.join(&setting.file).exists();
    match setting.need {
        Need::Always if !there => Err(MISSING_FILE.because(
            field(setting),
            format!("the guest's kernel has no file {} for it", setting.file),
        )),
        Need::Always => Ok(true),
        Need::IfThere => Ok(there),
        Need::IfNumbered => {
            let here = directory.with_file_name(format!("{}.effective", setting.file));
            let here = fs::read_to_string(here).unwrap_or_default();
            let applies = there && holds(&here, &setting.value);
            if !applies {
                log::warn!(
                    "{} of {} is left out: it numbers the host's, and {:?} is what is here",
                    field(setting),
                    directory.display(),
                    here.trim()
                );
            }
            Ok(applies)
        }
    }
}

/// Whether a list of numbers holds all of another. The kernel lists them in order, and joined.
fn holds(all: &str, some: &str) -> bool {
    let (Some(all), Some(some)) = (ranges(all), ranges(some)) else {
        return false;
    };
    let within = |range: &(u32, u32)| {
        let mut all = all.iter();
        all.any(|(first, last)| *first <= range.0 && range.1 <= *last)
    };
    some.iter().all(within)
}

fn field(setting: &Setting) -> String {
    let field = setting.fields.first().map_or("", String::as_str);
    format!("linux.resources.{field}")
}

fn bad(setting: &Setting, why: &str) -> Failure {
    Failure::bad(field(setting), format!("{why}: the kernel refuses it"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use kata_like_failure::Kind;

    fn setting(file: &str, value: &str, need: Need) -> Setting {
        Setting {
            fields: vec![format!("field.of.{file}")],
            file: file.into(),
            value: value.into(),
            need,
        }
    }

    fn cgroup(files: &[(&str, &str)]) -> (tempfile::TempDir, std::path::PathBuf) {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("_c");
        fs::create_dir(&directory).unwrap();
        for (file, text) in files {
            fs::write(directory.join(file), text).unwrap();
        }
        fs::write(root.path().join("cpuset.cpus.effective"), "0-3,8\n").unwrap();
        (root, directory)
    }

    #[test]
    fn a_write_that_fails_takes_the_earlier_ones_back() {
        let (_root, directory) = cgroup(&[("pids.max", "max\n"), ("cpu.weight", "100\n")]);
        // A directory can't be written to.
        fs::create_dir(directory.join("memory.max")).unwrap();
        let limits = Limits(vec![
            setting("pids.max", "5", Need::Always),
            setting("cpu.weight", "1", Need::Always),
            setting("memory.max", "1", Need::Always),
        ]);
        let error = one_line(&apply(&directory, &limits).unwrap_err());
        assert!(
            error.starts_with(
                "set linux.resources.field.of.memory.max: write \"1\" to memory.max of cgroup"
            ),
            "{error}"
        );
        let text = |file| fs::read_to_string(directory.join(file)).unwrap();
        assert_eq!(
            (text("pids.max"), text("cpu.weight")),
            ("max\n".into(), "100\n".into())
        );
    }

    #[test]
    fn what_the_kernel_has_not_is_named_before_anything_is_written() {
        let (_root, directory) = cgroup(&[("pids.max", "max\n")]);
        let limits = Limits(vec![
            setting("pids.max", "5", Need::Always),
            setting("hugetlb.2MB.max", "0", Need::IfThere),
            setting("memory.nothing", "1", Need::Always),
        ]);
        let error = apply(&directory, &limits).unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported);
        assert_eq!(
            error.to_string(),
            "linux.resources.field.of.memory.nothing is not supported: \
             the guest's kernel has no file memory.nothing for it"
        );
        assert_eq!(
            fs::read_to_string(directory.join("pids.max")).unwrap(),
            "max\n"
        );
    }

    #[test]
    fn processors_count_where_all_of_them_are_here() {
        for (wanted, applied) in [("1-2,8", "1-2,8"), ("0-3", "0-3"), ("3-8", "-"), ("4", "-")] {
            let (_root, directory) = cgroup(&[("cpuset.cpus", "-")]);
            let limits = Limits(vec![setting("cpuset.cpus", wanted, Need::IfNumbered)]);
            apply(&directory, &limits).unwrap();
            let text = fs::read_to_string(directory.join("cpuset.cpus")).unwrap();
            assert_eq!(text, applied, "{wanted}");
        }
    }

    #[test]
    fn memory_in_use_is_not_taken_if_it_is_not_to_be() {
        let (_root, directory) = cgroup(&[("memory.current", "4096\n")]);
        assert!(check_use(&directory, None).is_ok());
        assert!(check_use(&directory, Some(4097)).is_ok());
        let error = check_use(&directory, Some(4096)).unwrap_err();
        assert_eq!(error.kind(), Kind::BadRequest, "{error}");
    }
}
