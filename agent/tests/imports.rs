//! The import rule of the design: which module of drover may use which.
//!
//! It keeps decisions apart from wires and disks: the arbiter sees ports and
//! the store only, a protocol sees block devices only. Code under `cfg(test)`
//! may use more.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// What a module may use: itself, these, and of a `module::part` only that part.
/// A module that is not listed here is refused, so that a new one is thought about.
const ALLOWED: &[(&str, &[&str])] = &[
    ("ids", &[]),
    ("joined", &[]),
    ("config", &["csi", "reactor", "evidence::tools", "ids"]),
    ("store", &["ids"]),
    ("attach", &["ids", "store"]),
    ("csi", &["attach", "store", "ids"]),
    ("block", &["ids"]),
    ("reactor", &["block", "ids"]),
    ("nvme_tcp", &["reactor", "block", "ids"]),
    ("iscsi", &["reactor", "block", "ids"]),
    (
        "export",
        &[
            "nvme_tcp",
            "iscsi",
            "reactor",
            "block",
            "attach::ports",
            "ids",
        ],
    ),
    ("pool", &["block", "attach::ports", "ids"]),
    ("home", &["pool", "export", "block", "attach::ports", "ids"]),
    (
        "initiator",
        &[
            "attach::ports",
            "fence::shutdown",
            "block",
            "pool",
            "joined",
            "ids",
        ],
    ),
    ("evidence", &["attach::ports", "block", "pool", "ids"]),
    ("fence", &["attach::ports", "evidence::btf", "ids"]),
    ("backup", &["attach::ports", "block", "pool", "ids"]),
    (
        "rpc",
        &["attach", "home", "backup", "csi::status", "joined", "ids"],
    ),
    ("cli", &["config", "rpc", "ids"]),
    ("daemon", &["*"]),
    ("metrics", &["*"]),
    ("lib", &["*"]),
    ("main", &["*"]),
];

#[test]
fn modules_use_only_what_they_may() {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut broken = Vec::new();
    let mut seen = 0;
    for file in rust_files(&sources) {
        let name = file.strip_prefix(&sources).expect("listed under src");
        // Tests in a file of their own are cfg(test) where they are declared, and
        // `doors`, which the fuzzer comes in by, are cfg(any(test, fuzzing)).
        if is_test_file(name) {
            continue;
        }
        let module = top_module(name);
        let Some((_, allowed)) = ALLOWED.iter().find(|(known, _)| *known == module) else {
            broken.push(format!(
                "src/{}: module {module} has no rule",
                name.display()
            ));
            continue;
        };
        let text = fs::read_to_string(&file).expect("read a source file");
        for (line, path) in crate_paths(&without_tests(&plain(&text)), depth(name)) {
            seen += 1;
            if !may(&module, allowed, &path) {
                broken.push(format!(
                    "src/{}:{line}: {module} uses crate::{path}; it may use {}",
                    name.display(),
                    allowed.join(", ")
                ));
            }
        }
    }
    assert!(
        broken.is_empty(),
        "the import rule is broken:\n{}\n",
        broken.join("\n")
    );
    assert!(
        seen > 0,
        "no use of another module was found at all: the parser is broken"
    );
}

fn may(module: &str, allowed: &[&str], path: &str) -> bool {
    let within = |part: &str| path == part || path.starts_with(&format!("{part}::"));
    within(module) || allowed.iter().any(|part| *part == "*" || within(part))
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)
        .expect("list a source folder")
        .flatten()
    {
        let path = entry.path();
        if path.is_dir() {
            found.extend(rust_files(&path));
        } else if path.extension().is_some_and(|kind| kind == "rs") {
            found.push(path);
        }
    }
    found.sort();
    found
}

fn is_test_file(name: &Path) -> bool {
    name.iter().filter_map(|part| part.to_str()).any(|part| {
        let stem = part.trim_end_matches(".rs");
        stem == "tests"
            || stem == "doors"
            || stem.ends_with("_tests")
            || stem.ends_with("_for_tests")
    })
}

/// `export` of `export/live.rs`, `ids` of `ids.rs`.
fn top_module(name: &Path) -> String {
    let first = name
        .iter()
        .next()
        .and_then(|part| part.to_str())
        .unwrap_or_default();
    first.trim_end_matches(".rs").to_owned()
}

/// How many `super` lead from a file's module to the crate: 1 in `ids.rs` and
/// `export/mod.rs`, 2 in `export/live.rs`.
fn depth(name: &Path) -> usize {
    let parts = name.iter().count();
    if name.ends_with("mod.rs") {
        parts - 1
    } else {
        parts
    }
}

/// The text without comments, strings and characters, line for line.
fn plain(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    while at < chars.len() {
        let end = skip(&chars, at);
        if end == at {
            out.push(chars[at]);
            at += 1;
        } else {
            out.extend(chars[at..end].iter().filter(|c| **c == '\n'));
            out.push(' ');
            at = end;
        }
    }
    out
}

/// The end of the comment or literal that begins at `at`; `at`, when none does.
fn skip(chars: &[char], at: usize) -> usize {
    let starts = |from: usize, word: &str| {
        word.chars()
            .enumerate()
            .all(|(i, c)| chars.get(from + i) == Some(&c))
    };
    let past = |mut from: usize, word: &str| {
        while from < chars.len() && !starts(from, word) {
            from += 1;
        }
        (from + word.chars().count()).min(chars.len())
    };
    if starts(at, "//") {
        return past(at, "\n");
    }
    if starts(at, "/*") {
        return past(at + 2, "*/");
    }
    let in_word = at > 0 && (chars[at - 1].is_alphanumeric() || chars[at - 1] == '_');
    if chars[at] == 'r' && !in_word {
        let hashes = chars[at + 1..].iter().take_while(|c| **c == '#').count();
        if chars.get(at + 1 + hashes) == Some(&'"') {
            return past(at + 2 + hashes, &format!("\"{}", "#".repeat(hashes)));
        }
    }
    match chars[at] {
        '"' => quoted(chars, at, '"'),
        // 'x' and '\n', but not the lifetime 'x.
        '\'' if chars.get(at + 1) == Some(&'\\') || chars.get(at + 2) == Some(&'\'') => {
            quoted(chars, at, '\'')
        }
        _ => at,
    }
}

fn quoted(chars: &[char], at: usize, mark: char) -> usize {
    let mut end = at + 1;
    while end < chars.len() && chars[end] != mark {
        end += if chars[end] == '\\' { 2 } else { 1 };
    }
    (end + 1).min(chars.len())
}

/// Blanks the items under `#[cfg(test)]`, keeping the lines. Takes plain text.
fn without_tests(text: &str) -> String {
    const MARK: &str = "#[cfg(test)]";
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(MARK) {
        let (before, item) = rest.split_at(at);
        let (item, after) = item.split_at(item_end(item));
        out.push_str(before);
        out.extend(item.chars().filter(|c| *c == '\n'));
        rest = after;
    }
    out.push_str(rest);
    out
}

/// Where an item ends: at its semicolon, or at the brace that closes it.
fn item_end(item: &str) -> usize {
    let mut depth = 0_usize;
    for (at, c) in item.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth <= 1 => return at + 1,
            '}' => depth -= 1,
            ';' if depth == 0 => return at + 1,
            _ => {}
        }
    }
    item.len()
}

/// Every path from the crate's root, groups spelled out, and its line: what
/// follows `crate::`, or `depth` times `super::`. Takes plain text.
fn crate_paths(text: &str, depth: usize) -> BTreeSet<(usize, String)> {
    let mut found = BTreeSet::new();
    for start in ["crate::".to_owned(), "super::".repeat(depth.max(1))] {
        let mut from = 0;
        while let Some(at) = text[from..].find(&start).map(|at| at + from) {
            from = at + start.len();
            // `$crate::` of a macro is the crate as well; `my_crate::` is not.
            let before = text[..at].chars().next_back();
            if before.is_some_and(|c| c.is_alphanumeric() || c == '_') {
                continue;
            }
            let line = text[..at].matches('\n').count() + 1;
            found.extend(
                spelled_out(&text[from..])
                    .into_iter()
                    .map(|path| (line, path)),
            );
        }
    }
    found
}

/// `a::b` and `a::c` of `a::{b, c as d}`.
fn spelled_out(text: &str) -> Vec<String> {
    let text = text.trim_start();
    if let Some(inside) = text.strip_prefix('{') {
        return group(inside).into_iter().flat_map(spelled_out).collect();
    }
    let name: String = text
        .chars()
        .take_while(|c| c.is_alphanumeric() || *c == '_')
        .collect();
    if name.is_empty() {
        return Vec::new();
    }
    let deeper = text[name.len()..]
        .trim_start()
        .strip_prefix("::")
        .map(spelled_out);
    match deeper {
        Some(parts) if !parts.is_empty() => parts
            .into_iter()
            .map(|part| format!("{name}::{part}"))
            .collect(),
        _ => vec![name],
    }
}

/// The members of a group, whose opening brace was taken off.
fn group(text: &str) -> Vec<&str> {
    let mut members = Vec::new();
    let (mut depth, mut begin) = (0_usize, 0);
    for (at, c) in text.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => {
                members.push(&text[begin..at]);
                return members;
            }
            '}' => depth -= 1,
            ',' if depth == 0 => {
                members.push(&text[begin..at]);
                begin = at + 1;
            }
            _ => {}
        }
    }
    members
}

fn found(text: &str, depth: usize) -> Vec<(usize, String)> {
    crate_paths(&without_tests(&plain(text)), depth)
        .into_iter()
        .collect()
}

#[test]
fn paths_are_found_in_groups_in_code_and_through_super() {
    let text = "use crate::{ids::VolumeId, pool::{self, record}};\n\
                let x = crate::home::Home::new();\n\
                use super::near;\n\
                use super::super::far::Thing;";
    let paths: Vec<String> = found(text, 2).into_iter().map(|(_, path)| path).collect();
    assert_eq!(
        paths,
        [
            "ids::VolumeId",
            "pool::record",
            "pool::self",
            "home::Home::new",
            "far::Thing"
        ]
    );
    assert_eq!(found("use super::near;", 1), [(1, "near".to_owned())]);
}

#[test]
fn comments_strings_and_tests_are_left_out() {
    let text = r##"
// crate::a
/* crate::b */
const X: &str = "crate::c // \" crate::d"; const Y: &str = r#"crate::e " "#;
const Q: char = '"'; fn f<'a>(x: &'a str) { crate::kept::f(x) }
#[cfg(test)]
mod tests { use crate::g; fn f() { if true { } } }
#[cfg(test)]
use crate::h;
use crate::last;
"##;
    assert_eq!(
        found(text, 1),
        [(5, "kept::f".to_owned()), (10, "last".to_owned())]
    );
}

#[test]
fn a_part_of_a_module_is_not_the_whole() {
    let allowed = &["attach::ports", "ids"];
    for path in ["attach::ports::Home", "ids::Epoch", "home::x"] {
        assert!(may("home", allowed, path), "{path}");
    }
    for path in ["attach", "attach::runner::Arbiter", "idsx", "pool"] {
        assert!(!may("home", allowed, path), "{path}");
    }
}
