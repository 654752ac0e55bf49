//! Text in the full feature phase: which targets there are (RFC 7143, 11.10,
//! 11.11 and Appendix C).

use std::net::SocketAddr;

use super::login::PORTAL_GROUP;
use super::negotiate::Parameters;
use super::target::Directory;
use super::text;
use super::wire::{Flaw, NO_TAG};

/// One connection's text exchange.
#[derive(Default)]
pub struct Exchange {
    /// What has come of a request that goes on.
    request: Vec<u8>,
    /// What is left of an answer that goes on.
    answer: Vec<u8>,
    /// Names the exchange while it goes on.
    tag: u32,
}

/// Who asks, and where.
pub struct Asker<'a> {
    /// Knows the targets.
    pub directory: &'a dyn Directory,
    /// The initiator's name.
    pub initiator: &'a str,
    /// The target of its normal session; none in a discovery session.
    pub target: Option<&'a str>,
    /// The address that it connected to.
    pub portal: SocketAddr,
}

/// A part of the answer.
pub struct Part {
    /// The text.
    pub text: Vec<u8>,
    /// What the initiator asks for more with; [`NO_TAG`] when this is the last.
    pub tag: u32,
}

impl Exchange {
    /// Takes a request in. `tag` is its target transfer tag; an answer's part
    /// is at most `most` bytes long.
    ///
    /// # Errors
    /// A tag that was not given out; text that is none.
    pub fn take(
        &mut self,
        tag: u32,
        goes_on: bool,
        data: &[u8],
        asker: &Asker<'_>,
        parameters: &mut Parameters,
    ) -> Result<Part, Flaw> {
        let most = parameters.max_send;
        if tag == NO_TAG {
            self.request.clear();
            self.answer.clear();
        } else if tag != self.tag || self.request.is_empty() && self.answer.is_empty() {
            return Err(Flaw::Field);
        }
        if self.answer.is_empty() {
            if self.request.len() + data.len() > text::LONGEST {
                return Err(Flaw::Text);
            }
            self.request.extend_from_slice(data);
            if goes_on {
                self.next_tag();
                return Ok(Part {
                    text: Vec::new(),
                    tag: self.tag,
                });
            }
            let request = std::mem::take(&mut self.request);
            self.answer = answer(&text::parse(&request)?, asker, parameters);
        }
        let rest = self.answer.split_off(self.answer.len().min(most));
        let text = std::mem::replace(&mut self.answer, rest);
        let tag = if self.answer.is_empty() {
            NO_TAG
        } else {
            self.next_tag();
            self.tag
        };
        Ok(Part { text, tag })
    }

    fn next_tag(&mut self) {
        self.tag = (self.tag + 1) % (NO_TAG - 1);
    }
}

fn answer(pairs: &[(&str, &str)], asker: &Asker<'_>, parameters: &mut Parameters) -> Vec<u8> {
    let mut out = Vec::new();
    for (key, value) in pairs {
        match *key {
            "SendTargets" => send_targets(value, asker, &mut out),
            // The one operational key that may still be said.
            "MaxRecvDataSegmentLength" => {
                if let Some(said) = parameters.take(key, value) {
                    text::put(&mut out, key, &said);
                }
            }
            _ => text::put(&mut out, key, "NotUnderstood"),
        }
    }
    out
}

/// All targets that the initiator may use, one by name, or its own.
fn send_targets(wanted: &str, asker: &Asker<'_>, out: &mut Vec<u8>) {
    let wanted = match wanted {
        "" => asker.target.unwrap_or_default(),
        other => other,
    };
    let address = format!("{},{PORTAL_GROUP}", asker.portal);
    for name in asker.directory.visible(asker.initiator) {
        if wanted == "All" || wanted == name {
            text::put(out, "TargetName", &name);
            text::put(out, "TargetAddress", &address);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::for_tests::{INITIATOR, MemoryDevice, OneTarget, TARGET, target};
    use super::*;

    fn ask(exchange: &mut Exchange, tag: u32, text: &str, most: usize) -> Result<Part, Flaw> {
        let directory = OneTarget(target(MemoryDevice::new(8), None, None, 1));
        let asker = Asker {
            directory: &directory,
            initiator: INITIATOR,
            target: None,
            portal: ([192, 0, 2, 1], 3260).into(),
        };
        let mut parameters = Parameters {
            max_send: most,
            ..Parameters::default()
        };
        exchange.take(tag, false, text.as_bytes(), &asker, &mut parameters)
    }

    fn whole() -> String {
        format!("TargetName={TARGET}\0TargetAddress=192.0.2.1:3260,1\0")
    }

    #[test]
    fn targets_are_listed_all_or_by_name() {
        for (wanted, expected) in [
            ("All".to_owned(), whole()),
            (TARGET.to_owned(), whole()),
            ("iqn.other".to_owned(), String::new()),
            (String::new(), String::new()),
        ] {
            let part = ask(
                &mut Exchange::default(),
                NO_TAG,
                &format!("SendTargets={wanted}\0"),
                512,
            );
            let part = part.unwrap();
            assert_eq!(String::from_utf8(part.text).unwrap(), expected);
            assert_eq!(part.tag, NO_TAG);
        }
    }

    #[test]
    fn a_long_answer_comes_in_parts() {
        let mut exchange = Exchange::default();
        let first = ask(&mut exchange, NO_TAG, "SendTargets=All\0", 40).unwrap();
        assert_eq!(first.text.len(), 40);
        assert!(ask(&mut exchange, first.tag + 1, "", 40).is_err());
        let second = ask(&mut exchange, first.tag, "", 400).unwrap();
        assert_eq!(second.tag, NO_TAG);
        let text = [first.text, second.text].concat();
        assert_eq!(String::from_utf8(text).unwrap(), whole());
        assert!(ask(&mut exchange, first.tag, "", 40).is_err(), "it is over");
    }
}
