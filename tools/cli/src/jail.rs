//! `kata-like jail`: the system calls that each thread of a pod's jailed processes may make, and
//! why. The page `docs/jail.md` is what it prints.

use std::fmt::Write;

use kata_like_jail::lists::{PROCESSES, Process, Thread};
use kata_like_jail::seccomp::{Answer, Check, MayBe, Rule, Value};

const HEAD: &str = "\
# The system calls of VMM, fs server and proxy

`kata-like jail` prints this page. It reads the same lists as the processes do. A call that a
thread's list has not kills the process. A call stands there once for each set of arguments that it
may have. Arguments count from 1.
";

/// The page, as Markdown.
pub fn page() -> String {
    let mut page = HEAD.to_owned();
    for process in PROCESSES {
        of_process(&mut page, process);
    }
    page
}

fn of_process(page: &mut String, process: &Process) {
    // Writing to a string does not fail.
    let _ = write!(page, "\n## {}\n\n{}\n", process.name, process.when);
    let threads: Vec<_> = process.threads.iter().map(|it| (*it, it.rules())).collect();
    if let [(only, rules)] = &threads[..] {
        heading(page, only, ":");
        return table(page, rules);
    }
    let everywhere: Vec<Rule> = threads.first().map_or(Vec::new(), |(_, first)| {
        let in_all = |rule: &&Rule| threads.iter().all(|(_, rules)| rules.contains(rule));
        first.iter().filter(in_all).copied().collect()
    });
    let _ = write!(page, "\n### Every thread\n\n");
    table(page, &everywhere);
    for (thread, rules) in &threads {
        let others = threads.iter().filter(|(other, _)| other != thread);
        let others: Vec<Rule> = others.flat_map(|(_, rules)| rules).copied().collect();
        let has = |rule: &Rule| rules.iter().any(|own| own.is_like(rule));
        // One that makes the others may do what they may.
        let has_all = others.iter().all(has);
        let known = if has_all { &others } else { &everywhere };
        let own: Vec<Rule> = rules
            .iter()
            .filter(|rule| !known.iter().any(|known| known.is_like(rule)))
            .copied()
            .collect();
        let beside = match has_all {
            true => " all of the others, and:",
            false => " those of every thread, and:",
        };
        heading(page, thread, beside);
        table(page, &own);
    }
}

fn heading(page: &mut String, thread: &Thread, beside: &str) {
    let (name, calls, what) = (thread.name, thread.calls().len(), thread.what);
    let mut letters = name.chars();
    let first = letters.next().map(|it| match name.starts_with("vCPU") {
        true => it,
        false => it.to_ascii_uppercase(),
    });
    let name: String = first.into_iter().chain(letters).collect();
    let _ = write!(
        page,
        "\n### {name}: {calls} calls\n\nIt {what}. It has{beside}\n\n"
    );
}

fn table(page: &mut String, rules: &[Rule]) {
    page.push_str("| call | arguments | why |\n|---|---|---|\n");
    for rule in rules {
        let arguments = match rule.answer() {
            Answer::Allowed(checks) => {
                let all: Vec<_> = checks.iter().map(in_words).collect();
                all.join("; ")
            }
            Answer::Absent => "not made: answered with ENOSYS".to_owned(),
        };
        let _ = writeln!(
            page,
            "| `{}` | {arguments} | {} |",
            rule.name(),
            rule.reason()
        );
    }
}

fn in_words(check: &Check) -> String {
    let number = check.argument + 1;
    match check.may_be {
        MayBe::OneOf(values) => format!("{number}: {}", names(values)),
        MayBe::Masked(mask, values) => {
            format!("{number}, its bits `{}`: {}", mask.name, names(values))
        }
        MayBe::Without(bits) => format!("{number}: without {}", names(bits)),
        MayBe::OwnProcess => format!("{number}: the process itself"),
    }
}

/// A bar would end the cell of a table.
fn names(values: &[Value]) -> String {
    let names: Vec<_> = values
        .iter()
        .map(|value| format!("`{}`", value.name))
        .collect();
    names.join(", ").replace('|', "+")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_in_docs_is_what_is_printed() {
        let printed = page();
        assert!(
            printed == include_str!("../../../docs/jail.md"),
            "docs/jail.md is not what `kata-like jail` prints: print it there"
        );
    }

    /// Whatever is left out where it is said once is somewhere on the page.
    #[test]
    fn each_rule_is_on_the_page_with_its_reason() {
        let page = page();
        for thread in PROCESSES.iter().flat_map(|process| process.threads) {
            for rule in thread.rules() {
                assert!(!rule.reason().is_empty(), "{rule:?}");
                let line = format!("| `{}` |", rule.name());
                assert!(
                    page.contains(&line) && page.contains(rule.reason()),
                    "{rule:?}"
                );
            }
        }
    }
}
