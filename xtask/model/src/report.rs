//! How a search is told, to people and to programs.

use serde_json::json;

use crate::bounds::Bounds;
use crate::search::{Found, Verdict};

/// One line for the search, one for what it covers, one a property.
pub fn text(bounds: &Bounds, found: &Found) {
    println!(
        "{}: {} states, depth {}, {} steps, {:.1} s, {}",
        found.search,
        found.states,
        found.depth,
        found.steps,
        found.took.as_secs_f64(),
        if found.complete {
            "complete"
        } else {
            "NOT COMPLETE"
        }
    );
    println!("  within: {}", bounds.covers());
    for (property, verdict) in &found.properties {
        let word = match verdict {
            Verdict::Holds => "holds",
            Verdict::Reached => "reached",
            Verdict::NotReached => "NOT REACHED",
            Verdict::Broken(_) => "BROKEN",
        };
        println!("  {word:11} {property}");
        if let Verdict::Broken(way) = verdict {
            for (number, action) in way.iter().enumerate() {
                println!("    {:3}. {action}", number + 1);
            }
        }
    }
}

/// One object a property.
pub fn json(bounds: &Bounds, found: &Found) {
    for (property, verdict) in &found.properties {
        let (word, way) = match verdict {
            Verdict::Holds => ("holds", None),
            Verdict::Reached => ("reached", None),
            Verdict::NotReached => ("not-reached", None),
            Verdict::Broken(way) => ("broken", Some(way)),
        };
        let line = json!({
            "search": found.search,
            "within": bounds.covers(),
            "property": property,
            "verdict": word,
            "way": way,
            "states": found.states,
            "steps": found.steps,
            "depth": found.depth,
            "complete": found.complete,
            "seconds": (found.took.as_secs_f64() * 10.0).round() / 10.0,
        });
        println!("{line}");
    }
}
