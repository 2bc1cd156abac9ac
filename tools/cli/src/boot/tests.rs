//! Each way in which a boot can fail before there is a guest, with its line. The lifecycle tests
//! boot a guest, which needs a real KVM.

use std::error::Error;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::*;

/// An installation whose VMM is a shell script; `/dev/null` takes KVM's place.
struct Installation(
    tempfile::TempDir,
    Config,
    #[allow(dead_code, reason = "held, never looked at")] MutexGuard<'static, ()>,
);

/// One test at a time: a script can't run while another test's child has it open for writing.
static ONE: Mutex<()> = Mutex::new(());

impl Installation {
    fn new(vmm: &str) -> Self {
        let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let directory = tempfile::tempdir().unwrap();
        let mut config = Config::defaults(directory.path());
        for path in [&config.vmm, &config.kernel] {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
        }
        fs::write(&config.vmm, format!("#!/bin/sh\n{vmm}\n")).unwrap();
        fs::set_permissions(&config.vmm, fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(&config.kernel, "").unwrap();
        fs::write(&config.initrd, "").unwrap();
        fs::write(&config.printk, PRINTK).unwrap();
        config.boot_deadline = Duration::from_millis(500);
        Self(directory, config, one)
    }

    fn boot(&self) -> Result<Booted, String> {
        boot_with(&self.1, Path::new("/dev/null"))
            .map_err(|error| kata_like_failure::one_line(&error))
    }
}

const PRINTK: &str = r#"{"prb": 1, "desc_ring": 0, "text_ring": 48, "count_bits": 0, "descs": 8, "infos": 16,
    "head_id": 24, "tail_id": 32, "size_bits": 0, "data": 8, "desc_size": 24, "desc_state": 0, "desc_begin": 8,
    "desc_next": 16, "info_size": 88, "info_seq": 0, "info_time": 8, "info_text_len": 16, "info_level": 19}"#;

/// A shell script can't receive, but what it writes to the socket is one message.
fn says(report: &str) -> String {
    format!("echo '{report}' >&3")
}

const FIGURES: &str = r#"{"elapsed_ns": 250000000, "exits": 820, "user_exits": 400, "page_faults": 16,
    "huge_pages": 13, "resident_bytes": 27262976}"#;

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[test]
fn a_host_without_kvm_is_told_so() {
    let installation = Installation::new("exit 0");
    let missing = boot_with(&installation.1, Path::new("/dev/kvm-of-another-host")).unwrap_err();
    assert!(
        kata_like_failure::one_line(&missing)
            .starts_with("open /dev/kvm-of-another-host to run virtual machines (")
    );
}

#[test]
fn a_missing_part_is_named() {
    if !is_root() {
        return; // The VMM needs a user id of its own.
    }
    let installation = Installation::new("exit 0");
    for (path, line) in [
        (&installation.1.vmm, "start the VMM "),
        (&installation.1.initrd, "open the initrd "),
        (&installation.1.kernel, "open the guest kernel "),
        (
            &installation.1.printk,
            "open the layout of the guest's log ",
        ),
    ] {
        fs::remove_file(path).unwrap();
        let error = installation.boot().unwrap_err();
        let expected = format!(
            "{line}{}: No such file or directory (os error 2)",
            path.display()
        );
        assert_eq!(error, expected);
    }
    drop(installation.0);
}

#[test]
fn a_vmm_that_dies_is_told_with_its_status_and_last_words() {
    if !is_root() {
        return;
    }
    let error = Installation::new("echo gone wrong >&2; exit 3")
        .boot()
        .unwrap_err();
    assert!(
        error.ends_with("status 3 and without a reason; last line of its log: \"gone wrong\""),
        "{error}"
    );
    let error = Installation::new("kill -SYS $$").boot().unwrap_err();
    assert!(
        error.contains("a system call that its filter does not allow"),
        "{error}"
    );
}

#[test]
fn what_the_vmm_says_is_what_the_user_reads() {
    if !is_root() {
        return;
    }
    let ended = r#"{"ended": {"reason": "failed", "detail": "load the guest kernel: not an ELF image", "log_tail": ["x", "y"]}}"#;
    let error = Installation::new(&says(ended)).boot().unwrap_err();
    assert_eq!(
        error,
        "boot the guest: load the guest kernel: not an ELF image; last line of its log: \"y\""
    );
}

#[test]
fn a_guest_that_says_nothing_is_given_up() {
    if !is_root() {
        return;
    }
    let installation = Installation::new("exec sleep 60");
    let begin = Instant::now();
    let error = installation.boot().unwrap_err();
    assert!(
        error.starts_with("wait for the guest's agent: no dial within"),
        "{error}"
    );
    assert!(begin.elapsed() < Duration::from_secs(5));
}

/// A VMM that is busy all the time, and tells of progress or of none.
#[test]
fn a_guest_that_is_interpreted_is_told_from_one_that_spins() {
    if !is_root() {
        return;
    }
    let error = |later: &str| {
        let figures = |faults: &str| {
            let faults = format!(r#""page_faults": {faults}"#);
            let text = FIGURES.replace(r#""page_faults": 16"#, &faults);
            says(&format!(r#"{{"figures": {}}}"#, text.replace('\n', "")))
        };
        // Half-way it has told once; asked at the end, it tells again.
        let script = format!(
            "({}; sleep 2.3; {}) & while :; do :; done",
            figures("16"),
            figures(later)
        );
        let mut installation = Installation::new(&script);
        installation.1.boot_deadline = Duration::from_secs(2);
        installation.boot().unwrap_err()
    };
    let slow = error("17");
    let is_busy = slow.contains("CPUs are too busy"); // with other tests
    assert!(
        is_busy || slow.contains("KVM runs guests far too slowly on this host"),
        "{slow}"
    );
    let stuck = error("16");
    assert!(stuck.contains("its virtual machine ran for"), "{stuck}");
    assert!(!stuck.contains("KVM"), "{stuck}");
}

#[test]
fn the_dial_ends_the_wait_and_the_vmm() {
    if !is_root() {
        return;
    }
    let report = format!(r#"{{"agent_connected": {}}}"#, FIGURES.replace('\n', ""));
    let installation = Installation::new(&format!(
        "{}; echo $$ >$0.pid; exec sleep 60",
        says(&report)
    ));
    let booted = installation.boot().unwrap();
    assert_eq!((booted.figures.exits, booted.figures.huge_pages), (820, 13));
    assert!(
        booted
            .to_string()
            .contains("(250 ms from its first instruction; 820 exits, 400 of them")
    );
    let pid = fs::read_to_string(format!("{}.pid", installation.1.vmm.display())).unwrap();
    assert!(
        !Path::new("/proc").join(pid.trim()).exists(),
        "the VMM still runs"
    );
}

#[test]
fn a_broken_layout_names_its_file() {
    if !is_root() {
        return;
    }
    let installation = Installation::new("exit 0");
    fs::write(&installation.1.printk, "{\"prb\": 1}").unwrap();
    let error = boot_with(&installation.1, Path::new("/dev/null")).unwrap_err();
    assert!(error.to_string().contains("printk.json"));
    assert!(
        error
            .source()
            .unwrap()
            .to_string()
            .contains("missing field `desc_ring`")
    );
}
