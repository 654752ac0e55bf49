//! The network between nodes a and b, when b has one of its own: a pair of
//! virtual interfaces into a network namespace, which can be cut.

use std::net::IpAddr;

use crate::cluster::run;

const SPACE: &str = "rig-b";
/// The interface at a's end; b's is called like its namespace.
const HERE: &str = "rig-a";

/// The link; it goes with this.
pub struct Link;

impl Link {
    /// Makes the namespace and the link.
    ///
    /// # Errors
    /// When a command of iproute2 fails.
    pub fn make() -> anyhow::Result<Self> {
        ip(&format!("netns add {SPACE}"))?;
        let made = Self;
        ip(&format!(
            "link add {HERE} type veth peer name {SPACE} netns {SPACE}"
        ))?;
        ip(&format!("address add {}/24 dev {HERE}", made.address("a")))?;
        ip(&format!(
            "-n {SPACE} address add {}/24 dev {SPACE}",
            made.address("b")
        ))?;
        ip(&format!("-n {SPACE} link set lo up"))?;
        ip(&format!("-n {SPACE} link set {SPACE} up"))?;
        ip(&format!("link set {HERE} up"))?;
        Ok(made)
    }

    /// A node's address.
    pub fn address(&self, node: &str) -> IpAddr {
        IpAddr::from([10, 77, 0, if node == "b" { 2 } else { 1 }])
    }

    /// What a command on a node begins with. Mounts are everybody's.
    pub fn prefix(&self, node: &str) -> &'static [&'static str] {
        match node {
            "b" => &["nsenter", "--net=/run/netns/rig-b"],
            _ => &[],
        }
    }

    /// Nothing comes through any more, and neither end is told.
    ///
    /// # Errors
    /// When tc fails.
    pub fn cut(&self) -> anyhow::Result<()> {
        self.both("replace dev DEVICE root netem loss 100%")
    }

    /// Everything comes through again.
    ///
    /// # Errors
    /// When tc fails.
    pub fn join(&self) -> anyhow::Result<()> {
        self.both("delete dev DEVICE root")
    }

    fn both(&self, words: &str) -> anyhow::Result<()> {
        for (node, device) in [("a", HERE), ("b", SPACE)] {
            let words = words.replace("DEVICE", device);
            let words: Vec<&str> = self
                .prefix(node)
                .iter()
                .copied()
                .chain(["tc", "qdisc"])
                .chain(words.split(' '))
                .collect();
            run(words[0], words[1..].iter().copied(), [])?;
        }
        Ok(())
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        for words in [
            format!("link delete {HERE}"),
            format!("netns delete {SPACE}"),
        ] {
            if let Err(error) = ip(&words) {
                eprintln!("rig: {error:#}");
            }
        }
    }
}

fn ip(words: &str) -> anyhow::Result<()> {
    run("ip", words.split(' '), []).map(drop)
}
