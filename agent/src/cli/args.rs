//! What can be asked on the command line.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::config::{AGENT_ADDRESS, CONTROLLER_ADDRESS, METRICS_ADDRESS, Options, Span};
use crate::ids::{Bytes, HostPort, NodeId, SnapshotId, TicketId, VolumeId};

/// Volumes that move from node to node at once, whatever holds them.
#[derive(Debug, Parser)]
#[command(name = "drover", version, about, propagate_version = true)]
pub struct Drover {
    /// What to log, as in "info" or "drover=debug,warn"
    #[arg(long, global = true, env = "DROVER_LOG", default_value = "info")]
    pub log: String,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the controller: decides who may use which volume, and serves CSI's Controller
    Controller(Run),
    /// Run a node's agent: serves CSI's Node, holds volumes, exports them, watches and backs up
    Agent(Run),
    /// Run controller and agent in one process, for one machine
    Standalone(Run),
    /// Make, list, grow and delete volumes
    #[command(subcommand)]
    Volume(Volume),
    /// Publish a volume to a node
    Attach {
        /// The volume
        volume: VolumeId,
        /// The node
        node: NodeId,
        /// Refuse writes
        #[arg(long)]
        read_only: bool,
        /// Which controller to ask.
        #[command(flatten)]
        controller: Controller,
    },
    /// End a volume's publication; answers at once, whatever runs on it
    Detach {
        /// The volume
        volume: VolumeId,
        /// The node; without it, every node
        node: Option<NodeId>,
        /// Which controller to ask.
        #[command(flatten)]
        controller: Controller,
    },
    /// Take, list and delete snapshots
    #[command(subcommand)]
    Snapshot(Snapshot),
    /// Back volumes up, and tell drover of other backup tools
    #[command(subcommand)]
    Backup(Backup),
    /// Make a new volume from a backup
    Restore(Restore),
    /// Show the claims on volumes
    Tickets {
        /// Only those on this volume
        volume: Option<VolumeId>,
        /// How to print.
        #[command(flatten)]
        output: Output,
        /// Which controller to ask.
        #[command(flatten)]
        controller: Controller,
    },
    /// List nodes, or declare one lost
    #[command(subcommand)]
    Node(Node),
    /// Show what happened, with the receipts of every fence
    Events {
        /// What to show.
        #[command(flatten)]
        wanted: Wanted,
        /// How to print.
        #[command(flatten)]
        output: Output,
        /// Which controller to ask.
        #[command(flatten)]
        controller: Controller,
    },
    /// Show who holds a volume's device on this node, and what that means
    Holders {
        /// The volume
        volume: VolumeId,
        /// How to print.
        #[command(flatten)]
        output: Output,
        /// Which agent to ask.
        #[command(flatten)]
        agent: Agent,
    },
    /// Watch this node's volumes: who holds them, what is done to them, backups and their progress
    Top {
        /// How often to look
        #[arg(long, default_value = "2s", value_name = "TIME")]
        interval: Span,
        /// Look so many times, then end
        #[arg(long, value_name = "NUMBER")]
        count: Option<u64>,
        /// How to print.
        #[command(flatten)]
        output: Output,
        /// Which agent to ask.
        #[command(flatten)]
        agent: Agent,
    },
    /// Follow what happens to one volume, as it happens
    Trace {
        /// The volume
        volume: VolumeId,
        /// How often to look
        #[arg(long, default_value = "1s", value_name = "TIME")]
        interval: Span,
        /// End after this time
        #[arg(long = "for", value_name = "TIME")]
        lasting: Option<Span>,
        /// How to print.
        #[command(flatten)]
        output: Output,
        /// Which agent to ask.
        #[command(flatten)]
        agent: Agent,
    },
    /// Look at this host: whether it has what drover needs, and what to do where it has not
    Doctor {
        /// Where this node's agent serves its metrics
        #[arg(long, env = "DROVER_METRICS_ADDRESS", default_value = METRICS_ADDRESS, value_name = "ADDRESS")]
        metrics: SocketAddr,
        /// The folder of this node's pool, if it has one
        #[arg(long, env = "DROVER_POOL", value_name = "DIR")]
        pool: Option<PathBuf>,
        /// How to print.
        #[command(flatten)]
        output: Output,
    },
    /// Do one thing that may hang, apart from the agent
    #[command(hide = true)]
    Child {
        /// The operation and its arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Run one backup stream, apart from the agent
    #[command(hide = true)]
    BackupWorker,
}

/// How a process that serves is set up.
#[derive(Debug, Args)]
pub struct Run {
    /// A TOML file with these options as keys
    #[arg(long, env = "DROVER_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The options.
    #[command(flatten)]
    pub options: Options,
}

/// Which controller to ask.
#[derive(Debug, Args)]
pub struct Controller {
    /// The controller's address, also by name
    #[arg(long, env = "DROVER_CONTROLLER", default_value = CONTROLLER_ADDRESS, value_name = "ADDRESS")]
    pub controller: HostPort,
}

/// Which agent to ask.
#[derive(Debug, Args)]
pub struct Agent {
    /// The agent's address
    #[arg(long, env = "DROVER_AGENT_ADDRESS", default_value = AGENT_ADDRESS, value_name = "ADDRESS")]
    pub agent: SocketAddr,
}

/// Which events to show; all, unless it is said.
#[derive(Debug, Args)]
pub struct Wanted {
    /// Only what happened to this volume
    #[arg(long)]
    pub volume: Option<VolumeId>,
    /// Only what happened on this node, or to an epoch that it held
    #[arg(long)]
    pub node: Option<NodeId>,
    /// Only the receipts of fences (docs/receipt.schema.json says what is in one)
    #[arg(long)]
    pub receipts: bool,
    /// Only what happened within this time, as in 30m or 2h
    #[arg(long, value_name = "TIME")]
    pub since: Option<Span>,
}

/// How to print.
#[derive(Debug, Args)]
pub struct Output {
    /// Print JSON, one object a line
    #[arg(long)]
    pub json: bool,
}

/// Verbs on volumes.
#[derive(Debug, Subcommand)]
pub enum Volume {
    /// Make a volume; the same name again gives the same volume
    Create {
        /// A name of your choice
        name: String,
        /// Its size, as in 10G
        #[arg(long)]
        size: Bytes,
        /// The node whose pool shall hold it [default: the one with most room]
        #[arg(long)]
        home: Option<NodeId>,
        /// The protocol its hosts reach it by
        #[arg(long, default_value = "nvme-tcp", value_parser = ["nvme-tcp", "iscsi"])]
        protocol: String,
        /// Begin as a clone of this snapshot
        #[arg(long, conflicts_with = "from_volume")]
        from_snapshot: Option<SnapshotId>,
        /// Begin as a clone of this volume
        #[arg(long)]
        from_volume: Option<VolumeId>,
        /// Which controller to ask.
        #[command(flatten)]
        controller: Controller,
    },
    /// List volumes
    List {
        /// How to print.
        #[command(flatten)]
        output: Output,
        /// Which controller to ask.
        #[command(flatten)]
        controller: Controller,
    },
    /// Grow a volume
    Expand {
        /// The volume
        volume: VolumeId,
        /// The new size, as in 20G
        size: Bytes,
        /// Which controller to ask.
        #[command(flatten)]
        controller: Controller,
    },
    /// Serve a volume as it is although its home's record was lost: writes since then are gone
    AcceptOldCopy {
        /// The volume
        volume: VolumeId,
        /// Which controller to ask.
        #[command(flatten)]
        controller: Controller,
    },
    /// Let a fence wait no more for commands that never end: they may still land over newer data
    AcceptUnsettled {
        /// The volume
        volume: VolumeId,
        /// The epoch whose fence waits, as its refusal says
        #[arg(long)]
        epoch: u64,
        /// How many commands may be inside still, as the refusal says
        #[arg(long)]
        inside: u32,
        /// Which controller to ask.
        #[command(flatten)]
        controller: Controller,
    },
    /// Delete a volume that is published nowhere
    Delete {
        /// The volume
        volume: VolumeId,
        /// Which controller to ask.
        #[command(flatten)]
        controller: Controller,
    },
}

/// Verbs on snapshots.
#[derive(Debug, Subcommand)]
pub enum Snapshot {
    /// Take a snapshot; the same name again gives the same snapshot
    Create {
        /// The volume
        volume: VolumeId,
        /// A name of your choice
        name: String,
        /// Which controller to ask.
        #[command(flatten)]
        controller: Controller,
    },
    /// List snapshots
    List {
        /// How to print.
        #[command(flatten)]
        output: Output,
        /// Which controller to ask.
        #[command(flatten)]
        controller: Controller,
    },
    /// Delete a snapshot
    Delete {
        /// The snapshot
        snapshot: SnapshotId,
        /// Which controller to ask.
        #[command(flatten)]
        controller: Controller,
    },
}

/// A restic-format repository on the home's host.
#[derive(Debug, Args)]
pub struct Repository {
    /// The repository's folder on the home's host; made when it is not there
    #[arg(long, value_name = "PATH")]
    pub repo: String,
    /// A file with the repository's password [default: RESTIC_PASSWORD]
    #[arg(long, env = "RESTIC_PASSWORD_FILE", value_name = "FILE")]
    pub password_file: Option<PathBuf>,
}

/// Verbs on backups.
#[derive(Debug, Subcommand)]
pub enum Backup {
    /// Back a volume up as it is now, while it is used; Ctrl-C stops it where it can go on
    Create {
        /// The volume
        volume: VolumeId,
        /// Where the backup is.
        #[command(flatten)]
        repository: Repository,
        /// Upload at most so many KiB per second
        #[arg(long, value_name = "RATE", default_value_t = 0)]
        limit_upload: u64,
        /// Start it and do not wait for its end
        #[arg(long)]
        detach: bool,
        /// Which controller to ask.
        #[command(flatten)]
        controller: Controller,
    },
    /// Let a backup that was stopped go on, or follow one that runs
    Resume {
        /// The backup's ticket, as `drover backup list` shows it
        ticket: TicketId,
        /// Do not wait for its end
        #[arg(long)]
        detach: bool,
        /// Which controller to ask.
        #[command(flatten)]
        controller: Controller,
    },
    /// Stop a backup where it can go on
    Stop {
        /// The backup's ticket
        ticket: TicketId,
        /// Which controller to ask.
        #[command(flatten)]
        controller: Controller,
    },
    /// List the backups that run or can go on
    List {
        /// How to print.
        #[command(flatten)]
        output: Output,
        /// Which controller to ask.
        #[command(flatten)]
        controller: Controller,
    },
    /// Tell this node's agent that a process or cgroup is a backup tool that reads a volume's device
    #[command(group = clap::ArgGroup::new("reader").required(true))]
    Register {
        /// The volume
        volume: VolumeId,
        /// The process
        #[arg(long, group = "reader")]
        pid: Option<u32>,
        /// The cgroup, as /proc/PID/cgroup shows its path
        #[arg(long, group = "reader", value_name = "PATH")]
        cgroup: Option<String>,
        /// Which agent to ask.
        #[command(flatten)]
        agent: Agent,
    },
}

/// Make a new volume from a backup.
#[derive(Debug, Args)]
pub struct Restore {
    /// Name of the new volume
    pub name: String,
    /// Where the backup is.
    #[command(flatten)]
    pub repository: Repository,
    /// The backup's snapshot id in the repository, as `restic snapshots` shows it
    #[arg(long, default_value = "latest")]
    pub snapshot: String,
    /// The node whose pool shall hold the volume [default: the first that can read the repository]
    #[arg(long)]
    pub home: Option<NodeId>,
    /// Which controller to ask.
    #[command(flatten)]
    pub controller: Controller,
}

/// Verbs on nodes.
#[derive(Debug, Subcommand)]
pub enum Node {
    /// List the nodes that ever registered
    List {
        /// How to print.
        #[command(flatten)]
        output: Output,
        /// Which controller to ask.
        #[command(flatten)]
        controller: Controller,
    },
    /// Declare that a node is gone and its workloads with it: its volumes are fenced and free.
    /// It can be used again when it comes back with nothing attached, or rebooted
    Lost {
        /// The node
        node: NodeId,
        /// Which controller to ask.
        #[command(flatten)]
        controller: Controller,
    },
}
