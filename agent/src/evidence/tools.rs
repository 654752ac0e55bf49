//! Backup tools that are known by their processes' names, without being
//! registered: whoever reads a disk under such a name counts as a registered
//! reader, and has a stream ([`super::streams`]) without a claim. Like every
//! registration it makes nothing less of one that could write.

use std::str::FromStr;

use serde::Deserialize;

/// Bytes of a process's name that the kernel keeps: TASK_COMM_LEN without the
/// 0 at its end (include/linux/sched.h).
const COMM: usize = 15;
/// Characters of a beginning, at least: a shorter one would fit anybody.
const LEAST: usize = 3;

/// The name of a tool's process, or the beginning of it and `*`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Tool(String);

/// Why a name is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no name of a backup tool: it is a process's name, as `ps -o comm` shows it, or at least 3 characters of it and *"
)]
pub struct NoTool(String);

impl Tool {
    /// Those that are known unless others are configured.
    pub fn usual() -> Vec<Self> {
        ["velero", "kopia", "restic", "rustic"]
            .map(|name| Self(name.to_owned()))
            .into()
    }

    /// Whether a process of this name is one.
    pub fn is(&self, comm: &str) -> bool {
        match self.0.strip_suffix('*') {
            Some(beginning) => comm.starts_with(beginning),
            // The kernel cuts a long name off.
            None => comm == self.0.get(..COMM).unwrap_or(&self.0),
        }
    }
}

impl FromStr for Tool {
    type Err = NoTool;

    fn from_str(text: &str) -> Result<Self, NoTool> {
        let beginning = text.strip_suffix('*');
        let name = beginning.unwrap_or(text);
        let least = if beginning.is_some() { LEAST } else { 1 };
        let plain = |byte: u8| byte.is_ascii_graphic() && !b"/*?[]".contains(&byte);
        if name.len() < least || !name.bytes().all(plain) {
            return Err(NoTool(text.to_owned()));
        }
        // Of a beginning too, no more can be seen than the kernel keeps.
        let seen = &name[..name.len().min(COMM)];
        Ok(Self(match beginning {
            Some(_) => format!("{seen}*"),
            None => name.to_owned(),
        }))
    }
}

impl TryFrom<String> for Tool {
    type Error = NoTool;

    fn try_from(text: String) -> Result<Self, NoTool> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_fits_whole_or_by_its_beginning() {
        let tool = |text: &str| text.parse::<Tool>().unwrap();
        assert!(tool("restic").is("restic"));
        assert!(!tool("restic").is("restic-helper") && !tool("restic").is("rest"));
        assert!(tool("velero*").is("velero-plugin-f") && tool("velero*").is("velero"));
        assert!(!tool("velero*").is("veler"));
        let long = tool("a-backup-tool-with-a-long-name");
        assert!(long.is("a-backup-tool-w") && !long.is("a-backup-tool"));
        assert!(tool("a-backup-tool-with-a-long*").is("a-backup-tool-w"));
    }

    #[test]
    fn what_would_fit_anybody_is_refused() {
        for wrong in [
            "",
            "*",
            "a*",
            "ab*",
            "a b",
            "/bin/restic",
            "re*ic",
            "re?tic",
            "rést",
        ] {
            let error = wrong.parse::<Tool>().unwrap_err().to_string();
            assert!(error.starts_with(&format!("{wrong:?}")), "{error}");
        }
    }

    #[test]
    fn the_usual_ones_are_names_themselves() {
        for tool in Tool::usual() {
            assert_eq!(tool.0.parse(), Ok(tool.clone()));
            assert!(tool.is(&tool.0));
        }
    }
}
