//! What the examples are told: the lines of their standard input.

use std::io::BufRead;

use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

/// The lines, as they come; none any more when the input has ended.
pub fn lines() -> UnboundedReceiver<String> {
    let (said, lines) = unbounded_channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if said.send(line).is_err() {
                return;
            }
        }
    });
    lines
}
