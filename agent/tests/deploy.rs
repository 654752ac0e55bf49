//! What deploy/ sets is what drover takes: the example configuration, the
//! manifests' variables and the unit's command line.
//!
//! That the manifests are valid to Kubernetes is deploy/check's to say.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use clap::{Args, Parser};
use drover::cli::args::{Command, Drover};
use drover::config::{Config, Options, Role};

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

fn read(file: &str) -> String {
    let path = deploy().join(file);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Every option: its flag's name, which is its key, and its variable.
fn options() -> Vec<(String, String)> {
    let command = Options::augment_args(clap::Command::new("drover"));
    let option = |argument: &clap::Arg| {
        let text = |os: &std::ffi::OsStr| os.to_str().unwrap().to_owned();
        let key = argument.get_long()?.to_owned();
        Some((key, argument.get_env().map(text)?))
    };
    command.get_arguments().filter_map(option).collect()
}

/// The example with every key set: `# key = value` without its `# `.
fn uncommented(example: &str) -> String {
    let keys = options();
    let line = |line: &str| {
        let bare = line.strip_prefix("# ").unwrap_or(line);
        let key = bare.split(" = ").next().unwrap_or_default();
        let set = keys.iter().any(|(known, _)| known == key);
        format!("{}\n", if set { bare } else { line })
    };
    example.lines().map(line).collect()
}

#[test]
fn every_option_is_flag_variable_and_key_of_one_name() {
    for (key, variable) in options() {
        let name = key.to_uppercase().replace('-', "_");
        assert_eq!(variable, format!("DROVER_{name}"));
    }
}

#[test]
fn the_example_configuration_names_every_key_with_its_default() {
    let example = Options::read(&deploy().join("drover.toml")).unwrap();
    let text = uncommented(&read("drover.toml"));
    let table: toml::Table = toml::from_str(&text).unwrap();
    for (key, _) in options() {
        assert!(
            table.contains_key(&key),
            "deploy/drover.toml does not name {key}"
        );
    }
    let whole: Options = toml::from_str(&text).unwrap();
    // What has no default, or the machine's own, is the same in both.
    let plain = Options {
        node: whole.node.clone(),
        kubelet_registry: whole.kubelet_registry.clone(),
        ..example
    };
    for role in [Role::Standalone, Role::Agent] {
        assert_eq!(
            Config::resolve(whole.clone(), role).unwrap(),
            Config::resolve(plain.clone(), role).unwrap()
        );
    }
}

/// The variables that a manifest's drover containers set, as kubelet would
/// fill them in, by `- args: [ROLE]`'s role. Reads the layout the manifests
/// have, not all of YAML.
fn containers(manifest: &str) -> Vec<(String, BTreeMap<String, String>)> {
    let mut found = Vec::<(String, BTreeMap<_, _>)>::new();
    let mut name = None;
    for line in manifest.lines().map(str::trim) {
        if let Some(role) = line.strip_prefix("args: [") {
            found.push((role.trim_end_matches(']').to_owned(), BTreeMap::new()));
        } else if let Some(variable) = line.strip_prefix("- name: ") {
            name = variable.starts_with("DROVER_").then_some(variable);
        } else if let (Some(variable), Some((_, variables))) = (name, found.last_mut()) {
            let value = match line.strip_prefix("value: ") {
                Some(value) => value.trim_matches('"').replace("$(HOST_IP)", "192.0.2.1"),
                None if line == "fieldPath: spec.nodeName" => "node-a".to_owned(),
                None => continue,
            };
            variables.insert(variable.to_owned(), value);
        }
    }
    found
}

#[test]
fn the_manifests_set_what_drover_takes() {
    let mut roles = Vec::new();
    for entry in fs::read_dir(deploy().join("kubernetes")).unwrap().flatten() {
        let path = entry.path();
        let text = fs::read_to_string(&path).unwrap();
        let set: usize = text.matches("- name: DROVER_").count();
        let containers = containers(&text);
        let read: usize = containers.iter().map(|(_, set)| set.len()).sum();
        assert_eq!(read, set, "{}: not every DROVER_ is read", path.display());
        for (role, variables) in containers {
            let options = options();
            let words = variables.iter().map(|(variable, value)| {
                let known = options.iter().find(|(_, known)| known == variable);
                let (key, _) =
                    known.unwrap_or_else(|| panic!("{}: drover has no {variable}", path.display()));
                format!("--{key}={value}")
            });
            let config = serve(["drover".to_owned(), role.clone()].into_iter().chain(words));
            let agent = role == "agent";
            assert!(!config.metrics_address.ip().is_loopback(), "{role}");
            assert_eq!(config.controller.is_name(), agent, "{role}");
            assert_eq!(agent, config.kubelet_registry.is_some(), "{role}");
            assert!(
                !agent || !config.nvme_advertise.ip().is_loopback(),
                "{role}"
            );
            roles.push((role, config.pool.is_some()));
        }
    }
    roles.sort();
    let expected = [("agent", false), ("agent", true), ("controller", false)];
    assert_eq!(roles, expected.map(|(role, pool)| (role.to_owned(), pool)));
}

#[test]
fn the_unit_runs_standalone_with_the_example() {
    let unit = read("systemd/drover.service");
    let line = unit
        .lines()
        .find_map(|line| line.strip_prefix("ExecStart="))
        .unwrap();
    let example = deploy().join("drover.toml").display().to_string();
    let installed = "/etc/drover/drover.toml";
    assert!(line.contains(installed), "{line}");
    let words = line.split_whitespace();
    let words = words.map(|word| if word == installed { &example } else { word });
    serve(words.map(str::to_owned));
}

/// The configuration that a command line comes to, as `main` does it.
fn serve(words: impl Iterator<Item = String>) -> Config {
    let (run, role) = match Drover::try_parse_from(words).unwrap().command {
        Command::Agent(run) => (run, Role::Agent),
        Command::Controller(run) => (run, Role::Controller),
        Command::Standalone(run) => (run, Role::Standalone),
        other => panic!("{other:?} serves nothing"),
    };
    let file = run.config.as_deref().map(Options::read);
    let file = file.transpose().unwrap().unwrap_or_default();
    Config::resolve(run.options.over(file), role).unwrap()
}
