//! `docs/performance.md` and its plot, made from results: a table for each subject, and bars of
//! the ratios to runc.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use kata_like_tests::TestResult;

use crate::compare::of_ours;
use crate::results::{BASE, Measure, OURS, Results};
use crate::stats::{interval, median};

/// Writes both into a folder.
pub fn write(results: &Results, folder: &Path) -> TestResult {
    fs::write(folder.join("performance.md"), page(results))?;
    fs::write(folder.join("performance.svg"), plot(results))?;
    Ok(())
}

fn page(results: &Results) -> String {
    let mut text = String::from(
        "# Performance\n\n\
         `make bench` measures all runtimes in turn, in one run on one host, and makes this page of\n\
         the results. Each value is the median of all rounds. \"× runc\" is the median of the ratios\n\
         to runc in the same round, with the interval that holds the true one with 95 %. Less is\n\
         better everywhere.\n\n",
    );
    let host = &results.host;
    let rounds = results.measures.iter().flat_map(|it| it.values.values());
    let rounds = rounds.map(Vec::len).max().unwrap_or(0);
    let _ = writeln!(
        text,
        "This run: {rounds} rounds on Linux {}, {} CPU(s), {}.",
        host.kernel, host.cpus, host.cpu
    );
    if host.emulated {
        text += "\n**The host's CPU was emulated.** A virtual machine costs more there than on hardware: each exit is\n\
                 a long way through the emulator, and so is each page fault of a guest. The ratios are good for a\n\
                 comparison with another run on such a host, and say little about hardware.\n";
    }
    text += "\n| runtime | version |\n|---|---|\n";
    for runtime in &results.runtimes {
        let _ = writeln!(text, "| {} | {} |", runtime.name, runtime.version);
    }
    for (name, why) in &results.missing {
        let _ = writeln!(text, "| {name} | not measured: {why} |");
    }
    text += "\n![ratios to runc](performance.svg)\n";
    for group in groups(results) {
        let _ = writeln!(text, "\n## {}\n", capitalised(group));
        table(results, group, &mut text);
    }
    text
}

fn table(results: &Results, group: &str, text: &mut String) {
    text.push_str("| |");
    for runtime in &results.runtimes {
        let _ = write!(text, " {} |", runtime.name);
    }
    text.push_str(" × runc |\n|---|");
    text.push_str(&"---:|".repeat(results.runtimes.len() + 1));
    text.push('\n');
    for measure in results.measures.iter().filter(|it| it.group == group) {
        let _ = write!(text, "| {} [{}] |", measure.name, measure.unit);
        for runtime in &results.runtimes {
            let values = measure.values.get(&runtime.name);
            let value = values.map_or("–".into(), |values| number(median(values)));
            let _ = write!(text, " {value} |");
        }
        let _ = writeln!(text, " {} |", ratio(measure));
    }
}

fn ratio(measure: &Measure) -> String {
    let ratios = of_ours(measure);
    let (low, high) = interval(&ratios);
    match ratios.len() {
        0 => "–".into(),
        1 => number(median(&ratios)),
        _ => format!(
            "{} ({} to {})",
            number(median(&ratios)),
            number(low),
            number(high)
        ),
    }
}

/// Three digits.
fn number(value: f64) -> String {
    match value.abs() {
        large if large >= 100.0 => format!("{value:.0}"),
        middle if middle >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

fn groups(results: &Results) -> Vec<&str> {
    let mut groups: Vec<&str> = Vec::new();
    for measure in &results.measures {
        if !groups.contains(&measure.group.as_str()) {
            groups.push(&measure.group);
        }
    }
    groups
}

fn capitalised(text: &str) -> String {
    let mut letters = text.chars();
    let first = letters.next().into_iter().flat_map(char::to_uppercase);
    first.chain(letters).collect()
}

const WIDTH: f64 = 760.0;
const NAMES: f64 = 330.0;
const ROW: f64 = 22.0;

/// A bar for each ratio, on a logarithmic axis, with a line at runc's 1.
fn plot(results: &Results) -> String {
    let measures = results.measures.iter();
    let measures =
        measures.filter(|it| it.values.contains_key(BASE) && it.values.contains_key(OURS));
    let rows: Vec<_> = measures
        .map(|it| (format!("{}: {}", it.group, it.name), of_ours(it)))
        .collect();
    let all = rows.iter().flat_map(|(_, ratios)| ratios.iter().copied());
    let (low, high) = all.fold((0.5_f64, 2.0_f64), |(low, high), it| {
        (low.min(it), high.max(it))
    });
    let place = |ratio: f64| {
        let share = (ratio.max(low) / low).ln() / (high / low).ln();
        NAMES + share * (WIDTH - NAMES - 60.0)
    };
    let height = ROW * (rows.len() as f64 + 1.5);
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height:.0}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    let one = place(1.0);
    for (index, (name, ratios)) in rows.iter().enumerate() {
        let top = ROW * (index as f64 + 0.5);
        let middle = median(ratios);
        let (from, to) = (one.min(place(middle)), one.max(place(middle)));
        let colour = if middle <= 1.0 { "#2a7" } else { "#c60" };
        let (text_y, bar, right) = (top + 14.0, ROW - 8.0, to + 4.0);
        let _ = writeln!(
            text,
            "<text x=\"{:.0}\" y=\"{text_y:.0}\" text-anchor=\"end\">{name}</text>\
             <rect x=\"{from:.1}\" y=\"{:.0}\" width=\"{:.1}\" height=\"{bar}\" fill=\"{colour}\"/>\
             <text x=\"{right:.0}\" y=\"{text_y:.0}\">{}</text>",
            NAMES - 8.0,
            top + 3.0,
            (to - from).max(1.0),
            number(middle)
        );
    }
    let (bottom, label) = (height - ROW, height - 8.0);
    let _ = writeln!(
        text,
        "<line x1=\"{one:.1}\" x2=\"{one:.1}\" y1=\"4\" y2=\"{bottom:.0}\" stroke=\"black\"/>\
         <text x=\"{one:.1}\" y=\"{label:.0}\" text-anchor=\"middle\">runc = 1</text>\n</svg>"
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::{Of, Runtime};

    fn results() -> Results {
        let mut results = Results::default();
        for name in [BASE, OURS] {
            results.runtimes.push(Runtime {
                name: name.into(),
                version: "1".into(),
            });
        }
        let of = Of {
            group: "one container",
            name: "start",
            unit: "ms",
        };
        for (ours, base) in [(30.0, 20.0), (45.0, 30.0), (300.0, 200.0)] {
            results.add(&of, OURS, ours);
            results.add(&of, BASE, base);
        }
        results
    }

    #[test]
    fn the_page_has_medians_and_ratios_of_the_same_round() {
        let page = page(&results());
        let line = "| start [ms] | 30.0 | 45.0 | 1.50 (1.50 to 1.50) |";
        assert!(page.contains(line), "{page}");
        assert!(page.contains("## One container"));
        assert!(!page.contains("emulated"));
    }

    #[test]
    fn the_plot_has_a_bar_for_each_measure() {
        let plot = plot(&results());
        assert!(
            plot.contains("one container: start") && plot.contains(">1.50<"),
            "{plot}"
        );
        assert_eq!(plot.matches("<rect").count(), 2); // the background, and one bar
    }
}
