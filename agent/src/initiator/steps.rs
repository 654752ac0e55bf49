//! Where the time of an operation went: the kernel's and the tools' share of
//! it told apart from drover's own.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// The steps of one operation.
#[derive(Debug)]
pub(super) struct Steps {
    started: Instant,
    done: Vec<(&'static str, Duration, bool)>,
}

impl Steps {
    /// Begins now.
    pub(super) fn begin() -> Self {
        Self {
            started: Instant::now(),
            done: Vec::new(),
        }
    }

    /// A kernel call or a tool took this long. What it cost to start the child
    /// is not in it, and so is drover's own.
    pub(super) fn kernel(&mut self, what: &'static str, took: Duration) {
        self.done.push((what, took, true));
    }

    /// Something else that is worth a line took this long.
    pub(super) fn own(&mut self, what: &'static str, took: Duration) {
        self.done.push((what, took, false));
    }

    /// How long it has been since the beginning.
    pub(super) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// The steps and the total, in milliseconds, for a note.
    pub(super) fn detail(&self) -> Value {
        let ms = |d: Duration| (d.as_secs_f64() * 1e6).round() / 1e3;
        let steps: Vec<Value> = self
            .done
            .iter()
            .map(|(what, took, kernel)| {
                json!({"what": what, "ms": ms(*took), "kernel_or_tool": kernel})
            })
            .collect();
        json!({"steps": steps, "total_ms": ms(self.elapsed())})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_tells_the_kernels_share() {
        let mut steps = Steps::begin();
        steps.kernel("connect", Duration::from_micros(12_345));
        steps.own("controller", Duration::from_millis(1));
        let detail = steps.detail();
        assert_eq!(
            detail["steps"][0],
            json!({"what": "connect", "ms": 12.345, "kernel_or_tool": true})
        );
        assert_eq!(detail["steps"][1]["kernel_or_tool"], false);
        assert!(detail["total_ms"].as_f64().is_some());
    }
}
