//! Values of several runs, as medians and ratios.

use anyhow::Result;
use serde::Serialize;

use crate::say;

/// One figure, as `--json` prints it.
#[derive(Debug, Serialize, PartialEq)]
pub struct Figure {
    /// Its name.
    pub figure: String,
    /// What it counts.
    pub unit: String,
    /// drover's median.
    pub drover: f64,
    /// Whom it is compared with.
    pub peer: String,
    /// The peer's median.
    pub peer_value: f64,
    /// drover's by the peer's.
    pub ratio: f64,
    /// Runs of each side.
    pub runs: usize,
}

impl Figure {
    /// The figure of two sides' values; none when a side has none, or the
    /// peer's median is nothing to divide by.
    pub fn of(
        figure: &str,
        unit: &str,
        drover: &[f64],
        peer: &str,
        values: &[f64],
    ) -> Option<Self> {
        let runs = drover.len().min(values.len());
        Self::between(figure, unit, median(drover)?, peer, median(values)?, runs)
    }

    /// The figure of two values, each of so many runs; none when the peer's is
    /// nothing to divide by.
    pub fn between(
        figure: &str,
        unit: &str,
        ours: f64,
        peer: &str,
        theirs: f64,
        runs: usize,
    ) -> Option<Self> {
        (theirs != 0.0).then(|| Self {
            figure: figure.to_owned(),
            unit: unit.to_owned(),
            drover: rounded(ours),
            peer: peer.to_owned(),
            peer_value: rounded(theirs),
            ratio: rounded(ours / theirs),
            runs,
        })
    }

    /// The figure as a line of a table.
    pub fn line(&self) -> String {
        format!(
            "{:<38} {:>12} {:<6} {:>14} {:>12} {:>8.2}",
            self.figure,
            short(self.drover),
            self.unit,
            self.peer,
            short(self.peer_value),
            self.ratio
        )
    }

    /// The table's head.
    pub fn head() -> String {
        format!(
            "{:<38} {:>12} {:<6} {:>14} {:>12} {:>8}",
            "figure", "drover", "unit", "peer", "peer's", "ratio"
        )
    }
}

/// Prints a table of the figures and, if asked for, each as a line of JSON.
pub fn print(figures: &[Figure], json: bool) -> Result<()> {
    say::title(&Figure::head());
    for figure in figures {
        println!("{}", figure.line());
    }
    if json {
        for figure in figures {
            println!("{}", serde_json::to_string(figure)?);
        }
    }
    Ok(())
}

/// The smallest value that this part of all values does not exceed.
pub fn percentile(values: &[f64], part: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let place = (part * sorted.len() as f64).ceil() as usize;
    sorted.get(place.saturating_sub(1)).copied()
}

/// The value in the middle; of an even number, the mean of the two.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let upper = sorted.get(middle)?;
    if sorted.len() % 2 == 1 {
        return Some(*upper);
    }
    Some((sorted[middle - 1] + upper) / 2.0)
}

fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

fn short(value: f64) -> String {
    if value >= 100.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.1}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_or_the_mean_of_two() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 100.0, 1.0]), Some(3.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 9.0]), Some(3.0));
    }

    #[test]
    fn a_percentile_is_one_of_the_values() {
        let values: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(percentile(&values, 0.5), Some(50.0));
        assert_eq!(percentile(&values, 0.99), Some(99.0));
        assert_eq!(percentile(&[7.0], 0.99), Some(7.0));
        assert_eq!(percentile(&[], 0.5), None);
    }

    #[test]
    fn a_figure_has_the_fields_that_readers_ask_for_and_no_more() {
        let figure = Figure::of("a", "IOPS", &[30.0, 10.0], "tgt", &[8.0, 8.0, 9.0]).unwrap();
        assert_eq!(
            serde_json::to_string(&figure).unwrap(),
            r#"{"figure":"a","unit":"IOPS","drover":20.0,"peer":"tgt","peer_value":8.0,"ratio":2.5,"runs":2}"#
        );
        assert_eq!(Figure::of("a", "IOPS", &[1.0], "tgt", &[0.0]), None);
        assert_eq!(Figure::of("a", "IOPS", &[1.0], "tgt", &[]), None);
    }
}
