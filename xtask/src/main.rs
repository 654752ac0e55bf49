//! drover's developer commands.
fn main() {}
