//! What this node's agent says of itself, in its metrics.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, ensure};

use super::Check;

/// The agent answers within this.
const ANSWER: Duration = Duration::from_secs(5);
/// More than this no agent says.
const MOST: u64 = 16 << 20;

/// All that is looked at here.
pub fn checks(address: SocketAddr) -> Vec<Check> {
    let metrics = match ask(address) {
        Ok(metrics) => metrics,
        Err(error) => {
            return vec![Check::warning(
                "agent",
                format!("{address}: {error:#}"),
                "is it running? --metrics or DROVER_METRICS_ADDRESS names another address; \
                 what its eBPF programs do here is not known without it",
            )];
        }
    };
    vec![
        Check::ok("agent", format!("answers at {address}")),
        evidence(&metrics),
        gate(&metrics),
    ]
}

fn ask(address: SocketAddr) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, ANSWER)?;
    stream.set_read_timeout(Some(ANSWER))?;
    stream.set_write_timeout(Some(ANSWER))?;
    write!(
        stream,
        "GET /metrics HTTP/1.1\r\nHost: drover\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = Vec::new();
    stream.take(MOST).read_to_end(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer.split_once("\r\n\r\n").context("no answer of HTTP")?;
    let status = head.lines().next().unwrap_or_default();
    ensure!(status.starts_with("HTTP/1.1 200"), "{status}");
    Ok(body.to_owned())
}

/// The samples of a metric, each with the value of one of its labels.
fn samples<'a>(
    metrics: &'a str,
    name: &'a str,
    label: &'a str,
) -> impl Iterator<Item = (&'a str, f64)> {
    metrics.lines().filter_map(move |line| {
        let rest = line.strip_prefix(name)?.strip_prefix('{')?;
        let (labels, value) = rest.rsplit_once("} ")?;
        let of = labels.split(',').find_map(|part| {
            let (key, value) = part.split_once('=')?;
            (key == label).then(|| value.trim_matches('"'))
        })?;
        Some((of, value.split(' ').next()?.parse().ok()?))
    })
}

fn evidence(metrics: &str) -> Check {
    let up = metrics
        .lines()
        .find_map(|line| line.strip_prefix("drover_evidence_up "));
    if up.map(str::trim) != Some("1") {
        return Check::warning(
            "evidence",
            "no verdict can be had",
            "every verdict is `unknown`, so a holder counts as live until its deadline; the agent's log says why",
        );
    }
    let refused: Vec<_> = samples(metrics, "drover_evidence_program_up", "program")
        .filter(|(_, up)| *up == 0.0)
        .map(|(program, _)| program)
        .collect();
    if refused.is_empty() {
        return Check::ok("evidence", "every program is in the kernel");
    }
    Check::warning(
        "evidence",
        format!("the kernel refused {}", refused.join(", ")),
        "what these count is not known; the agent's log says why",
    )
}

fn gate(metrics: &str) -> Check {
    let layers: Vec<_> = samples(metrics, "drover_gate_layer_up", "layer").collect();
    let named = |wanted: bool| -> Vec<&str> {
        let chosen = layers.iter().filter(|(_, up)| (*up == 1.0) == wanted);
        chosen.map(|(layer, _)| *layer).collect()
    };
    let (up, down) = (named(true), named(false));
    let found = match (up.is_empty(), down.is_empty()) {
        (true, true) => "the agent tells of no layer".to_owned(),
        (_, true) => up.join(", "),
        (true, _) => format!("no {}", down.join(", no ")),
        (false, false) => format!("{}; no {}", up.join(", "), down.join(", no ")),
    };
    if up.contains(&"files") || up.contains(&"bio") {
        return Check::ok("gate", found);
    }
    Check::warning(
        "gate",
        found,
        "an old holder's calls on this node end only when its device is gone; the home's fence \
         holds all the same. Put `bpf` into the kernel's lsm=",
    )
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::super::State;
    use super::*;

    const METRICS: &str = "# TYPE drover_evidence_up gauge\n\
        drover_evidence_up 1\n\
        drover_evidence_program_up{program=\"issue\",hook=\"tp_btf\"} 1\n\
        drover_gate_layer_up{layer=\"bio\"} 0\n\
        drover_gate_layer_up{layer=\"files\"} 1\n\
        drover_gate_layer_up{layer=\"removal\"} 1\n\
        # EOF\n";

    /// An agent that answers once, like this.
    fn serving(answer: &'static str) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let (mut peer, _) = listener.accept().unwrap();
            let mut request = [0; 512];
            let _ = peer.read(&mut request);
            peer.write_all(answer.as_bytes()).unwrap();
        });
        address
    }

    #[test]
    fn an_agent_s_layers_and_programs_are_told() {
        let answer = format!("HTTP/1.1 200 OK\r\nX: y\r\n\r\n{METRICS}");
        let checks = checks(serving(answer.leak()));
        let [agent, evidence, gate] = &checks[..] else {
            panic!("{checks:?}");
        };
        assert!(
            [agent, evidence, gate]
                .iter()
                .all(|check| check.state == State::Ok)
        );
        assert_eq!(gate.found, "files, removal; no bio");
    }

    #[test]
    fn what_is_not_up_is_a_warning() {
        let blind = METRICS.replace("drover_evidence_up 1", "drover_evidence_up 0");
        assert_eq!(evidence(&blind).state, State::Warning);
        let refused = METRICS.replace("\"tp_btf\"} 1", "\"tp_btf\"} 0");
        assert_eq!(evidence(&refused).found, "the kernel refused issue");
        let open = METRICS.replace("\"files\"} 1", "\"files\"} 0");
        assert_eq!(gate(&open).state, State::Warning);
        assert_eq!(gate("").found, "the agent tells of no layer");
    }

    #[test]
    fn one_that_does_not_answer_as_it_should_is_named() {
        let closed = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        for address in [
            closed,
            serving("HTTP/1.1 503 Not now\r\n\r\n"),
            serving("SSH-2.0-x\r\n"),
        ] {
            let checks = checks(address);
            assert_eq!(checks.len(), 1);
            assert_eq!(checks[0].state, State::Warning);
            assert!(checks[0].found.contains(&address.to_string()), "{checks:?}");
        }
    }
}
