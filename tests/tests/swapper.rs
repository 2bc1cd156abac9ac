//! Directories and symbolic links change places all the time, in a volume and in the roots of
//! containers, while containers come and go. Nothing leads out: a directory of the host that the
//! links name stays as it is, and no container reads what is in it.
//!
//! The host swaps by `renameat2`, and a container beside it. Each round's container mounts
//! something below the volume's directory that is swapped, and swaps in its own root until it is
//! deleted. `KATA_LIKE_FAULTS=all` (`make faults`) does a thousand rounds; the share's own part
//! does a thousand in its unit tests.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use kata_like_tests::volume::bind;
use kata_like_tests::{CtrPod, Directory, Host, Patience, TestResult, failure, figures};
use rustix::fs::{CWD, RenameFlags, renameat_with};

/// What is in the directory that the links name.
const SECRET: &str = "the host's alone";

/// How long `make test` goes on.
const SAMPLE: Duration = Duration::from_secs(30);

/// How many rounds `make faults` does.
const ALL: usize = 1000;

/// A directory of the host that nobody may get to.
struct Canary(Directory);

impl Canary {
    fn new(host: &Host) -> TestResult<Self> {
        let canary = Self(Directory::new(host)?);
        fs::create_dir(canary.0.join("sub"))?;
        fs::write(canary.0.join("secret"), SECRET)?;
        fs::write(canary.0.join("sub/secret"), SECRET)?;
        Ok(canary)
    }

    fn path(&self) -> PathBuf {
        self.0.join("")
    }

    /// Its names, modes and contents.
    fn state(&self) -> TestResult<Vec<String>> {
        use std::os::unix::fs::MetadataExt;
        let mut found = Vec::new();
        let mut open = vec![self.path()];
        while let Some(directory) = open.pop() {
            for entry in fs::read_dir(&directory)? {
                let path = entry?.path();
                let about = fs::symlink_metadata(&path)?;
                let content = match about.is_dir() {
                    true => {
                        open.push(path.clone());
                        String::new()
                    }
                    false => fs::read_to_string(&path)?,
                };
                let (mode, links) = (about.mode(), about.nlink());
                found.push(format!("{} {mode:o} {links} {content}", path.display()));
            }
        }
        found.sort();
        Ok(found)
    }
}

/// A directory with a file and a directory in it, and beside it a link to the canary.
fn make_pair(place: &Path, names: [&str; 2], canary: &Path) -> TestResult {
    let [spot, link] = names.map(|name| place.join(name));
    fs::create_dir_all(spot.join("sub"))?;
    fs::write(spot.join("secret"), "the volume's")?;
    Ok(symlink(canary, link)?)
}

#[test]
fn links_that_take_the_place_of_directories_lead_nowhere() -> TestResult {
    let host = Host::alone()?;
    let (canary, volume) = (Canary::new(&host)?, Directory::new(&host)?);
    let inner = Directory::new(&host)?;
    fs::write(inner.join("inner"), "")?;
    let named = canary.path();
    make_pair(&volume.join(""), ["spot", "link"], &named)?;
    make_pair(&volume.join(""), ["in-spot", "in-link"], &named)?;
    let (state, before) = (canary.state()?, host.footprint());

    let pod = CtrPod::start(&host, &[])?;
    let data = volume.at("/data", "rbind:rw");
    let script = "cd /data; while :; do mv in-spot aside && mv in-link in-spot; \
        mv in-spot in-link && mv aside in-spot; done 2>/dev/null";
    let beside = pod.container("swaps", &["--mount", &data], &["sh", "-c", script])?;
    let (stop, swaps) = (AtomicBool::new(false), AtomicU64::new(0));
    let done = thread::scope(|scope| {
        scope.spawn(|| {
            let [spot, link] = ["spot", "link"].map(|name| volume.join(name));
            while !stop.load(Ordering::Relaxed) {
                if renameat_with(CWD, &spot, CWD, &link, RenameFlags::EXCHANGE).is_ok() {
                    swaps.fetch_add(1, Ordering::Relaxed);
                }
                // The emulated host has one CPU, which the containers need as well.
                thread::sleep(Duration::from_micros(200));
            }
        });
        let done = rounds(&pod, &data, &inner, &named);
        stop.store(true, Ordering::Relaxed);
        done
    });
    let (rounds, ran) = done?;
    figures::note(&format!(
        "{rounds} containers beside {} swaps of a directory and a link; {ran} found their place",
        swaps.load(Ordering::Relaxed)
    ));
    assert!(ran > 0, "none of {rounds} containers has run");
    assert!(swaps.load(Ordering::Relaxed) > rounds as u64);
    beside.remove()?;
    pod.remove()?;
    assert_eq!(canary.state()?, state, "the host's directory has changed");
    host.leaves_nothing(&before)
}

/// How many containers were made, and how many of them have run.
fn rounds(
    pod: &CtrPod,
    data: &str,
    inner: &Directory,
    canary: &Path,
) -> TestResult<(usize, usize)> {
    let all = std::env::var("KATA_LIKE_FAULTS").is_ok_and(|value| value == "all");
    let patience = Patience::new(SAMPLE);
    let script = format!(
        "mkdir -p /spot/sub; ln -s {} /link
        (while :; do mv /spot /aside && mv /link /spot; mv /spot /link && mv /aside /spot; done) &
        cat /data/spot/secret /data/in-spot/secret /spot/secret; ls /data/spot /data/spot/sub
        echo ran",
        canary.display()
    );
    let (mut done, mut ran) = (0, 0);
    let mut last = String::new();
    while done < ALL && (all || !patience.is_over()) {
        let place = ["/data/spot/sub", "/data/in-spot/sub"][done % 2];
        let mount = bind(&inner.join(""), place, "rbind:rw");
        let options = ["--mount", data, "--mount", &mount];
        let output = pod
            .run("round", &options, &["sh", "-c", &script])
            .output()?;
        let text = output.both();
        if text.contains(SECRET) {
            return Err(failure(format!("a container has read it: {text}")));
        }
        // One whose place was a link just then fails, in words.
        if output.text().ends_with("ran") {
            ran += 1;
        } else {
            last = text;
        }
        done += 1;
    }
    println!("the last that did not run: {last}");
    Ok((done, ran))
}
