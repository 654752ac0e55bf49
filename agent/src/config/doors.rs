//! The decoder of this room, for the fuzzer (see `crate::doors`).

use super::{Config, Options, Role};
use crate::doors::Door;

/// It.
pub const ALL: [Door; 1] = [file];

/// A configuration file.
fn file(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return false;
    };
    let resolved = [Role::Agent, Role::Controller, Role::Standalone].map(|role| {
        let options = toml::from_str::<Options>(text).ok()?;
        Config::resolve(options, role).ok()
    });
    resolved.iter().any(Option::is_some)
}
