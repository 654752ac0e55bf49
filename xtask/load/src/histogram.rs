//! Latencies, counted in buckets a sixty-fourth of their value wide.

/// Buckets of one power of two.
const FINE: u32 = 6;
const BUCKETS: usize = 64 << FINE;

/// How often which latency was seen.
pub struct Histogram {
    counts: Box<[u64]>,
    total: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            counts: vec![0; BUCKETS].into(),
            total: 0,
        }
    }
}

impl Histogram {
    /// Counts one latency.
    pub fn add(&mut self, nanoseconds: u64) {
        self.counts[bucket(nanoseconds)] += 1;
        self.total += 1;
    }

    /// Adds what another has counted.
    pub fn merge(&mut self, other: &Self) {
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
        self.total += other.total;
    }

    /// How many were counted.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The latency, in nanoseconds, that `parts_per_10000` of all did not
    /// exceed; 0 when nothing was counted.
    pub fn quantile(&self, parts_per_10000: u64) -> u64 {
        let rank = (self.total * parts_per_10000).div_ceil(10_000);
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank && seen > 0 {
                return ceiling(index);
            }
        }
        0
    }
}

fn bucket(value: u64) -> usize {
    let value = value.max(1 << FINE);
    let shift = value.ilog2() - FINE;
    let index = (u64::from(shift) << FINE) + (value >> shift);
    usize::try_from(index).map_or(BUCKETS - 1, |index| index.min(BUCKETS - 1))
}

/// The largest value of a bucket.
fn ceiling(index: usize) -> u64 {
    let index = index as u64;
    let shift = (index >> FINE).saturating_sub(1);
    ((index - (shift << FINE) + 1) << shift) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_right_within_two_percent() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.quantile(5_000), 0);
        for value in 1..=10_000u64 {
            histogram.add(value * 1_000);
        }
        for (quantile, expected) in [
            (5_000, 5_000_000u64),
            (9_900, 9_900_000),
            (9_990, 9_990_000),
        ] {
            let found = histogram.quantile(quantile);
            assert!(
                found >= expected && found <= expected * 102 / 100,
                "{found}"
            );
        }
        assert_eq!(histogram.total(), 10_000);
    }

    #[test]
    fn every_value_lies_below_its_buckets_ceiling_and_above_the_one_before() {
        for value in [
            64,
            65,
            127,
            128,
            129,
            1 << 20,
            (1 << 20) + 12_345,
            u64::from(u32::MAX),
        ] {
            let index = bucket(value);
            assert!(ceiling(index) >= value, "{value}");
            assert!(ceiling(index - 1) < value, "{value}");
        }
    }
}
