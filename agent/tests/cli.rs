//! The verbs as a shell meets them.

use std::process::{Command, Stdio};

/// `drover doctor | true`: what it prints has no reader any more.
#[test]
fn a_reader_that_has_gone_ends_a_verb_quietly() {
    let (read, write) = std::io::pipe().unwrap();
    drop(read);
    let doctor = Command::new(env!("CARGO_BIN_EXE_drover"))
        .args(["doctor", "--json"])
        .stdout(write)
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&doctor.stderr);
    assert_eq!(doctor.status.code(), Some(128 + 13), "{said}");
    assert!(!said.contains("panicked"), "{said}");
}
