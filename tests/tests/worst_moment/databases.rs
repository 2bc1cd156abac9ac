//! Databases from Debian at the worst moment, all at once: SQLite in WAL and in rollback mode,
//! LMDB, and git with `core.fsync=all`. Their own check judges what is on the host, and each
//! acknowledged transaction must be in it.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use kata_like_tests::probe::{TOOL, Tool};
use kata_like_tests::rootfs::Rootfs;
use kata_like_tests::{
    Call, Directory, Host, TestResult, failure, figures, kata_like_only, userland,
};

use crate::machine::{Ground, Machine, bind, until};
use crate::records::{Mapped, Told};
use crate::{Chance, MAPPED_BOUND, VICTIMS, rounds};

/// The databases.
const NAMES: [&str; 4] = ["wal", "rollback", "lmdb", "git"];

/// How they are put to work, and how the remains are checked.
const WORK: &str = include_str!("databases.sh");

/// Beside them a writer stores numbers into mapped files.
const MAPPED: [&str; 2] = ["/mapped", "/data/mapped"];

/// The longest time from the second transaction of each on (git has one).
const LONGEST: Duration = Duration::from_secs(3);

/// The preparation, at the host's speed: git's repository.
const PREPARE: &str = r#"
export HOME=/ LC_ALL=C GIT_AUTHOR_NAME=t GIT_AUTHOR_EMAIL=t GIT_COMMITTER_NAME=t GIT_COMMITTER_EMAIL=t
mkdir -p $git && cd $git && git init -q -b main --template= . || exit 1
printf '[core]\n\tfsync = all\n\tfsyncMethod = fsync\n[gc]\n\tauto = 0\n' >>.git/config
echo 1 >file
git add file && git commit -q -m 1
"#;

/// What the judge runs, in a root with Debian's programs. Each database's directory is a variable.
const JUDGE: &str = r#"
export HOME=/ LC_ALL=C
for name in wal rollback; do
    eval "db=\$$name/db"
    echo "= $name $(sqlite3 -batch -bail $db 'PRAGMA integrity_check; SELECT count(*), max(n), sum(n) = (SELECT total FROM sums),
        sum(v = hex(zeroblob(200)) || n) FROM t;' 2>&1 | tr '\n' ' ')"
done
mdb_stat -n $lmdb/db >/dev/null && echo "= lmdb ok"
mdb_dump -n -p $lmdb/db
cd $git
git fsck --full --strict --no-progress && echo "= git ok"
git rev-list --reverse main
"#;

/// What was acknowledged: the number of each database's last transaction, and the names of git's
/// commits.
fn acknowledged(output: &Path) -> TestResult<(BTreeMap<String, u64>, Vec<String>)> {
    let (mut last, mut commits) = (BTreeMap::new(), Vec::new());
    let text = fs::read_to_string(output)?;
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    for line in whole.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let (Some(name), Some(number)) = (words.first(), words.get(1)) else {
            continue; // sqlite3's answer to PRAGMA
        };
        if !NAMES.contains(name) {
            continue;
        }
        let number: u64 = number.parse()?;
        // git's first commit was made before.
        let before = last.insert((*name).to_owned(), number);
        if before.unwrap_or(u64::from(*name == "git")) + 1 != number {
            return Err(failure(format!("{line:?} is not the next")));
        }
        commits.extend(words.get(2).map(|id| (*id).to_owned()));
    }
    Ok((last, commits))
}

/// Runs a script on the files on the host, with Debian's programs as its root, and returns its
/// output.
fn on_host(
    room: &Path,
    place: &Path,
    bin: &Path,
    directories: &[String],
    what: &str,
) -> TestResult<String> {
    let [usr, bin_in, place_in, dev] = ["usr", "bin", "place", "dev"].map(|name| room.join(name));
    for directory in [&usr, &bin_in, &place_in, &dev, &room.join("tmp")] {
        fs::create_dir_all(directory)?;
    }
    for link in ["lib", "lib64"] {
        if !room.join(link).is_symlink() {
            symlink(format!("usr/{link}"), room.join(link))?;
        }
    }
    let mut script = String::new();
    for (name, directory) in NAMES.iter().zip(directories) {
        let inside = match directory.strip_prefix("/data") {
            Some(rest) => format!("/place/volume{rest}"),
            None => format!("/place/upper{directory}"),
        };
        script.push_str(&format!("{name}={inside}\n"));
    }
    fs::write(room.join("script"), script + what)?;
    let userland = userland::path("")?;
    let binds = [
        (&userland, &usr),
        (&bin.to_owned(), &bin_in),
        (&place.to_owned(), &place_in),
    ];
    let mut mounts: String = binds
        .iter()
        .map(|(from, to)| format!("mount --bind {} {} && ", from.display(), to.display()))
        .collect();
    mounts.push_str(&format!("mount --rbind /dev {} && ", dev.display()));
    let room = room.display();
    // The mounts go with the namespace.
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c"]);
    command.arg(format!("{mounts} exec chroot {room} /bin/sh /script"));
    let output = Call::new(command).output()?;
    Ok(format!("{}\n{}", output.text(), output.error_text()))
}

/// Everything acknowledged is in what the judge has found whole.
fn check(said: &str, last: &BTreeMap<String, u64>, commits: &[String]) -> TestResult {
    let wrong = |what: &str| {
        failure(format!(
            "{what}; acknowledged {last:?} {commits:?}; the judge: {said}"
        ))
    };
    let of = |name: &str| last.get(name).copied().unwrap_or(0);
    for name in ["wal", "rollback"] {
        // `ok`, then the count, the last number, whether the sum is right, and how many have their
        // content.
        let line = said
            .lines()
            .find_map(|line| line.strip_prefix(&format!("= {name} ok ")));
        let counts = line.ok_or_else(|| wrong(name))?;
        let counts: Vec<&str> = counts.trim().split('|').collect();
        let [count, largest, sum, right] = counts[..] else {
            return Err(wrong(name));
        };
        if (count, right, sum) != (largest, largest, "1") || count.parse::<u64>()? < of(name) {
            return Err(wrong(name));
        }
    }
    if !said.contains("= lmdb ok") || !said.contains("= git ok") {
        return Err(wrong("a check has failed"));
    }
    // Each key and its value have a line of their own.
    let lines: Vec<&str> = said.lines().collect();
    let begin = lines.iter().position(|line| *line == "HEADER=END");
    let pairs = lines
        .get(begin.ok_or_else(|| wrong("lmdb"))? + 1..)
        .unwrap_or_default();
    let whole = (1_u64..).zip(pairs.chunks(2)).take_while(|(number, pair)| {
        let value = format!(" {}", format!("v{number},").repeat(50));
        pair[0] == format!(" {number:08}") && pair.get(1).is_some_and(|found| **found == value)
    });
    let whole = whole.count();
    if (whole as u64) < of("lmdb") || pairs.get(2 * whole) != Some(&"DATA=END") {
        return Err(wrong(&format!("lmdb: {whole} are whole")));
    }
    let begin = lines.iter().position(|line| *line == "= git ok");
    // The first was made before.
    let found = lines.get(begin.unwrap_or(0) + 2..).unwrap_or_default();
    let commits: Vec<&str> = commits.iter().map(String::as_str).collect();
    match found.starts_with(&commits) {
        true => Ok(()),
        false => Err(wrong("git")),
    }
}

/// All of them work until a process is killed.
fn work_and_kill(machine: &Machine, victim: &str, after: Duration) -> TestResult<Duration> {
    let begun = Instant::now();
    let mut told = Told::new(machine.output())?;
    let mut mapped: Vec<Mapped> = (0..)
        .zip(MAPPED)
        .map(|(place, path)| Mapped::new(machine.on_host(path), place))
        .collect();
    let mut look = |at: Instant| -> TestResult<Duration> {
        told.read()?;
        let ages = mapped.iter_mut().map(|mapped| mapped.look(&told, at));
        Ok(ages
            .collect::<TestResult<Vec<_>>>()?
            .into_iter()
            .max()
            .unwrap_or_default())
    };
    until("each has two transactions", || {
        look(Instant::now())?;
        let (last, _) = acknowledged(machine.output())?;
        Ok(NAMES
            .iter()
            .all(|name| last.get(*name).is_some_and(|last| *last >= 2)))
    })
    .map_err(|error| failure(format!("{error}: {:?}", acknowledged(machine.output()))))?;
    println!(
        "two transactions of each after {:.1} s",
        begun.elapsed().as_secs_f32()
    );
    let end = Instant::now() + after;
    while Instant::now() < end {
        look(Instant::now())?;
        thread::sleep(Duration::from_millis(100));
    }
    let killed = Instant::now();
    machine.kill(victim)?;
    look(killed)
}

/// The directories of the databases: on the root and on the volume by turns.
fn directories(turn: u64) -> Vec<String> {
    let place = |number: u64| {
        if (number + turn).is_multiple_of(2) {
            "/db"
        } else {
            "/data/db"
        }
    };
    let named = (0..).zip(NAMES);
    named
        .map(|(number, name)| format!("{}/{name}", place(number)))
        .collect()
}

#[test]
fn databases_keep_what_they_have_acknowledged() -> TestResult {
    kata_like_only!();
    let host = Host::alone()?;
    let (directory, tool) = (Directory::new(&host)?, Tool::new(&host)?);
    let rootfs = Rootfs::mount(&host)?;
    let ground = Ground::new(&host, rootfs.path(), None)?;
    let mut mounts = vec![bind(tool.path(), TOOL, "ro")];
    for (from, to) in [("", "/usr"), ("lib", "/lib"), ("lib64", "/lib64")] {
        mounts.push(bind(&userland::path(from)?, to, "ro"));
    }
    let (room, bin) = (directory.join("room"), rootfs.path().join("bin"));
    let mut chance = Chance::new("databases")?;
    let before = host.footprint();
    let begun = Instant::now();
    // Each victim once. Six are each victim with each place.
    let kills = (rounds()? * 3).div_ceil(200).max(3);
    let (mut sums, mut oldest) = (BTreeMap::<String, u64>::new(), Duration::ZERO);
    for turn in 0..kills {
        let victim = VICTIMS[turn as usize % VICTIMS.len()];
        let after = chance.up_to(LONGEST);
        let (place, directories) = (directory.join("place"), directories(turn));
        for part in ["upper", "volume"] {
            fs::create_dir_all(place.join(part))?;
        }
        on_host(&room, &place, &bin, &directories, PREPARE)?;
        let mapped = MAPPED.map(|path| format!("mapped:{path}")).join(" ");
        let script = format!("{TOOL} records 25 {mapped} &\n{WORK}");
        let mut command = vec!["sh", "-c", &script, "databases"];
        command.extend(directories.iter().map(String::as_str));
        let machine = ground.start(&host.name(victim), &place, &command, &mounts)?;
        let round = || -> TestResult<_> {
            let age = work_and_kill(&machine, victim, after)?;
            let (last, commits) = acknowledged(machine.output())?;
            let said = on_host(&room, &place, &bin, &directories, JUDGE)?;
            check(&said, &last, &commits)?;
            Ok((last, age))
        };
        let (last, age) = round().map_err(|error| {
            failure(format!(
                "{victim} killed, {directories:?}: {error}; {}",
                machine.errors()
            ))
        })?;
        println!("{victim} killed, {directories:?}: {last:?}");
        assert!(
            age < MAPPED_BOUND,
            "{victim}: stored {age:?} before, and not there"
        );
        oldest = oldest.max(age);
        for (name, last) in last {
            *sums.entry(name).or_default() += last;
        }
        drop(machine);
        fs::remove_dir_all(&place)?;
    }
    figures::note(&format!(
        "{kills} kills of VMM, fs server and shim under databases: {:.1} s, acknowledged and there: {sums:?}; stored through a mapping and lost: what was younger than {:.1} s",
        begun.elapsed().as_secs_f32(),
        oldest.as_secs_f32()
    ));
    host.leaves_nothing(&before)
}
