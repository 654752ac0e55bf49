//! `drover trace`: what happens to one volume, as it happens: the journal of
//! the controller, and what this node's agent sees change.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use serde_json::json;

use super::args::{Agent, Output};
use super::look::{self, Rates, Watch};
use super::print::{moment, outln, size};
use crate::config::Span;
use crate::ids::VolumeId;
use crate::rpc::pb;

/// An agent that restarts is back within this.
const PATIENCE: Duration = Duration::from_secs(60);

/// The controller's clock may be so far behind this one's.
const OVERLAP: Duration = Duration::from_secs(60);

/// One line of the trace.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Line {
    kind: String,
    text: String,
}

impl Line {
    fn new(kind: &str, text: String) -> Self {
        Self {
            kind: kind.to_owned(),
            text,
        }
    }
}

/// Prints what happens to a volume, until it is stopped or `lasting` has passed.
///
/// # Errors
/// When the agent does not know the volume, or has not answered for a minute.
pub async fn run(
    volume: &VolumeId,
    every: Span,
    lasting: Option<Span>,
    output: &Output,
    agent: &Agent,
) -> anyhow::Result<()> {
    let every = look::interval(every)?;
    let begun = tokio::time::Instant::now();
    let mut watch = Watch::new(agent);
    // The journal's moments are of the controller's clock, which may be another.
    let from = |heard: SystemTime| heard.checked_sub(OVERLAP).unwrap_or(heard);
    let mut heard = SystemTime::now();
    let mut before = watch.look(Some(volume), Some(from(heard))).await?;
    let mut told = before.notes.clone();
    for line in standing(&before) {
        print(output, volume, look::time(&before), &line);
    }
    let mut answered = begun;
    let mut failure = String::new();
    loop {
        tokio::time::sleep(every).await;
        if lasting.is_some_and(|Span(time)| begun.elapsed() >= time) {
            return Ok(());
        }
        let now = SystemTime::now();
        let mut after = match watch.look(Some(volume), Some(from(heard))).await {
            Ok(after) => after,
            Err(error) if answered.elapsed() < PATIENCE => {
                let text = format!("{error:#}");
                if text != failure {
                    print(output, volume, now, &Line::new("agent", text.clone()));
                    failure = text;
                }
                continue;
            }
            Err(error) => return Err(error),
        };
        answered = tokio::time::Instant::now();
        failure.clear();
        if after.controller_silent.is_empty() {
            heard = now;
        }
        keep_word(&before, &mut after);
        // Those of the overlap were told before.
        for note in after.notes.iter().filter(|note| !told.contains(*note)) {
            let time = note.time.and_then(|time| SystemTime::try_from(time).ok());
            let line = Line::new(&note.kind, note.text.clone());
            print(output, volume, time.unwrap_or(now), &line);
        }
        for line in changes(&before, &after) {
            print(output, volume, look::time(&after), &line);
        }
        told.clone_from(&after.notes);
        before = after;
    }
}

/// What the controller said last stands while it is silent, and so does what was
/// said of readers: nothing has gone because nobody tells of it.
fn keep_word(before: &pb::LookAnswer, after: &mut pb::LookAnswer) {
    let controller = !after.controller_silent.is_empty();
    let readers = !after.readers_silent.is_empty();
    if controller {
        after.notes.clone_from(&before.notes);
    }
    for look in &mut after.volumes {
        let mut earlier = before.volumes.iter();
        let Some(earlier) = earlier.find(|earlier| earlier.volume == look.volume) else {
            continue;
        };
        if controller {
            look.record.clone_from(&earlier.record);
        }
        if readers {
            look.readers.clone_from(&earlier.readers);
        }
    }
}

fn print(output: &Output, volume: &VolumeId, time: SystemTime, line: &Line) {
    let (time, Line { kind, text }) = (moment(time), line);
    if output.json {
        outln!(
            "{}",
            json!({ "time": time, "volume": volume.as_str(), "kind": kind, "text": text })
        );
    } else {
        outln!("{time}  {kind:16}  {text}");
    }
}

/// What two looks are compared by: each thing's kind, name and state in words.
type Things = BTreeMap<(&'static str, String), String>;

fn things(answer: &pb::LookAnswer) -> Things {
    let mut things = Things::new();
    let silent = [
        ("controller", &answer.controller_silent),
        ("readers", &answer.readers_silent),
    ];
    for (kind, why) in silent.into_iter().filter(|(_, why)| !why.is_empty()) {
        things.insert((kind, String::new()), why.clone());
    }
    for look in &answer.volumes {
        if let Some(record) = &look.record {
            things.insert(("epoch", String::new()), record.epoch.to_string());
            things.insert(("size", String::new()), size(record.size));
            for t in &record.tickets {
                let state = format!("{} on {} by {}", t.kind, t.node, t.owner);
                things.insert(("ticket", t.ticket.clone()), state);
            }
        }
        for s in &look.streams {
            let state = match s.error.as_str() {
                "" => s.phase.clone(),
                error => format!("{}: {error}", s.phase),
            };
            things.insert(("stream", s.ticket.clone()), state);
        }
        for r in &look.readers {
            things.insert(("reader", r.who.clone()), r.motion.clone());
        }
        let Some(device) = &look.device else { continue };
        let attached = format!("{}, epoch {}", device.disk, device.epoch);
        things.insert(("device", String::new()), attached);
        let Some(judgement) = &device.judgement else {
            continue;
        };
        things.insert(("verdict", String::new()), judgement.verdict.clone());
        for h in &judgement.holders {
            let can = if h.writable { "can write" } else { "reads" };
            let whose = match (h.pod.as_str(), h.cgroup.as_str()) {
                ("", "") => String::new(),
                ("", group) => format!(", cgroup {group}"),
                (pod, _) => format!(", pod {pod}"),
            };
            let name = match h.pid {
                0 => h.name.clone(),
                pid => format!("{} ({pid})", h.name),
            };
            things.insert(("holder", name), format!("{can}{whose}"));
        }
    }
    things
}

fn named(name: &str, state: &str) -> String {
    match name {
        "" => state.to_owned(),
        name => format!("{name}: {state}"),
    }
}

/// How everything stands at the beginning.
fn standing(answer: &pb::LookAnswer) -> Vec<Line> {
    let things = things(answer).into_iter();
    things
        .map(|((kind, name), state)| Line::new(kind, named(&name, &state)))
        .collect()
}

/// What has come, gone or changed between two looks, and the I/O between them.
fn changes(before: &pb::LookAnswer, after: &pb::LookAnswer) -> Vec<Line> {
    let (old, new) = (things(before), things(after));
    let mut lines = Vec::new();
    for ((kind, name), state) in &new {
        match old.get(&(*kind, name.clone())) {
            Some(earlier) if earlier == state => {}
            Some(earlier) => {
                let text = named(name, &format!("{earlier} -> {state}"));
                lines.push(Line::new(kind, text));
            }
            None => lines.push(Line::new(kind, named(name, state))),
        }
    }
    let gone = old.iter().filter(|(thing, _)| !new.contains_key(*thing));
    for ((kind, name), state) in gone {
        let text = match *kind {
            "controller" => "answers again".to_owned(),
            "readers" => "are told again".to_owned(),
            _ => named(name, &format!("{state} -> gone")),
        };
        lines.push(Line::new(kind, text));
    }
    let time = look::time(after).duration_since(look::time(before));
    let (Some(from), Some(to), Ok(time)) = (before.volumes.first(), after.volumes.first(), time)
    else {
        return lines;
    };
    if let Some(rates) = look::rates(from, to, time) {
        lines.extend(io(from, to, &rates));
    }
    for stream in to.streams.iter().filter(|s| s.phase == "running") {
        let done = look::part(stream).map_or_else(String::new, |p| format!("{p} %, "));
        let rest = look::eta(stream).map_or_else(String::new, |s| {
            let rest = humantime::format_duration(Duration::from_secs(s));
            format!(", {rest} to go")
        });
        let (bytes, rate) = (size(stream.bytes_done), size(stream.bytes_per_second));
        let text = format!("{}: {done}{bytes} at {rate}/s{rest}", stream.ticket);
        lines.push(Line::new("progress", text));
    }
    lines
}

/// One line for the device and one for each process, where anything was done.
fn io(from: &pb::VolumeLook, to: &pb::VolumeLook, rates: &Rates) -> Vec<Line> {
    let mut lines = Vec::new();
    let below = |ns: Option<u64>| {
        ns.map_or_else(String::new, |ns| {
            format!(", 99 % below {:.3} ms", ns as f64 / 1e6)
        })
    };
    if rates.reads > 0.0 || rates.writes > 0.0 || rates.errors > 0 {
        let failed = match rates.errors {
            0 => String::new(),
            errors => format!("; {errors} failed"),
        };
        let text = format!(
            "reads {:.0}/s {}/s{}; writes {:.0}/s {}/s{}{failed}",
            rates.reads,
            size(rates.read_bytes as u64),
            below(rates.read_p99_ns),
            rates.writes,
            size(rates.written_bytes as u64),
            below(rates.write_p99_ns),
        );
        lines.push(Line::new("io", text));
    }
    let processes = |look: &pb::VolumeLook| {
        let device = look.device.iter();
        let all = device.flat_map(|d| d.processes.clone());
        all.map(|p| (p.pid, p)).collect::<BTreeMap<_, _>>()
    };
    let earlier = processes(from);
    for (pid, process) in processes(to) {
        let io = process.io.unwrap_or_default();
        let was = earlier.get(&pid).and_then(|p| p.io).unwrap_or_default();
        let read = io.read_bytes.saturating_sub(was.read_bytes);
        let written = io.written_bytes.saturating_sub(was.written_bytes);
        if read == 0 && written == 0 {
            continue;
        }
        let whose = match process.pod.as_str() {
            "" => format!("cgroup {}", process.cgroup),
            pod => format!("pod {pod} {}", process.container),
        };
        let text = format!(
            "{} ({pid}), {}: read {}, wrote {}",
            process.name,
            whose.trim_end(),
            size(read),
            size(written)
        );
        lines.push(Line::new("io-process", text));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::super::look::tests::look;
    use super::*;

    fn answer(second: u64, look: pb::VolumeLook) -> pb::LookAnswer {
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000 + second);
        pb::LookAnswer {
            time: Some(time.into()),
            volumes: vec![look],
            ..Default::default()
        }
    }

    fn texts(lines: &[Line]) -> Vec<String> {
        let line = |l: &Line| format!("{} {}", l.kind, l.text);
        lines.iter().map(line).collect()
    }

    fn ticket(node: &str) -> pb::Ticket {
        pb::Ticket {
            ticket: format!("t-{node}"),
            kind: "workload".into(),
            node: node.into(),
            owner: "kubelet".into(),
            ..Default::default()
        }
    }

    #[test]
    fn a_move_is_told_as_it_goes() {
        let record = |epoch, node| pb::Volume {
            epoch,
            tickets: vec![ticket(node)],
            ..Default::default()
        };
        let mut held = look(5, &[]);
        held.record = Some(record(3, "a"));
        let moved = pb::VolumeLook {
            record: Some(record(4, "b")),
            ..Default::default()
        };
        let (before, after) = (answer(0, held), answer(1, moved));
        assert!(texts(&standing(&before)).contains(&"device nvme0n1, epoch 3".to_owned()));
        assert_eq!(
            texts(&changes(&before, &after)),
            [
                "epoch 3 -> 4",
                "ticket t-b: workload on b by kubelet",
                "device nvme0n1, epoch 3 -> gone",
                "ticket t-a: workload on a by kubelet -> gone",
            ]
        );
        assert!(changes(&after, &after).is_empty());
    }

    #[test]
    fn io_is_told_when_there_is_some() {
        let (before, idle) = (answer(0, look(5, &[])), answer(1, look(5, &[])));
        assert!(changes(&before, &idle).is_empty());
        let mut busy = look(105, &[]);
        let process = pb::ProcessLook {
            pid: 7,
            name: "fio".into(),
            pod: "1b2c".into(),
            container: "9f8e".into(),
            io: Some(pb::IoCounts {
                read_bytes: 409_600,
                ..Default::default()
            }),
            ..Default::default()
        };
        busy.device.as_mut().unwrap().processes.push(process);
        assert_eq!(
            texts(&changes(&before, &answer(2, busy))),
            [
                "io reads 50/s 200 KiB/s; writes 0/s 0 B/s",
                "io-process fio (7), pod 1b2c 9f8e: read 400 KiB, wrote 0 B",
            ]
        );
    }

    #[test]
    fn a_tool_known_by_its_name_comes_stalls_and_goes() {
        let with = |second, motion: Option<&str>| {
            let mut look = look(5, &[]);
            look.readers = motion
                .map(|motion| pb::ReaderLook {
                    who: "pid 8 (restic)".into(),
                    motion: motion.into(),
                    ..Default::default()
                })
                .into_iter()
                .collect();
            answer(second, look)
        };
        let (none, flows) = (with(0, None), with(1, Some("flows")));
        let stalls = with(2, Some("reads-only"));
        for (before, after, told) in [
            (&none, &flows, "reader pid 8 (restic): flows"),
            (
                &flows,
                &stalls,
                "reader pid 8 (restic): flows -> reads-only",
            ),
            (&stalls, &none, "reader pid 8 (restic): reads-only -> gone"),
        ] {
            assert_eq!(texts(&changes(before, after)), [told]);
        }
    }

    #[test]
    fn a_controller_that_is_silent_is_told_once_and_takes_nothing_away() {
        let mut known = look(5, &[]);
        known.record = Some(pb::Volume {
            epoch: 3,
            tickets: vec![ticket("a")],
            ..Default::default()
        });
        let mut before = answer(0, known);
        before.notes = vec![pb::Note::default()];
        let mut silent = answer(1, look(5, &[]));
        silent.controller_silent = "no answer".into();
        keep_word(&before, &mut silent);
        assert_eq!(texts(&changes(&before, &silent)), ["controller no answer"]);
        assert_eq!(silent.notes, before.notes, "they are not told again");
        let mut again = answer(2, look(5, &[]));
        again.controller_silent = "no answer".into();
        keep_word(&silent, &mut again);
        assert!(changes(&silent, &again).is_empty());
        let mut back = before.clone();
        keep_word(&again, &mut back);
        assert_eq!(texts(&changes(&again, &back)), ["controller answers again"]);
    }

    #[test]
    fn readers_that_are_not_told_of_have_not_gone() {
        let reader = pb::ReaderLook {
            who: "pid 8 (restic)".into(),
            motion: "flows".into(),
            ..Default::default()
        };
        let mut known = look(5, &[]);
        known.readers = vec![reader];
        let before = answer(0, known);
        let mut late = answer(1, look(5, &[]));
        late.readers_silent = "not told within 2s".into();
        keep_word(&before, &mut late);
        let told = texts(&changes(&before, &late));
        assert_eq!(told, ["readers not told within 2s"]);
        let mut back = before.clone();
        keep_word(&late, &mut back);
        assert_eq!(texts(&changes(&late, &back)), ["readers are told again"]);
    }
}
