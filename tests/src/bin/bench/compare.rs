//! Two files of results side by side: what has become faster or slower against runc.

use std::fmt::Write;

use crate::results::{BASE, Measure, OURS, Results};
use crate::stats::{interval, median, ratios};

/// A table: each measure's ratio to runc before and now. A change is marked where the intervals do
/// not meet.
pub fn table(old: &Results, new: &Results) -> String {
    let mut text = format!("{:<58} {:>7} {:>7}\n", "against runc", "before", "now");
    for now in &new.measures {
        let same = |it: &&Measure| it.group == now.group && it.name == now.name;
        let Some(before) = old.measures.iter().find(same) else {
            continue;
        };
        let (before, now_all) = (of_ours(before), of_ours(now));
        if before.is_empty() || now_all.is_empty() {
            continue;
        }
        let (was, is) = (interval(&before), interval(&now_all));
        let word = match () {
            () if is.1 < was.0 => "  faster",
            () if is.0 > was.1 => "  slower",
            () => "",
        };
        let name = format!("{}: {}", now.group, now.name);
        let (before, now) = (median(&before), median(&now_all));
        let _ = writeln!(text, "{name:<58} {before:>7.2} {now:>7.2}{word}");
    }
    text
}

/// kata-like's values over runc's.
pub fn of_ours(measure: &Measure) -> Vec<f64> {
    let of = |name: &str| measure.values.get(name).map_or(&[][..], Vec::as_slice);
    ratios(of(OURS), of(BASE))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::Of;

    fn results(ours: &[f64]) -> Results {
        let mut results = Results::default();
        let of = Of {
            group: "one container",
            name: "start",
            unit: "ms",
        };
        for value in ours {
            results.add(&of, OURS, *value);
            results.add(&of, BASE, 2.0);
        }
        results
    }

    #[test]
    fn a_change_counts_when_the_intervals_do_not_meet() {
        let slow = results(&[4.0, 4.1, 4.2, 4.0, 4.1, 4.2]);
        let fast = results(&[2.0, 2.1, 2.2, 2.0, 2.1, 2.2]);
        assert!(
            table(&slow, &fast).contains("2.05    1.05  faster"),
            "{}",
            table(&slow, &fast)
        );
        assert!(table(&fast, &slow).contains("slower"));
        let wide = results(&[1.0, 4.1, 9.0, 4.0, 2.0, 3.0]);
        let same = table(&slow, &wide);
        assert!(
            !same.contains("faster") && !same.contains("slower"),
            "{same}"
        );
    }
}
