//! What the writers of `tests/probe/src/tools/records.rs` have acknowledged, and whether the host's
//! files hold it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kata_like_tests::{TestResult, failure};

/// The same number as the writer's.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;
const PAGES: u64 = 16;
const PAGE: u64 = 4096;

/// The content of a record.
fn record(number: u64) -> Vec<u8> {
    let length = 16 + (number.wrapping_mul(SPREAD) >> 32) % 5000;
    (0..length.div_ceil(8))
        .flat_map(|at: u64| (number ^ at.wrapping_mul(SPREAD)).to_le_bytes())
        .take(length as usize)
        .collect()
}

/// A growing file of lines; each line is read once.
pub struct Told {
    file: File,
    rest: String,
    /// The last number, by the file's place among the writer's arguments.
    last: BTreeMap<usize, u64>,
    /// The error that a writer got.
    errors: BTreeMap<usize, String>,
}

impl Told {
    /// Nothing is acknowledged yet.
    pub fn new(path: &Path) -> TestResult<Self> {
        Ok(Self {
            file: File::open(path)?,
            rest: String::new(),
            last: BTreeMap::new(),
            errors: BTreeMap::new(),
        })
    }

    /// Reads new whole lines. Each file's numbers come in order.
    pub fn read(&mut self) -> TestResult {
        self.file.read_to_string(&mut self.rest)?;
        let Some(end) = self.rest.rfind('\n') else {
            return Ok(());
        };
        let new: String = self.rest.drain(..=end).collect();
        for line in new.lines() {
            // A line that begins with another word is another program's, or the writer's last
            // words.
            let Some((place, what)) = line.split_once(' ') else {
                continue;
            };
            let Ok(place) = place.parse::<usize>() else {
                continue;
            };
            match what.parse::<u64>() {
                Ok(number) => {
                    let last = self.last.entry(place).or_default();
                    if number != *last + 1 || self.errors.contains_key(&place) {
                        return Err(failure(format!("{line:?} after {last}")));
                    }
                    *last = number;
                }
                Err(_) => drop(self.errors.insert(place, what.to_owned())),
            }
        }
        Ok(())
    }

    /// The last number that this file's writer was told to be done.
    pub fn last(&self, place: usize) -> u64 {
        self.last.get(&place).copied().unwrap_or(0)
    }

    /// The errors that writers got, by their files' places.
    pub fn errors(&self) -> &BTreeMap<usize, String> {
        &self.errors
    }
}

/// How far a file of records has been read.
#[derive(Clone, Copy, Default)]
pub struct Checked {
    /// How many records are whole, from the first on, without a hole.
    pub whole: u64,
    /// Where the last of them ends.
    end: u64,
}

impl Checked {
    /// Goes on reading: each written byte is there, in order, and behind the last whole record only
    /// the first bytes of the next one. A missing file holds nothing.
    pub fn go_on(&mut self, path: &Path) -> TestResult {
        let mut found = Vec::new();
        match File::open(path) {
            Ok(mut file) => {
                file.seek(SeekFrom::Start(self.end))?;
                file.read_to_end(&mut found)?;
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(failure(format!("{}: {error}", path.display()))),
        }
        let mut rest = &found[..];
        loop {
            let wanted = record(self.whole + 1);
            match rest.strip_prefix(&wanted[..]) {
                Some(after) => {
                    self.whole += 1;
                    self.end += wanted.len() as u64;
                    rest = after;
                }
                None if wanted.starts_with(rest) => return Ok(()),
                None => {
                    return Err(failure(format!(
                        "{}: behind {} whole records of {} bytes comes what was not written there",
                        path.display(),
                        self.whole,
                        self.end
                    )));
                }
            }
        }
    }
}

/// How old the stores get that a mapped file lacks on the host, while its writer goes on.
pub struct Mapped {
    path: PathBuf,
    place: usize,
    /// When each number was read, from 1 on.
    told: Vec<Instant>,
    /// The age of the oldest store that was seen to be missing.
    pub oldest: Duration,
}

impl Mapped {
    /// For the file at this place among the writer's arguments.
    pub fn new(path: PathBuf, place: usize) -> Self {
        Self {
            path,
            place,
            told: Vec::new(),
            oldest: Duration::ZERO,
        }
    }

    /// How many numbers were stored.
    pub fn stored(&self) -> usize {
        self.told.len()
    }

    /// Compares the host's file with what was acknowledged before; `now` is earlier if nothing has
    /// changed since.
    pub fn look(&mut self, told: &Told, now: Instant) -> TestResult<Duration> {
        let on_host = self.pages()?;
        let missing = (1..=PAGES).filter_map(|first| {
            let stored = on_host[(first % PAGES) as usize];
            let next = if stored == 0 { first } else { stored + PAGES };
            self.told.get(next as usize - 1)
        });
        let age = missing
            .min()
            .map_or(Duration::ZERO, |at| now.saturating_duration_since(*at));
        self.oldest = self.oldest.max(age);
        // Newer numbers count from now on.
        self.told
            .resize(told.last(self.place) as usize, Instant::now());
        Ok(age)
    }

    fn pages(&self) -> TestResult<[u64; PAGES as usize]> {
        let mut pages = [0; PAGES as usize];
        if !fs::exists(&self.path)? {
            return Ok(pages);
        }
        let file = File::open(&self.path)?;
        for (at, page) in (0..).zip(&mut pages) {
            let mut number = [0; 8];
            match file.read_exact_at(&mut number, at * PAGE) {
                Ok(()) => *page = u64::from_le_bytes(number),
                Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(pages)
    }
}
