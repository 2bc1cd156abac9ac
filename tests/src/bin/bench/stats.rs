//! Medians, and how far they can be trusted.

/// The middle of some values; 0 without any.
pub fn median(values: &[f64]) -> f64 {
    let sorted = sorted(values);
    match sorted.len() {
        0 => 0.0,
        odd if odd % 2 == 1 => sorted[odd / 2],
        even => (sorted[even / 2 - 1] + sorted[even / 2]) / 2.0,
    }
}

/// Between which values the true median lies with a probability of at least 95 %, whatever the
/// distribution is (the sign test). With fewer than six values: all of them.
pub fn interval(values: &[f64]) -> (f64, f64) {
    let sorted = sorted(values);
    let (Some(first), Some(last)) = (sorted.first(), sorted.last()) else {
        return (0.0, 0.0);
    };
    let outside = outside(sorted.len());
    match outside {
        0 => (*first, *last),
        _ => (sorted[outside - 1], sorted[sorted.len() - outside]),
    }
}

/// The largest rank k so that the k-th value from below and from above enclose the median with
/// 95 %: twice the binomial tail below k stays at most 0.05.
fn outside(count: usize) -> usize {
    let mut tail = 0.0;
    let mut term = 0.5_f64.powi(i32::try_from(count).unwrap_or(i32::MAX));
    for rank in 0..count {
        tail += term;
        if 2.0 * tail > 0.05 {
            return rank;
        }
        term *= (count - rank) as f64 / (rank + 1) as f64;
    }
    count
}

/// One value over another, round by round.
pub fn ratios(these: &[f64], those: &[f64]) -> Vec<f64> {
    let pairs = these.iter().zip(those);
    let pairs = pairs.filter(|(_, that)| **that > 0.0);
    pairs.map(|(this, that)| this / that).collect()
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[]), 0.0);
    }

    /// The ranks of published tables of the sign test's interval.
    #[test]
    fn the_interval_has_the_ranks_of_the_sign_test() {
        assert_eq!([5, 6, 8, 9, 11, 15, 20].map(outside), [0, 1, 1, 2, 2, 4, 6]);
        let eleven: Vec<f64> = (1..=11).map(f64::from).collect();
        assert_eq!(interval(&eleven), (2.0, 10.0));
        assert_eq!(interval(&[2.0, 1.0]), (1.0, 2.0));
    }

    #[test]
    fn ratios_are_of_the_same_round() {
        assert_eq!(ratios(&[2.0, 9.0, 1.0], &[1.0, 3.0, 0.0]), [2.0, 3.0]);
    }
}
