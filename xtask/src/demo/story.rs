//! The story that the demo tells.

use anyhow::{Result, bail};
use serde_json::Value;

use super::scene::Scene;

/// Tells the story on the stage that was set, and gives its outcome.
pub fn tell(scene: &Scene) -> Result<Value> {
    bail!(
        "this checkout's demo has a stage ({} on {}, emulated: {}, logs in {}, work in {}) and no story yet",
        scene.drover.display(),
        scene.pool.display(),
        scene.emulated,
        scene.results.display(),
        scene.work.display()
    )
}
