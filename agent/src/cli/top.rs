//! `drover top`: the volumes of a node as they are now, and what is done to
//! them: in a terminal, or one JSON object a volume and look.

use std::io::{IsTerminal, stdout};
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::Duration;

use anyhow::{Context, bail};
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Block, Cell, Paragraph, Row, Table, TableState};
use ratatui::{DefaultTerminal, Frame};

use super::args::{Agent, Output};
use super::look::{self, Rates, Watch};
use super::print::{moment, outln, size};
use crate::config::Span;
use crate::rpc::pb;

/// How long a key waits to be seen.
const KEYS: Duration = Duration::from_millis(50);

/// Two looks, and why the next one failed, if it did.
#[derive(Default)]
struct Scene {
    before: pb::LookAnswer,
    now: pb::LookAnswer,
    failure: Option<String>,
}

impl Scene {
    fn turn(&mut self, looked: anyhow::Result<pb::LookAnswer>) {
        match looked {
            Ok(answer) => {
                self.before = std::mem::replace(&mut self.now, answer);
                self.failure = None;
            }
            Err(error) => self.failure = Some(format!("{error:#}")),
        }
    }

    fn rates(&self, volume: &pb::VolumeLook) -> Option<Rates> {
        let mut earlier = self.before.volumes.iter();
        let earlier = earlier.find(|look| look.volume == volume.volume)?;
        let time = look::time(&self.now).duration_since(look::time(&self.before));
        look::rates(earlier, volume, time.ok()?)
    }
}

/// Shows the volumes that a node has to do with, until it is stopped; with
/// `count`, so many times.
///
/// # Errors
/// When the agent does not answer at the beginning, or there is no terminal.
pub async fn run(
    every: Span,
    count: Option<u64>,
    output: &Output,
    agent: Agent,
) -> anyhow::Result<()> {
    let every = look::interval(every)?;
    if output.json {
        return lines(every, count, &agent).await;
    }
    if !stdout().is_terminal() {
        bail!("top draws on a terminal, and this is none: --json prints lines");
    }
    let first = Watch::new(&agent).look(None, None).await?;
    let (sender, looks) = channel();
    let asking = tokio::spawn(async move {
        let mut watch = Watch::new(&agent);
        let mut left = count;
        while left != Some(0) {
            tokio::time::sleep(every).await;
            if sender.send(watch.look(None, None).await).is_err() {
                return;
            }
            left = left.map(|left| left - 1);
        }
    });
    let drawn = tokio::task::spawn_blocking(move || {
        // It puts the terminal back when it panics, too.
        let mut terminal = ratatui::try_init().context("take the terminal")?;
        let drawn = show(&mut terminal, first, &looks);
        ratatui::restore();
        drawn
    });
    let drawn = drawn.await?;
    asking.abort();
    drawn
}

async fn lines(every: Duration, count: Option<u64>, agent: &Agent) -> anyhow::Result<()> {
    let mut watch = Watch::new(agent);
    let mut scene = Scene::default();
    scene.turn(Ok(watch.look(None, None).await?));
    let mut left = count;
    while left != Some(0) {
        tokio::time::sleep(every).await;
        scene.turn(Ok(watch.look(None, None).await?));
        for volume in &scene.now.volumes {
            let rates = scene.rates(volume);
            outln!("{}", look::line(&scene.now, volume, rates.as_ref()));
        }
        left = left.map(|left| left - 1);
    }
    Ok(())
}

fn show(
    terminal: &mut DefaultTerminal,
    first: pb::LookAnswer,
    looks: &Receiver<anyhow::Result<pb::LookAnswer>>,
) -> anyhow::Result<()> {
    let mut scene = Scene::default();
    scene.turn(Ok(first));
    let mut chosen = TableState::default().with_selected(0);
    loop {
        match looks.try_recv() {
            Ok(looked) => scene.turn(looked),
            Err(TryRecvError::Empty) => {}
            Err(TryRecvError::Disconnected) => return Ok(()),
        }
        terminal.draw(|frame| draw(frame, &scene, &mut chosen))?;
        if !event::poll(KEYS)? {
            continue;
        }
        let Event::Key(key) = event::read()? else {
            continue;
        };
        if key.kind != KeyEventKind::Press {
            continue;
        }
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return Ok(()),
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return Ok(()),
            KeyCode::Down | KeyCode::Char('j') => chosen.select_next(),
            KeyCode::Up | KeyCode::Char('k') => chosen.select_previous(),
            _ => {}
        }
    }
}

const COLUMNS: [(&str, u16); 9] = [
    ("VOLUME", 24),
    ("HOLDER", 14),
    ("EPOCH", 6),
    ("DISK", 9),
    ("VERDICT", 15),
    ("READ/s", 20),
    ("WRITE/s", 20),
    ("99 % BELOW", 16),
    ("IN FLIGHT", 9),
];

fn draw(frame: &mut Frame<'_>, scene: &Scene, chosen: &mut TableState) {
    let [head, body, foot] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Fill(2),
        Constraint::Fill(1),
    ])
    .areas(frame.area());
    frame.render_widget(Paragraph::new(title(scene)), head);
    let rows = scene.now.volumes.iter().map(|volume| {
        let cells = cells(volume, scene.rates(volume).as_ref());
        let style = match verdict(volume) {
            Some("live") => Style::new().fg(Color::Green),
            Some("unknown") => Style::new().fg(Color::Red),
            Some("backup-stale") => Style::new().fg(Color::Yellow),
            _ => Style::new(),
        };
        Row::new(cells.map(Cell::from)).style(style)
    });
    let bold = Style::new().add_modifier(Modifier::BOLD);
    let table = Table::new(rows, COLUMNS.map(|(_, width)| Constraint::Length(width)))
        .header(Row::new(COLUMNS.map(|(name, _)| name)).style(bold))
        .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED));
    frame.render_stateful_widget(table, body, chosen);
    let selected = chosen.selected().unwrap_or(0);
    let volume = scene.now.volumes.get(selected);
    let lines: Vec<Line<'_>> = volume.map(claims).unwrap_or_default();
    let block = Block::bordered().title(volume.map_or("", |v| v.volume.as_str()));
    frame.render_widget(Paragraph::new(lines).block(block), foot);
}

fn title(scene: &Scene) -> Line<'static> {
    let now = &scene.now;
    let silent = [&now.controller_silent, &now.readers_silent];
    let silent = silent.into_iter().find(|why| !why.is_empty());
    let what = match (&scene.failure, silent) {
        (Some(failure), _) => failure.clone(),
        (None, None) => "q: leave, arrows: choose".to_owned(),
        (None, Some(silent)) => silent.clone(),
    };
    let (node, time) = (&now.node, moment(look::time(now)));
    Line::from(format!(
        "drover on {node}, {time}, {} volumes; {what}",
        now.volumes.len()
    ))
}

fn verdict(volume: &pb::VolumeLook) -> Option<&str> {
    let judgement = volume.device.as_ref()?.judgement.as_ref()?;
    Some(&judgement.verdict)
}

fn cells(volume: &pb::VolumeLook, rates: Option<&Rates>) -> [String; COLUMNS.len()] {
    let record = volume.record.as_ref();
    let device = volume.device.as_ref();
    let name = record.map(|r| match (r.pvc.as_str(), r.name.as_str()) {
        ("", "") => volume.volume.clone(),
        ("", name) => name.to_owned(),
        (claim, _) => format!("{}/{claim}", r.namespace),
    });
    let rate = |count: f64, bytes: f64| format!("{count:.0} {}", size(bytes as u64));
    let p99 = rates.map(|r| {
        let ms = |ns: Option<u64>| {
            ns.map_or_else(|| "-".to_owned(), |ns| format!("{:.3}", ns as f64 / 1e6))
        };
        format!("{}/{} ms", ms(r.read_p99_ns), ms(r.write_p99_ns))
    });
    let flight = device.and_then(|d| Some(d.reads_in_flight? + d.writes_in_flight?));
    [
        name.unwrap_or_else(|| volume.volume.clone()),
        look::holders(volume).join(","),
        record.map_or_else(String::new, |r| r.epoch.to_string()),
        device.map_or_else(String::new, |d| d.disk.clone()),
        verdict(volume).unwrap_or_default().to_owned(),
        rates.map_or_else(String::new, |r| rate(r.reads, r.read_bytes)),
        rates.map_or_else(String::new, |r| rate(r.writes, r.written_bytes)),
        p99.unwrap_or_default(),
        flight.map_or_else(String::new, |n| n.to_string()),
    ]
}

/// The claims on a volume, its streams, its readers', and why its verdict is what it is.
fn claims(volume: &pb::VolumeLook) -> Vec<Line<'static>> {
    let mut lines = Vec::new();
    let spell = |seconds: u64| humantime::format_duration(Duration::from_secs(seconds)).to_string();
    if let Some(judgement) = volume.device.as_ref().and_then(|d| d.judgement.as_ref()) {
        lines.push(format!("{}: {}", judgement.verdict, judgement.reason));
    }
    for t in volume.record.iter().flat_map(|record| &record.tickets) {
        let lease = match look::lease(t) {
            Some(seconds) => format!("lease {}", spell(seconds)),
            None => "no lease".to_owned(),
        };
        let (kind, node, owner) = (&t.kind, &t.node, &t.owner);
        lines.push(format!(
            "ticket {}: {kind} on {node}, {owner}, {lease}",
            t.ticket
        ));
    }
    for s in &volume.streams {
        let part = look::part(s).map_or_else(String::new, |p| format!(" {p} %"));
        let rest = look::eta(s).map_or_else(String::new, |s| format!(", {} to go", spell(s)));
        let (done, rate) = (size(s.bytes_done), size(s.bytes_per_second));
        let (ticket, phase) = (&s.ticket, &s.phase);
        lines.push(format!(
            "stream {ticket}: {phase}{part}, {done} at {rate}/s{rest}"
        ));
    }
    for r in &volume.readers {
        let (who, motion) = (&r.who, &r.motion);
        let (read, wrote) = (flow(r.read), flow(r.wrote));
        let sent = match r.sent {
            None => "?".to_owned(),
            counted => flow(counted),
        };
        lines.push(format!(
            "reader {who}: {motion}, read {read}, sent {sent}, wrote {wrote} elsewhere"
        ));
    }
    lines.into_iter().map(Line::from).collect()
}

/// `4 MiB 3s ago`; `0 B` where there was none.
fn flow(flow: Option<pb::Flow>) -> String {
    let flow = flow.unwrap_or_default();
    let ago = flow.last_ms.map(|ms| {
        let ago = humantime::format_duration(Duration::from_secs(ms / 1000));
        format!(" {ago} ago")
    });
    format!("{}{}", size(flow.bytes), ago.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::look::tests::look as volume;
    use super::*;

    fn answer(second: i64, reads: u64) -> pb::LookAnswer {
        let mut look = volume(reads, &[0, reads]);
        let device = look.device.as_mut().unwrap();
        (device.reads_in_flight, device.writes_in_flight) = (Some(2), Some(1));
        device.judgement = Some(pb::JudgeAnswer {
            verdict: "live".into(),
            reason: "process 7 (fio) can write".into(),
            ..Default::default()
        });
        look.record = Some(pb::Volume {
            epoch: 3,
            pvc: "data".into(),
            namespace: "shop".into(),
            tickets: vec![pb::Ticket {
                ticket: "t-1".into(),
                kind: "backup".into(),
                node: "a".into(),
                owner: "pid 9".into(),
                lease: Some(prost_types::Duration {
                    seconds: 42,
                    nanos: 0,
                }),
                ..Default::default()
            }],
            ..Default::default()
        });
        look.streams = vec![pb::BackupProgress {
            ticket: "t-2".into(),
            phase: "running".into(),
            bytes_total: 200,
            bytes_done: 50,
            bytes_per_second: 10,
            eta: Some(prost_types::Duration {
                seconds: 15,
                nanos: 0,
            }),
            ..Default::default()
        }];
        look.readers = vec![pb::ReaderLook {
            who: "pid 8 (restic)".into(),
            read: Some(pb::Flow {
                bytes: 8192,
                last_ms: Some(3_999),
            }),
            wrote: Some(pb::Flow::default()),
            motion: "reads-only".into(),
            ..Default::default()
        }];
        pb::LookAnswer {
            node: "a".into(),
            time: Some(prost_types::Timestamp {
                seconds: 1_700_000_000 + second,
                nanos: 0,
            }),
            volumes: vec![look],
            ..Default::default()
        }
    }

    #[test]
    fn the_screen_shows_holder_rates_claims_and_streams() {
        let mut scene = Scene::default();
        scene.turn(Ok(answer(0, 1_000)));
        scene.turn(Ok(answer(2, 3_000)));
        let mut terminal = Terminal::new(TestBackend::new(150, 20)).unwrap();
        let mut chosen = TableState::default().with_selected(0);
        terminal
            .draw(|frame| draw(frame, &scene, &mut chosen))
            .unwrap();
        let screen = terminal.backend().to_string();
        for wanted in [
            "drover on a, 2023-11-14T22:13:22.000Z, 1 volumes",
            "shop/data",
            "live",
            "1000 3.9 MiB",
            "0.000/- ms",
            "ticket t-1: backup on a, pid 9, lease 42s",
            "stream t-2: running 25 %, 50 B at 10 B/s, 15s to go",
            "reader pid 8 (restic): reads-only, read 8 KiB 3s ago, sent ?, wrote 0 B elsewhere",
            "live: process 7 (fio) can write",
        ] {
            assert!(screen.contains(wanted), "{wanted} in\n{screen}");
        }
    }

    #[test]
    fn an_agent_that_does_not_answer_leaves_the_last_look_and_says_so() {
        let mut scene = Scene::default();
        scene.turn(Ok(answer(0, 1)));
        scene.turn(Err(anyhow::anyhow!("the agent does not answer")));
        assert_eq!(scene.now.volumes.len(), 1);
        assert!(title(&scene).to_string().contains("does not answer"));
        scene.turn(Ok(answer(1, 2)));
        assert!(scene.failure.is_none());
    }
}
