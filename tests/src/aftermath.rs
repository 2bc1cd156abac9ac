//! What must hold after every fault, whatever it was: nothing of the pod is left, its end was told
//! in time, the caller has one error that says why, and a neighbour has not noticed.
//!
//! `docs/faults.md` lists the faults.

use std::time::{Duration, Instant};

use crate::ctr::Output;
use crate::ctr_container::CtrContainer;
use crate::events::{Event, Events};
use crate::footprint::Footprint;
use crate::host::Host;
use crate::process::until;
use crate::{TestResult, failure, in_time};

/// The neighbour writes a file, reads it back and compares, again and again. Anything else than
/// what it wrote ends it.
const NEIGHBOUR: &str = "i=0; while :; do i=$((i+1)); seq $i $((i+2000)) >/tmp/file; \
    test $(tail -n 1 /tmp/file) = $((i+2000)) && \
    test \"$(sha256sum </tmp/file)\" = \"$(seq $i $((i+2000)) | sha256sum)\" || exit 9; \
    echo $i >/tmp/rounds; sleep 0.5; done";

/// How long the neighbour may take for a round.
const ROUND: Duration = Duration::from_secs(20);

/// A host before a fault, and a neighbour that is at work meanwhile.
pub struct Aftermath<'host> {
    host: &'host Host,
    before: Footprint,
    neighbour: CtrContainer<'host>,
}

impl<'host> Aftermath<'host> {
    /// Starts the neighbour and looks at the host. The host is to be the caller's alone.
    pub fn expect(host: &'host Host) -> TestResult<Self> {
        let neighbour = host.start("neighbour", &[], &["sh", "-c", NEIGHBOUR])?;
        let aftermath = Self {
            host,
            before: host.footprint(),
            neighbour,
        };
        aftermath.neighbour_is_well()?;
        Ok(aftermath)
    }

    /// Waits for the exit event of a container's init, which must come within this time of `since`
    /// and say that it was killed. Answers the time.
    pub fn killed_within(
        events: &Events,
        id: &str,
        since: Instant,
        within: Duration,
    ) -> TestResult<Duration> {
        let exit: Event = events.exit(id, id, within.max(Duration::from_secs(1)) * 10)?;
        let took = exit.at.saturating_duration_since(since);
        if exit.status() != 137 {
            return Err(failure(format!("{id} has not ended by a kill: {exit:?}")));
        }
        match in_time(took, within) {
            true => Ok(took),
            false => Err(failure(format!("exit of {id} after {took:?}"))),
        }
    }

    /// The call has failed with one line that has all of these words.
    pub fn one_error(output: &Output, words: &[&str]) -> TestResult {
        let text = output.error_text();
        let fits = output.status != 0
            && text.lines().count() == 1
            && words.iter().all(|word| text.contains(word));
        match fits {
            true => Ok(()),
            false => Err(failure(format!(
                "no single line with {words:?}, but exit code {} and {text:?}",
                output.status
            ))),
        }
    }

    /// Within five seconds nothing but the neighbour is on the host; and it goes on.
    pub fn holds(&self) -> TestResult {
        self.host.leaves_nothing(&self.before)?;
        self.neighbour_is_well()
    }

    /// The last look: the neighbour goes, too.
    pub fn end(self) -> TestResult {
        self.holds()?;
        self.neighbour.remove()
    }

    fn neighbour_is_well(&self) -> TestResult {
        let rounds = || -> TestResult<u64> {
            let said = self.neighbour.exec(&["cat", "/tmp/rounds"])?.text();
            Ok(said.parse().unwrap_or(0))
        };
        let before = rounds()?;
        until("the neighbour does a round", ROUND, || {
            rounds().is_ok_and(|now| now > before)
        })
        .map_err(|error| match self.neighbour.status() {
            Ok((status, _)) => failure(format!("{error}: it is {status}")),
            Err(gone) => failure(format!("{error}: {gone}")),
        })
    }
}
