//! Files: what a program in the container waits for, on its root and on a volume.

use std::fs;

use kata_like_tests::probe::{TOOL, Tool};
use kata_like_tests::{Directory, Host, TestResult, failure};

use crate::measures::{Runtime, remove};
use crate::results::{Of, Results};
use crate::timing;

/// How many files each measure makes.
const FILES: &str = "100";

pub fn measure(host: &Host, runtime: &Runtime, results: &mut Results) -> TestResult {
    let tool = Tool::new(host)?;
    let volume = Directory::new(host)?;
    let id = host.name("bench");
    let (tool, mount) = (tool.mount(), volume.at("/volume", "rbind:rw"));
    let options = ["--mount", &tool, "--mount", &mount];
    timing::run(runtime.run(host, "-d", &id, &options, &["sleep", "1000"]))?;
    let measured = ["/root/files", "/volume/files"].map(|place| {
        let mut exec = host.ctr_command();
        exec.args(["task", "exec", "--exec-id", "files", &id, TOOL]);
        exec.args(["files", place, FILES]);
        timing::run(exec)
    });
    remove(host, &id)?;
    for (group, measured) in ["files of the root", "files of a volume"]
        .iter()
        .zip(measured)
    {
        let (_, text) = measured?;
        // `NAME MICROSECONDS`, a line each.
        for line in text.lines() {
            let pair = line.rsplit_once(' ');
            let (name, number) = pair.ok_or_else(|| failure(format!("no measure: {line}")))?;
            let of = Of {
                group,
                name,
                unit: "µs",
            };
            results.add(&of, runtime.name, number.parse()?);
        }
    }
    fs::remove_dir_all(volume.join("files")).ok();
    Ok(())
}
