//! One life of a pod with one fault in it: what is done, and what must follow.

use std::fmt;
use std::time::{Duration, Instant};

use kata_like_tests::process::until;
use kata_like_tests::{Aftermath, Call, CtrContainer, Host, IMAGE, Output, TestResult, failure};
use rustix::process::Signal;

use crate::shim::Shim;

const SECOND: Duration = Duration::from_secs(1);

/// The part of a life in which a point is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// `ctr run -d`: create and start.
    Start,
    /// `ctr task rm --force`: kill and delete.
    End,
}

/// A point that a shim reaches.
#[derive(Clone, Debug)]
pub struct Point {
    pub name: String,
    pub phase: Phase,
}

/// What happens there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The step fails.
    Error,
    /// The shim stands still there, and goes on.
    Sleep,
    /// The shim is killed.
    Abort,
    /// The VMM is killed while the shim stands there.
    VmmDies,
    /// The same with the fs server.
    ServerDies,
}

/// A fault.
#[derive(Clone, Debug)]
pub struct Case {
    pub kind: Kind,
    pub point: Point,
}

impl fmt::Display for Case {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "{:?} {}", self.kind, self.point.name)
    }
}

/// The points of a pod that lives undisturbed.
pub fn points_of_a_life(host: &Host, shim: &Shim) -> TestResult<Vec<Point>> {
    shim.ask_nothing();
    let pod = CtrContainer::new(host, host.name("undisturbed"));
    run(host, shim, pod.id()).ok()?;
    let start = shim.reached();
    pod.remove()?;
    let all = shim.reached();
    let named = |(index, name): (usize, &String)| Point {
        name: name.clone(),
        phase: if index < start.len() {
            Phase::Start
        } else {
            Phase::End
        },
    };
    Ok(all.iter().enumerate().map(named).collect())
}

/// From here on there are a VMM and an fs server that can die.
pub const BORN: &str = "after VMM, fs server and proxy";

/// All cases for these points. Undoing can't fail by itself; VMM and fs server die where they live.
pub fn of(points: &[Point]) -> Vec<Case> {
    let place = |name: &str| points.iter().position(|point| point.name == name);
    let born = place(BORN).unwrap_or(points.len());
    let mut all = Vec::new();
    for (index, point) in points.iter().enumerate() {
        let mut kinds = vec![Kind::Sleep, Kind::Abort];
        let leads_back = point.name != "after start in the guest";
        if point.phase == Phase::Start && leads_back || point.name == "before delete" {
            kinds.push(Kind::Error);
        }
        if point.phase == Phase::Start && index >= born {
            kinds.extend([Kind::VmmDies, Kind::ServerDies]);
        }
        all.extend(kinds.into_iter().map(|kind| Case {
            kind,
            point: point.clone(),
        }));
    }
    all
}

/// `ctr run -d` with the shim that has fail points.
fn run(host: &Host, shim: &Shim, id: &str) -> Call {
    let program = shim.program().display().to_string();
    let arguments = [
        "run",
        "-d",
        "--runtime",
        &program,
        IMAGE,
        id,
        "sleep",
        "1000",
    ];
    host.ctr(arguments)
}

/// Kills and deletes, as far as there is something.
fn force(host: &Host, id: &str) -> TestResult<Output> {
    host.ctr(["task", "rm", "--force", id])
        .deadline(60 * SECOND)
        .output()
}

impl Case {
    /// Cases that are much alike.
    pub fn group(&self) -> (Kind, Phase) {
        (self.kind, self.point.phase)
    }

    /// Lives the life with the fault, takes away what containerd still knows of it, and lives it
    /// once more without.
    pub fn run(&self, host: &Host, shim: &Shim) -> TestResult {
        let pod = CtrContainer::new(host, host.name("faulty"));
        shim.ask_nothing();
        let kind = match self.kind {
            Kind::Error => "error",
            Kind::Abort => "abort",
            Kind::Sleep | Kind::VmmDies | Kind::ServerDies => "sleep",
        };
        shim.ask(kind, &self.point.name)?;
        let faulty = match self.point.phase {
            Phase::Start => self.start(host, shim, &pod),
            Phase::End => run(host, shim, pod.id())
                .ok()
                .and_then(|_| self.end(host, shim, &pod)),
        };
        let was_there = shim.reached().contains(&self.point.name);
        shim.wake();
        faulty?;
        if !was_there {
            return Err(failure("the shim has not come to that point"));
        }
        // containerd's own clean-up after a dead shim goes on beside this.
        until("the task is gone", 10 * SECOND, || {
            force(host, pod.id()).is_ok() && pod.status().is_err()
        })?;
        let id = pod.id().to_owned();
        pod.remove_container()?;
        shim.ask_nothing();
        let again = CtrContainer::new(host, id);
        run(host, shim, again.id()).ok()?;
        again.remove()
    }

    /// The fault comes in `ctr run -d`.
    fn start(&self, host: &Host, shim: &Shim, pod: &CtrContainer) -> TestResult {
        match self.kind {
            Kind::Error => {
                let output = run(host, shim, pod.id()).output()?;
                let point = format!("fail point \\\"{}\\\"", self.point.name);
                let plain = format!("fail point {:?}", self.point.name);
                Aftermath::one_error(&output, &[&plain])
                    .or_else(|_| Aftermath::one_error(&output, &[&point]))
            }
            Kind::Abort => match run(host, shim, pod.id()).output()? {
                output if output.status == 0 => Err(failure("a dead shim has started a task")),
                _ => Ok(()),
            },
            _ => {
                let mut call = run(host, shim, pod.id()).spawn()?;
                let stood = self
                    .stands(shim)
                    .and_then(|()| answers(host))
                    .and_then(|()| self.kill(pod));
                let killed = Instant::now();
                shim.wake();
                let status = call.wait()?;
                stood?;
                if self.kind == Kind::Sleep {
                    return match status.success() {
                        true => Ok(()),
                        false => Err(failure("the shim did not go on")),
                    };
                }
                // The start fails, or the task has an end that is told.
                if status.success() {
                    pod.wait_status("STOPPED", 2 * SECOND)?;
                }
                match kata_like_tests::in_time(killed.elapsed(), 5 * SECOND) {
                    true => Ok(()),
                    false => Err(failure(format!("told after {:?}", killed.elapsed()))),
                }
            }
        }
    }

    /// The fault comes in `ctr task rm --force`.
    fn end(&self, host: &Host, shim: &Shim, pod: &CtrContainer) -> TestResult {
        match self.kind {
            Kind::Error => {
                let output = force(host, pod.id())?;
                match output.status {
                    0 => Err(failure("a deletion that fails was answered as done")),
                    _ => Ok(()),
                }
            }
            // containerd's own `delete` takes over: what it answers is told by the aftermath.
            Kind::Abort => force(host, pod.id()).map(drop),
            _ => {
                let arguments = ["task", "rm", "--force", pod.id()];
                let mut call = host.ctr(arguments).spawn()?;
                let stood = self.stands(shim).and_then(|()| answers(host));
                shim.wake();
                let _ = call.wait()?;
                stood
            }
        }
    }

    /// Waits until the shim is at the point.
    fn stands(&self, shim: &Shim) -> TestResult {
        until("the shim is at the point", 60 * SECOND, || {
            shim.reached().contains(&self.point.name)
        })
    }

    fn kill(&self, pod: &CtrContainer) -> TestResult {
        let role = match self.kind {
            Kind::VmmDies => "vmm",
            Kind::ServerDies => "fsd",
            _ => return Ok(()),
        };
        pod.process(role)?.signal(Signal::KILL)
    }
}

/// containerd answers while a shim stands still.
fn answers(host: &Host) -> TestResult {
    let list = host.ctr(["task", "ls"]).deadline(20 * SECOND);
    list.ok().map(drop)
}
