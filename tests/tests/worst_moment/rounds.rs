//! VMM, fs server and shim are killed under two writers that sync and two that don't.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use kata_like_tests::probe::Tool;
use kata_like_tests::{Directory, Host, TestResult, failure, figures, kata_like_only};

use crate::machine::{Ground, Machine, until};
use crate::records::{Checked, Told};
use crate::{Chance, VICTIMS, rounds};

/// The writers' files, and whether each record was synced. The root has the first two.
pub const FILES: [&str; 4] = [
    "synced:/synced",
    "plain:/plain",
    "synced:/data/synced",
    "plain:/data/plain",
];

/// The longest time from the first record until a process is killed.
const LONGEST: Duration = Duration::from_millis(600);

/// The path of a file of [`FILES`].
pub fn path(file: &str) -> &str {
    file.split_once(':').map_or(file, |(_, path)| path)
}

/// The writer's memory limit in bytes.
const MEMORY: u64 = 64 << 20;

/// A root that holds only the writer.
pub fn lower(directory: &Directory, tool: &Tool) -> TestResult<std::path::PathBuf> {
    let lower = directory.join("lower");
    fs::create_dir(&lower)?;
    fs::copy(tool.path(), lower.join("tool"))?;
    Ok(lower)
}

/// The writer's command line, with all files.
pub fn command() -> Vec<&'static str> {
    let mut command = vec!["/tool", "records", "0"];
    command.extend(FILES);
    command
}

/// Checks that a kill has lost nothing acknowledged. Returns both numbers for each file.
fn judge(machine: &Machine, told: &Told) -> TestResult<[(u64, u64); FILES.len()]> {
    let mut all = [(0, 0); FILES.len()];
    for (place, file) in FILES.iter().enumerate() {
        let mut checked = Checked::default();
        checked.go_on(&machine.on_host(path(file)))?;
        all[place] = (told.last(place), checked.whole);
        if checked.whole < told.last(place) {
            return Err(failure(format!(
                "{file}: {} records are there of {} that were acknowledged",
                checked.whole,
                told.last(place)
            )));
        }
    }
    Ok(all)
}

/// One machine, one kill.
fn round(
    ground: &Ground,
    place: &Path,
    id: &str,
    victim: &str,
    after: Duration,
) -> TestResult<[u64; 4]> {
    let machine = ground.start(id, place, &command(), &[])?;
    let mut told = Told::new(machine.output())?;
    until("a record is acknowledged", || {
        told.read()?;
        Ok((0..FILES.len()).any(|place| told.last(place) > 0))
    })
    .map_err(|error| failure(format!("{error}; {}", machine.errors())))?;
    thread::sleep(after);
    machine.kill(victim)?;
    told.read()?;
    let judged = judge(&machine, &told)?;
    for (place, error) in told.errors() {
        // A process that outlives the fs server may hear of that; no other has a reason to.
        println!(
            "{victim} killed: the writer of {} was told {error}",
            FILES[*place]
        );
        if victim != "fsd" {
            return Err(failure(format!("{}: {error}", FILES[*place])));
        }
    }
    fs::remove_dir_all(place)?;
    Ok(judged.map(|(acknowledged, _)| acknowledged))
}

/// Four of five rounds; `containerd` has the others.
#[test]
fn whoever_dies_nothing_acknowledged_is_lost() -> TestResult {
    kata_like_only!();
    let host = Host::alone()?;
    let (directory, tool) = (Directory::new(&host)?, Tool::new(&host)?);
    let ground = Ground::new(&host, &lower(&directory, &tool)?, Some(MEMORY))?;
    let mut chance = Chance::new("rounds")?;
    let before = host.footprint();
    let (begun, each) = (Instant::now(), rounds()?.div_ceil(5));
    let mut acknowledged = [0; FILES.len()];
    for number in 0..each {
        for victim in VICTIMS {
            let after = chance.up_to(LONGEST);
            let id = host.name(victim);
            let counts =
                round(&ground, &directory.join("place"), &id, victim, after).map_err(|error| {
                    failure(format!("round {number}, {victim} after {after:?}: {error}"))
                })?;
            for (all, count) in acknowledged.iter_mut().zip(counts) {
                *all += count;
            }
        }
    }
    host.leaves_nothing(&before)?;
    let kills = each * VICTIMS.len() as u64;
    figures::note(&format!(
        "{kills} kills of VMM, fs server, proxy and shim under writers: {:.1} s, acknowledged and there: {} synced and {} other records on the root, {} and {} on a volume",
        begun.elapsed().as_secs_f32(),
        acknowledged[0],
        acknowledged[1],
        acknowledged[2],
        acknowledged[3],
    ));
    // Otherwise nothing was tried.
    assert!(
        acknowledged.iter().all(|count| *count > kills),
        "{acknowledged:?}"
    );
    Ok(())
}
