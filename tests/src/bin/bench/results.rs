//! What was measured, as a file.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use kata_like_tests::{TestResult, failure};
use serde::{Deserialize, Serialize};

/// The runtime that the others are compared with.
pub const BASE: &str = "runc";
/// The runtime that this is about.
pub const OURS: &str = "kata-like";

/// One run of the bench.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Results {
    pub host: Host,
    /// The runtimes and their versions, in the order of the columns.
    pub runtimes: Vec<Runtime>,
    /// Runtimes that were wanted and are not on the host, each with the reason.
    pub missing: BTreeMap<String, String>,
    pub measures: Vec<Measure>,
}

/// Where it ran.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Host {
    pub kernel: String,
    pub cpu: String,
    pub cpus: usize,
    /// The host's CPU was emulated, so a time is that of the emulator.
    pub emulated: bool,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Runtime {
    pub name: String,
    pub version: String,
}

/// One thing that was measured with each runtime.
#[derive(Debug, Serialize, Deserialize)]
pub struct Measure {
    /// Measures of one subject are shown together.
    pub group: String,
    pub name: String,
    /// `ms`, `MiB`, …; less is better.
    pub unit: String,
    /// One value for each round, by runtime.
    pub values: BTreeMap<String, Vec<f64>>,
}

impl Results {
    pub fn read(path: &Path) -> TestResult<Self> {
        let text = fs::read(path);
        let text = text.map_err(|error| failure(format!("read {}: {error}", path.display())))?;
        serde_json::from_slice(&text)
            .map_err(|error| failure(format!("{} is no file of results: {error}", path.display())))
    }

    pub fn write(&self, path: &Path) -> TestResult {
        fs::write(path, serde_json::to_string_pretty(self)? + "\n")
            .map_err(|error| failure(format!("write {}: {error}", path.display())))
    }

    /// Adds one value.
    pub fn add(&mut self, of: &Of, runtime: &str, value: f64) {
        let is_it = |it: &&mut Measure| it.group == of.group && it.name == of.name;
        let measure = match self.measures.iter_mut().find(is_it) {
            Some(measure) => measure,
            None => {
                self.measures.push(Measure {
                    group: of.group.into(),
                    name: of.name.into(),
                    unit: of.unit.into(),
                    values: BTreeMap::new(),
                });
                let last = self.measures.len() - 1;
                &mut self.measures[last]
            }
        };
        measure
            .values
            .entry(runtime.into())
            .or_default()
            .push(value);
    }
}

/// What a value is of.
pub struct Of<'a> {
    pub group: &'a str,
    pub name: &'a str,
    pub unit: &'a str,
}
