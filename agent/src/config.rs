//! drover's configuration: flags over environment over one TOML file over the
//! defaults, which all stand in [`Config::resolve`].
//!
//! A flag `--nvme-address` is the variable `DROVER_NVME_ADDRESS` and the key
//! `nvme-address`. An unknown key and a value that makes no sense are refused
//! with their name.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde::Deserialize;

use crate::csi::DriverName;
use crate::evidence::tools::Tool;
use crate::ids::{Bytes, HostPort, NodeId};
use crate::reactor::{self, Engine};

/// Where the controller listens, and where the command line looks for it.
pub const CONTROLLER_ADDRESS: &str = "127.0.0.1:9750";
/// Where an agent listens, and where the command line looks for it.
pub const AGENT_ADDRESS: &str = "127.0.0.1:9751";

pub use options::Options;

mod options;

/// Where an agent serves its metrics.
pub const METRICS_ADDRESS: &str = "127.0.0.1:9752";

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("read configuration {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The kernel's reason.
        source: std::io::Error,
    },
    /// The file is not TOML, or has an unknown key or a value of a wrong type.
    #[error("configuration {}: {source}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What, and where.
        source: Box<toml::de::Error>,
    },
    /// A value makes no sense.
    #[error("{key} = {value}: {rule}")]
    Value {
        /// The key (the flag is --KEY).
        key: &'static str,
        /// What was given.
        value: String,
        /// What would make sense.
        rule: &'static str,
    },
    /// A value that has no default is missing.
    #[error(
        "{key} is not set: give --{key}, {variable} or the key {key} in the configuration file"
    )]
    Missing {
        /// The key.
        key: &'static str,
        /// Its environment variable.
        variable: &'static str,
    },
}

/// A length of time as people write it: `30s`, `2m`, `500ms`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Span(pub Duration);

impl FromStr for Span {
    type Err = humantime::DurationError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        humantime::parse_duration(text).map(Span)
    }
}

impl TryFrom<String> for Span {
    type Error = humantime::DurationError;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

/// What a process runs as; some defaults differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Only the controller.
    Controller,
    /// Only the agent.
    Agent,
    /// Both in one process.
    Standalone,
}

/// A whole, checked configuration.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "each field is documented at its option")]
pub struct Config {
    pub node: NodeId,
    pub state_dir: PathBuf,
    pub state: PathBuf,
    pub pool: Option<PathBuf>,
    pub pool_low_water: Bytes,
    pub pool_overcommit_percent: u32,
    pub pool_lock_wait: Duration,
    pub controller: HostPort,
    pub agent_address: SocketAddr,
    pub agent_advertise: SocketAddr,
    pub nvme_address: SocketAddr,
    pub nvme_advertise: SocketAddr,
    pub iscsi_address: SocketAddr,
    pub iscsi_advertise: SocketAddr,
    pub discovery_address: SocketAddr,
    pub data_threads: usize,
    pub data_engine: Option<Engine>,
    pub data_poll: Duration,
    pub csi_socket: PathBuf,
    pub driver_name: DriverName,
    pub kubelet_registry: Option<PathBuf>,
    pub metrics_address: SocketAddr,
    pub progress_window: Duration,
    pub backup_tools: Vec<Tool>,
}

impl Config {
    /// Fills in every default and checks every value.
    ///
    /// # Errors
    /// The first value that makes no sense, by its key.
    pub fn resolve(options: Options, role: Role) -> Result<Self, ConfigError> {
        let local = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
        let controller_only = role == Role::Controller;
        let default_socket = if controller_only {
            "controller.sock"
        } else {
            "csi.sock"
        };
        let known = |address: &str| -> SocketAddr {
            let parsed = address.parse();
            parsed.expect("an address and port written in this file")
        };
        let agent_address = options.agent_address.unwrap_or(known(AGENT_ADDRESS));
        let nvme_address = options.nvme_address.unwrap_or(local(4420));
        let iscsi_address = options.iscsi_address.unwrap_or(local(3260));
        let config = Self {
            node: node_name(options.node)?,
            state_dir: options
                .state_dir
                .unwrap_or_else(|| "/var/lib/drover/agent".into()),
            state: options
                .state
                .unwrap_or_else(|| "/var/lib/drover/controller.redb".into()),
            pool: options.pool,
            pool_low_water: Bytes(options.pool_low_water.unwrap_or(256 << 20)),
            pool_overcommit_percent: options.pool_overcommit.unwrap_or(200),
            pool_lock_wait: options
                .pool_lock_wait
                .map_or(Duration::from_secs(60), |s| s.0),
            controller: options
                .controller
                .unwrap_or_else(|| known(CONTROLLER_ADDRESS).into()),
            agent_address,
            agent_advertise: options.agent_advertise.unwrap_or(agent_address),
            nvme_address,
            nvme_advertise: options.nvme_advertise.unwrap_or(nvme_address),
            iscsi_address,
            iscsi_advertise: options.iscsi_advertise.unwrap_or(iscsi_address),
            discovery_address: options.discovery_address.unwrap_or(local(8009)),
            data_threads: data_threads(options.data_threads)?,
            data_engine: data_engine(options.data_engine)?,
            data_poll: options.data_poll.map_or(reactor::POLL, |s| s.0),
            csi_socket: options
                .csi_socket
                .unwrap_or_else(|| Path::new("/run/drover").join(default_socket)),
            driver_name: driver_name(options.driver_name)?,
            kubelet_registry: options.kubelet_registry,
            metrics_address: options.metrics_address.unwrap_or_else(|| {
                if controller_only {
                    local(9753)
                } else {
                    known(METRICS_ADDRESS)
                }
            }),
            progress_window: options
                .progress_window
                .map_or(Duration::from_secs(30), |s| s.0),
            backup_tools: options.backup_tools.unwrap_or_else(Tool::usual),
        };
        config.check(role)?;
        Ok(config)
    }

    fn check(&self, role: Role) -> Result<(), ConfigError> {
        let refuse = |key, value: String, rule| Err(ConfigError::Value { key, value, rule });
        if self.pool_overcommit_percent < 100 {
            let value = self.pool_overcommit_percent.to_string();
            return refuse(
                "pool-overcommit",
                value,
                "at least 100 (per cent): less would leave room unused",
            );
        }
        if self.pool_lock_wait > Duration::from_secs(3600) {
            return refuse(
                "pool-lock-wait",
                format!("{:?}", self.pool_lock_wait),
                "at most 1h",
            );
        }
        if self.data_poll > Duration::from_millis(10) {
            let value = format!("{:?}", self.data_poll);
            let rule = "at most 10ms: a thread that looks out has a processor of its own";
            return refuse("data-poll", value, rule);
        }
        if self.progress_window < Duration::from_secs(1) {
            return refuse(
                "progress-window",
                format!("{:?}", self.progress_window),
                "at least 1s",
            );
        }
        if role != Role::Agent && self.controller.is_name() {
            let rule = "an IP address and a port to listen on; only an agent's may be a name";
            return refuse("controller", self.controller.to_string(), rule);
        }
        if role == Role::Controller {
            return Ok(());
        }
        for (key, address) in [
            ("agent-advertise", self.agent_advertise),
            ("nvme-advertise", self.nvme_advertise),
            ("iscsi-advertise", self.iscsi_advertise),
        ] {
            if address.ip().is_unspecified() || address.port() == 0 {
                let rule = "an address and port that other nodes can connect to; 0.0.0.0 and port 0 are none";
                return refuse(key, address.to_string(), rule);
            }
        }
        if role == Role::Standalone && self.pool.is_none() {
            return Err(ConfigError::Missing {
                key: "pool",
                variable: "DROVER_POOL",
            });
        }
        Ok(())
    }
}

fn data_threads(given: Option<usize>) -> Result<usize, ConfigError> {
    match given {
        Some(number @ (0 | 129..)) => Err(ConfigError::Value {
            key: "data-threads",
            value: number.to_string(),
            rule: "must be 1 to 128",
        }),
        given => Ok(given.unwrap_or(2)),
    }
}

fn data_engine(given: Option<String>) -> Result<Option<Engine>, ConfigError> {
    match given.as_deref() {
        None | Some("auto") => Ok(None),
        Some(text) => text.parse().map(Some).map_err(|_| ConfigError::Value {
            key: "data-engine",
            value: text.to_owned(),
            rule: "must be auto, io-uring or threads",
        }),
    }
}

fn driver_name(given: Option<String>) -> Result<DriverName, ConfigError> {
    let name = given.unwrap_or_else(|| "drover.io".into());
    name.parse().map_err(|_| ConfigError::Value {
        key: "driver-name",
        value: name,
        rule: "1 to 63 letters, digits, - and ., beginning and ending with a letter or digit (CSI GetPluginInfo)",
    })
}

fn node_name(given: Option<String>) -> Result<NodeId, ConfigError> {
    let name = match given {
        Some(name) => name,
        None => nix::unistd::gethostname()
            .map(|name| name.to_string_lossy().to_lowercase())
            .unwrap_or_default(),
    };
    name.parse().map_err(|_| ConfigError::Value {
        key: "node",
        value: name,
        rule: "1 to 253 of a-z, 0-9, - and ., beginning and ending with a letter or digit (RFC 1123)",
    })
}

#[cfg(any(test, fuzzing))]
pub(crate) mod doors;

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Options, ConfigError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Options::read(file.path())
    }

    fn agent(options: Options) -> Result<Config, ConfigError> {
        Config::resolve(
            Options {
                node: Some("n".into()),
                ..options
            },
            Role::Agent,
        )
    }

    #[test]
    fn an_unknown_key_is_refused_by_name() {
        let error = parse("pol = \"/x\"").unwrap_err().to_string();
        assert!(error.contains("pol"), "{error}");
    }

    #[test]
    fn a_nonsensical_value_is_refused_by_its_key() {
        let cases = [
            ("pool-overcommit = 50", "pool-overcommit"),
            ("progress-window = \"10ms\"", "progress-window"),
            ("driver-name = \"-x\"", "driver-name"),
            ("nvme-address = \"0.0.0.0:4420\"", "nvme-advertise"),
            ("iscsi-address = \"0.0.0.0:3260\"", "iscsi-advertise"),
            ("pool-lock-wait = \"2h\"", "pool-lock-wait"),
        ];
        for (text, key) in cases {
            let error = agent(parse(text).unwrap()).unwrap_err().to_string();
            assert!(error.starts_with(key), "{text}: {error}");
        }
        for (text, word) in [
            ("controller = \"here\"", "controller"),
            ("progress-window = 3", "progress-window"),
            ("backup-tools = [\"restic\", \"*\"]", "backup-tools"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
        let error = Config::resolve(
            Options {
                node: Some("A B".into()),
                ..Options::default()
            },
            Role::Agent,
        );
        assert!(error.unwrap_err().to_string().starts_with("node"));
    }

    #[test]
    fn flags_win_over_the_file() {
        let file = parse("node = \"file\"\npool = \"/pool\"").unwrap();
        let flags = Options {
            node: Some("flag".into()),
            ..Options::default()
        };
        let config = Config::resolve(flags.over(file), Role::Standalone).unwrap();
        assert_eq!(config.node.as_str(), "flag");
        assert_eq!(config.pool.as_deref(), Some(Path::new("/pool")));
        assert_eq!(config.nvme_advertise.port(), 4420);
    }

    #[test]
    fn an_agent_finds_its_controller_by_name_but_none_listens_on_a_name() {
        let options = || parse("controller = \"drover-controller.drover.svc:9750\"").unwrap();
        let config = agent(options()).unwrap();
        assert_eq!(
            config.controller.as_str(),
            "drover-controller.drover.svc:9750"
        );
        let error = Config::resolve(options(), Role::Controller).unwrap_err();
        assert!(error.to_string().starts_with("controller"), "{error}");
    }

    #[test]
    fn standalone_needs_a_pool() {
        let options = Options {
            node: Some("n".into()),
            ..Options::default()
        };
        let error = Config::resolve(options, Role::Standalone)
            .unwrap_err()
            .to_string();
        assert!(error.contains("DROVER_POOL"), "{error}");
    }
}
