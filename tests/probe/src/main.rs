//! Prints what a container sees, as one line of JSON.
//!
//! `tests/tests/oci.rs` makes it the command of containers under runc and under kata-like, and
//! compares the output. It is linked statically, since it must run in an otherwise empty root. It
//! has a C `main`: Rust's changes signal handling before anybody can look.
//!
//! It leaves out what depends on the kernel or the machine: each printed value can be equal. For a
//! value that could not be found out it prints the error's name.
//!
//! It unmounts and renames what it can. So it does nothing if the root has no file `MARK`, which no
//! machine has and the tests put into each container's root.
//!
//! As `/init` of a guest it is a hostile agent (`agent`).
//!
//! Roles, by the first argument: `pause` waits for ever; `hook FILE` is a hook that stores its
//! input in FILE; those in `tools` do what busybox can't; anything else prints the report.

#![no_main]

mod agent;
mod attempts;
mod places;
mod process;
mod tools;

use std::ffi::{c_char, c_int};
use std::io::{Read, Write};

use serde_json::{Value, json};

/// The file that the root of a container for this program has.
const MARK: &str = "/.root-of-a-probe";

/// The entry point that the C library calls.
///
/// # Safety
///
/// Called once, by the C library; the arguments are not used.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn main(_count: c_int, _arguments: *const *const c_char) -> c_int {
    let arguments: Vec<String> = std::env::args().collect();
    if std::process::id() == 1 && arguments.first().is_some_and(|called| called == "/init") {
        agent::serve();
    }
    if let Some(line) = tools::run(arguments.get(1..).unwrap_or_default()) {
        return c_int::from(writeln!(std::io::stdout(), "{line}").is_err());
    }
    if !std::path::Path::new(MARK).exists() {
        eprintln!("there is no {MARK}: this is no container for this program");
        return 125;
    }
    match arguments.get(1).map(String::as_str) {
        Some("pause") => loop {
            std::thread::sleep(std::time::Duration::from_secs(3600));
        },
        Some("hook") => c_int::from(hook(arguments.get(2)).is_err()),
        _ => {
            let mut line = report().to_string();
            line.push('\n');
            c_int::from(std::io::stdout().write_all(line.as_bytes()).is_err())
        }
    }
}

/// Makes the report. The attempts come last: some leave traces that the other parts would see.
fn report() -> Value {
    json!({
        "process": process::report(),
        "places": places::report(),
        "attempts": attempts::report(),
    })
}

/// Stores the state that a hook gets on its standard input, and what it sees.
fn hook(file: Option<&String>) -> std::io::Result<()> {
    let mut state = String::new();
    std::io::stdin().read_to_string(&mut state)?;
    let seen = json!({
        "state": normal(serde_json::from_str(&state)?),
        "args": std::env::args().collect::<Vec<_>>(),
        "env": std::env::vars().collect::<std::collections::BTreeMap<_, _>>(),
        "cwd": std::env::current_dir().ok(),
        "hostname": process::host_name(),
        "status": process::status(),
        "terminal": process::terminal_size(),
        "root": places::names("/"),
    });
    let file = file.map(String::as_str).unwrap_or_default();
    std::fs::write(file, seen.to_string())
}

/// The state without the parts that always differ: the container's name and pid, and its bundle's
/// place.
fn normal(mut state: Value) -> Value {
    // Each runtime tells the version that it was built with.
    for key in ["id", "bundle", "ociVersion"] {
        if state[key].as_str().is_some_and(|text| !text.is_empty()) {
            state[key] = "some".into();
        }
    }
    if state["pid"].as_i64().is_some_and(|pid| pid > 1) {
        state["pid"] = "many".into();
    }
    if let Some(all) = state["annotations"].as_object_mut() {
        all.remove("io.kubernetes.cri.sandbox-id");
    }
    state
}

/// The name of the last system call's error.
fn last_error() -> String {
    error_name(&std::io::Error::last_os_error())
}

/// The names of the errors that occur here; others by their number.
fn error_name(error: &std::io::Error) -> String {
    let number = error.raw_os_error().unwrap_or(0);
    let names = [
        (libc::EPERM, "EPERM"),
        (libc::ENOENT, "ENOENT"),
        (libc::ESRCH, "ESRCH"),
        (libc::EIO, "EIO"),
        (libc::ENXIO, "ENXIO"),
        (libc::EBADF, "EBADF"),
        (libc::EAGAIN, "EAGAIN"),
        (libc::ENOMEM, "ENOMEM"),
        (libc::EACCES, "EACCES"),
        (libc::EFAULT, "EFAULT"),
        (libc::EBUSY, "EBUSY"),
        (libc::EEXIST, "EEXIST"),
        (libc::EXDEV, "EXDEV"),
        (libc::ENODEV, "ENODEV"),
        (libc::ENOTDIR, "ENOTDIR"),
        (libc::EISDIR, "EISDIR"),
        (libc::EINVAL, "EINVAL"),
        (libc::ENOTTY, "ENOTTY"),
        (libc::EFBIG, "EFBIG"),
        (libc::ENOSPC, "ENOSPC"),
        (libc::EROFS, "EROFS"),
        (libc::ENOLCK, "ENOLCK"),
        (libc::ENOSYS, "ENOSYS"),
        (libc::ELOOP, "ELOOP"),
        (libc::ENODATA, "ENODATA"),
        (libc::EOPNOTSUPP, "EOPNOTSUPP"),
        (libc::EAFNOSUPPORT, "EAFNOSUPPORT"),
        (libc::EPROTONOSUPPORT, "EPROTONOSUPPORT"),
        (libc::EADDRINUSE, "EADDRINUSE"),
        (libc::EOVERFLOW, "EOVERFLOW"),
        (libc::ENOKEY, "ENOKEY"),
        (libc::EDQUOT, "EDQUOT"),
    ];
    match names.iter().find(|(known, _)| *known == number) {
        Some((_, name)) => (*name).to_owned(),
        None => format!("error {number}"),
    }
}
