//! Lines, tables, sizes and times as a person reads them.

use std::fmt::Arguments;
use std::io::{self, ErrorKind, Write};
use std::time::{Duration, SystemTime};

/// The exit status of one whom SIGPIPE has ended, as a shell tells it.
const NO_READER: i32 = 128 + 13;

/// Prints a line of a verb's answer, as `println!` does.
macro_rules! outln {
    ($($part:tt)*) => { $crate::cli::print::line(format_args!($($part)*)) };
}
pub(super) use outln;

/// Prints a line. Where its reader has gone, as `head` does when it has seen
/// enough, that is the end of the command, and no fault. SIGPIPE itself stays
/// ignored: the sockets to agents and controllers would raise it too.
pub fn line(text: Arguments<'_>) {
    let Err(error) = writeln!(io::stdout(), "{text}") else {
        return;
    };
    if error.kind() != ErrorKind::BrokenPipe {
        eprintln!("drover: print the answer: {error}");
        std::process::exit(1);
    }
    std::process::exit(NO_READER);
}

/// Prints rows under headings, each column as wide as its widest cell.
pub fn table(headings: &[&str], rows: &[Vec<String>]) {
    let mut widths: Vec<usize> = headings.iter().map(|h| h.len()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: Vec<&str>| {
        let padded = cells
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"));
        outln!("{}", padded.collect::<Vec<_>>().join("  ").trim_end());
    };
    line(headings.to_vec());
    for row in rows {
        line(row.iter().map(String::as_str).collect());
    }
}

/// A count of bytes in the largest binary unit that keeps it above 1.
pub fn size(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut unit = 0;
    let mut scaled = bytes;
    while scaled >= 1024 && unit + 1 < units.len() {
        scaled /= 1024;
        unit += 1;
    }
    let whole = 1_u64 << (10 * unit);
    let tenths = bytes % whole * 10 / whole;
    if tenths == 0 {
        format!("{scaled} {}", units[unit])
    } else {
        format!("{scaled}.{tenths} {}", units[unit])
    }
}

/// A moment in UTC, to the millisecond (RFC 3339).
pub fn moment(time: SystemTime) -> String {
    humantime::format_rfc3339_millis(time).to_string()
}

/// How long ago `time` was.
pub fn ago(time: SystemTime) -> String {
    let ago = SystemTime::now().duration_since(time).unwrap_or_default();
    format!(
        "{} ago",
        humantime::format_duration(Duration::from_secs(ago.as_secs()))
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_keep_one_digit() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(1023), "1023 B");
        assert_eq!(size(1536), "1.5 KiB");
        assert_eq!(size(10 << 30), "10 GiB");
    }
}
