//! Which kernel a VM boots.

use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Result, bail};

/// Where Debian's packages put their kernels.
const BOOT: &str = "/boot";

/// A VM's kernel.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kernel {
    /// Debian's 6.1.
    V6_1,
    /// Debian's 6.12 (its security archive).
    V6_12,
    /// What `cargo xtask kernel` built.
    Custom,
    /// An image of one's own.
    Image(PathBuf),
}

impl FromStr for Kernel {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "6.1" => Ok(Self::V6_1),
            "6.12" => Ok(Self::V6_12),
            "custom" => Ok(Self::Custom),
            path if Path::new(path).is_file() => Ok(Self::Image(path.into())),
            other => Err(format!(
                "{other:?} is neither 6.12, 6.1, custom nor the path of a kernel image"
            )),
        }
    }
}

impl Kernel {
    /// Its name, fit for a file's.
    pub fn name(&self) -> &'static str {
        match self {
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
            Self::Custom => "custom",
            Self::Image(_) => "image",
        }
    }

    /// Whether its VMs are part of every run: Debian's kernels. The others run
    /// only when they are asked for.
    pub fn is_usual(&self) -> bool {
        matches!(self, Self::V6_1 | Self::V6_12)
    }

    /// The image to boot: of several installed, the newest.
    ///
    /// # Errors
    /// When none is installed.
    pub fn image(&self) -> Result<PathBuf> {
        let prefix = match self {
            Self::Image(path) => return Ok(path.clone()),
            Self::Custom => return crate::kernel::built(),
            Self::V6_1 => "vmlinuz-6.1.",
            Self::V6_12 => "vmlinuz-6.12.",
        };
        let names = fs::read_dir(BOOT).into_iter().flatten().flatten();
        let names = names.filter_map(|entry| entry.file_name().into_string().ok());
        match newest(names, prefix) {
            Some(name) => Ok(Path::new(BOOT).join(name)),
            None => bail!(
                "no kernel {BOOT}/{prefix}* is installed; `cargo xtask setup` installs it, or by \
                 hand: apt-get install {}",
                if *self == Self::V6_1 {
                    "linux-image-amd64"
                } else {
                    "linux-image-6.12.N+deb12-amd64"
                }
            ),
        }
    }
}

/// The newest of Debian's plain kernels with that prefix.
fn newest(names: impl Iterator<Item = String>, prefix: &str) -> Option<String> {
    let plain = |name: &String| {
        name.starts_with(prefix) && !["-cloud-", "-rt-"].iter().any(|kind| name.contains(kind))
    };
    names.filter(plain).max_by_key(|name| {
        let numbers = name[prefix.len()..].split(|c: char| !c.is_ascii_digit());
        numbers
            .map(|digits| digits.parse::<u64>().unwrap_or(0))
            .collect::<Vec<_>>()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_plain_image_is_booted() {
        let names = [
            "vmlinuz-6.1.0-9-amd64",
            "vmlinuz-6.1.0-56-amd64",
            "vmlinuz-6.1.0-57-cloud-amd64",
            "vmlinuz-6.12.9+deb12-amd64",
            "initrd.img-6.1.0-99-amd64",
        ];
        let names = || names.iter().map(|name| (*name).to_owned());
        assert_eq!(
            newest(names(), "vmlinuz-6.1.").as_deref(),
            Some("vmlinuz-6.1.0-56-amd64")
        );
        assert_eq!(
            newest(names(), "vmlinuz-6.12.").as_deref(),
            Some("vmlinuz-6.12.9+deb12-amd64")
        );
        assert_eq!(newest(names(), "vmlinuz-5."), None);
    }

    #[test]
    fn a_word_that_is_no_kernel_is_named() {
        assert_eq!("6.1".parse(), Ok(Kernel::V6_1));
        assert_eq!("custom".parse(), Ok(Kernel::Custom));
        let error = "6.13".parse::<Kernel>().unwrap_err();
        assert!(error.contains("6.13"), "{error}");
    }
}
