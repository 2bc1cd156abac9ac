//! What is looked at during attacks: the VMM, the fs server, a neighbour, the host's files.

use std::fs;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use kata_like_boot::{End, PrintkLayout};
use kata_like_limits::{Patience, in_time};
use kata_like_raw_guest::{report, sums};

use crate::parts::guest::{Guest, Setup};
use crate::parts::server::FsServer;
use crate::parts::{SECOND, cpio, temporary};
use crate::tree::Trees;

/// The most anonymous memory of a VMM, in KiB.
const VMM_MOST: u64 = 24 << 10;

/// The most anonymous memory of an fs server, in KiB.
const FSD_MOST: u64 = 48 << 10;

/// How long a case may take. Each takes a fraction of it.
const CASE: Duration = Duration::from_secs(120);

/// So many wrong things are enough: the guest waits long for what does not come.
const MANY: usize = 5;

/// How often the guest's log and the processes are looked at.
const LOOK: Duration = Duration::from_millis(20);

/// How long the VMM may take for a look at the guest's log, which holds up its event loop: it is
/// built without optimisation here.
const PASS: Duration = Duration::from_secs(4);

/// How long the neighbour may take for a sum.
const SUM: Duration = Duration::from_secs(5);

/// A raw guest with this command.
pub fn guest(command: &str, mut setup: Setup) -> Guest {
    let image = std::env::var_os("KATA_LIKE_RAW_GUEST");
    let image = image.expect("KATA_LIKE_RAW_GUEST names the image");
    setup.initrd = cpio(&[("command", 0o100644, command.as_bytes())]);
    setup.memory_mib = 64;
    setup.layout = Some(layout());
    let image: OwnedFd = fs::File::open(image).unwrap().into();
    let mut guest = Guest::start_with(&setup, image, temporary(&setup.initrd));
    guest.wait_until_running();
    guest
}

/// Where the raw guest keeps its log.
fn layout() -> PrintkLayout {
    PrintkLayout {
        prb: report::POINTER,
        desc_ring: 0,
        text_ring: report::TEXT_RING,
        count_bits: report::COUNT_BITS,
        descs: report::DESCRIPTORS,
        infos: report::INFOS,
        head_id: report::HEAD,
        tail_id: report::TAIL,
        size_bits: report::SIZE_BITS,
        data: report::DATA,
        desc_size: report::DESCRIPTOR_SIZE,
        desc_state: 0,
        desc_begin: 8,
        desc_next: 16,
        info_size: report::INFO_SIZE,
        info_seq: 0,
        info_time: 8,
        info_text_len: 16,
        info_level: 19,
    }
}

/// A neighbour at work, and the host's files as they were.
pub struct World {
    neighbour: Guest,
    rounds: u64,
    summed: Instant,
    /// The host's own files, and those of a share; each with its hash before.
    host: (Trees, u64),
    shared: Option<(Trees, u64)>,
    /// What the guest has found wrong.
    wrong: Vec<String>,
    attack: String,
    asked: Option<Patience>,
    attacks: usize,
    /// The most anonymous memory that was seen, in KiB: the VMM's and the fs server's.
    most: [u64; 2],
    begun: Instant,
}

/// How a guest has come to its end.
pub struct Over {
    pub end: End,
    /// It has done all that it was to do.
    pub done: bool,
    /// The number of its last attack.
    pub last: u64,
}

impl World {
    /// Starts the neighbour.
    pub fn new() -> Self {
        let host = Trees::of_the_host();
        let before = host.hash();
        let mut world = Self {
            neighbour: guest("sums 0 0", Setup::new(Vec::new(), 1)),
            rounds: 0,
            summed: Instant::now(),
            host: (host, before),
            shared: None,
            wrong: Vec::new(),
            attack: String::new(),
            asked: None,
            attacks: 0,
            most: [0; 2],
            begun: Instant::now(),
        };
        let patience = Patience::new(SUM);
        while world.rounds == 0 {
            assert!(!patience.is_over(), "the neighbour does not begin");
            world.look_at_neighbour();
        }
        world
    }

    /// The files of a share that were looked at are as they were. From now on looks at these.
    pub fn look_at_files(&mut self, trees: Trees) {
        let before = trees.hash();
        if let Some((trees, before)) = self.shared.replace((trees, before)) {
            assert_eq!(trees.hash(), before, "files beside the share changed");
        }
    }

    /// Looks at everything until the guest ends.
    pub fn follow(&mut self, guest: &mut Guest, server: Option<&FsServer>) -> Over {
        let patience = Patience::new(CASE);
        let (mut done, mut last) = (false, 0);
        loop {
            let asked = Instant::now();
            let news = guest.news();
            let (text, end) = match news {
                Ok(text) => (text, None),
                Err(end) => (end.log.clone(), Some(end)),
            };
            // The last report follows looks at all of the log, when nobody waits any more.
            let in_time = end.is_some() || in_time(asked.elapsed(), PASS);
            assert!(in_time, "{}", self.where_it_is());
            for line in text.lines() {
                let said = line.split_once("] ").map_or(line, |(_, said)| said);
                println!("{:?} {line}", self.begun.elapsed());
                done |= said == "done";
                last = self.hear(said).unwrap_or(last);
            }
            if let Some(end) = end {
                self.expect_exit(guest, &end);
                return Over { end, done, last };
            }
            self.look_at_memory(guest.vmm.id(), 0, VMM_MOST);
            if let Some(server) = server {
                self.look_at_memory(server.pid(), 1, FSD_MOST);
            }
            self.look_at_neighbour();
            assert!(!patience.is_over(), "too long: {}", self.where_it_is());
            std::thread::sleep(LOOK);
        }
    }

    /// All that was seen was right.
    pub fn judge(mut self, case: &str) {
        let rounds = self.rounds;
        let patience = Patience::new(SUM);
        while self.rounds == rounds && !patience.is_over() {
            self.look_at_neighbour();
        }
        println!(
            "{case}: {} attacks in {:?}; the VMM had {} KiB at most, the fs server {} KiB; the \
            neighbour made {} sums",
            self.attacks,
            self.begun.elapsed(),
            self.most[0],
            self.most[1],
            self.rounds
        );
        assert!(self.wrong.is_empty(), "{case}: {:#?}", self.wrong);
        assert!(self.rounds > rounds, "the neighbour does not go on");
        for (trees, before) in self.shared.iter().chain([&self.host]) {
            assert_eq!(trees.hash(), *before, "the host's files changed");
        }
    }

    /// Takes a line of the guest's; gives the number of the attack that begins with it.
    fn hear(&mut self, said: &str) -> Option<u64> {
        if said.contains("wrong:") || said.starts_with("panic:") {
            self.wrong.push(format!("{}: {said}", self.where_it_is()));
            assert!(self.wrong.len() < MANY, "{:#?}", self.wrong);
        }
        let words: Vec<&str> = said.split(' ').collect();
        match words[..] {
            ["asks", ..] => self.asked = Some(Patience::new(SECOND)),
            ["answered", ..] => self.take_answer(),
            ["attack", number, ..] => {
                self.attacks += 1;
                self.attack = said.to_owned();
                return number.parse().ok();
            }
            _ => {}
        }
        None
    }

    /// A request by the book has been answered.
    fn take_answer(&mut self) {
        if self.asked.take().is_some_and(|asked| asked.is_over()) {
            let late = format!("{}: answered after more than a second", self.where_it_is());
            self.wrong.push(late);
        }
    }

    fn where_it_is(&self) -> String {
        format!("attack {} ({})", self.attacks, self.attack)
    }

    /// The process ends by itself, with the status that belongs to its last report.
    fn expect_exit(&self, guest: &mut Guest, end: &End) {
        let status = guest.vmm.wait().unwrap();
        let expected = i32::from(end.reason.exit_status());
        let at = self.where_it_is();
        assert_eq!(status.code(), Some(expected), "{at}: {status}, {end:?}");
        assert!(!end.detail.contains("panicked"), "{at}: {end:?}");
    }

    fn look_at_memory(&mut self, pid: u32, whose: usize, most: u64) {
        // A process that has just ended has none.
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:"));
        let number = line.and_then(|line| line.split_whitespace().next());
        let held: u64 = number.map_or(0, |number| number.parse().unwrap());
        self.most[whose] = self.most[whose].max(held);
        assert!(held <= most, "{held} KiB: {}", self.where_it_is());
    }

    fn look_at_neighbour(&mut self) {
        let text = self.neighbour.news().unwrap();
        for line in text.lines().filter(|line| line.contains("] sum ")) {
            let (_, said) = line.split_once("] sum ").unwrap();
            let (round, sum) = said.split_once(' ').unwrap();
            assert_eq!(
                sum,
                format!("{:x}", sums::right()),
                "{}",
                self.where_it_is()
            );
            self.rounds = round.parse().unwrap();
            self.summed = Instant::now();
        }
        let waited = self.summed.elapsed();
        assert!(
            in_time(waited, SUM),
            "no sum for {waited:?}: {}",
            self.where_it_is()
        );
    }
}
