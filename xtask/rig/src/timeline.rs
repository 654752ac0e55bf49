//! A story as a person reads it: what happened when, and how long it took.

use std::time::{Duration, Instant};

/// Prints lines with the time since the story's beginning.
pub struct Timeline {
    start: Instant,
}

impl Timeline {
    /// Begins a story.
    pub fn begin(title: &str) -> Self {
        println!("\n{title}\n{}", "─".repeat(title.chars().count()));
        Self {
            start: Instant::now(),
        }
    }

    /// Something happened at `place`, just now.
    pub fn note(&self, place: &str, text: &str) {
        self.line(place, text, None);
    }

    /// A step at `place` ended after `took`.
    pub fn step(&self, place: &str, text: &str, took: Duration) {
        self.line(place, text, Some(took));
    }

    /// A heading within the story.
    pub fn chapter(&self, title: &str) {
        println!("\n  {title}");
    }

    fn line(&self, place: &str, text: &str, took: Option<Duration>) {
        let since = self.start.elapsed().as_secs_f64();
        let took = took
            .map(|took| format!("{:8.1} ms", ms(took)))
            .unwrap_or_default();
        println!("  {since:8.3} s  {place:10}  {text:64} {took}");
    }
}

/// A length of time in milliseconds, to the microsecond.
pub fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// Milliseconds with one digit, for JSON.
pub fn round(ms: f64) -> f64 {
    (ms * 10.0).round() / 10.0
}
