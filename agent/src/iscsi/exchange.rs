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
    /// Whether it goes on.
    open: bool,
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
    /// Whether the text goes on in the next part (the C bit).
    pub goes_on: bool,
    /// What the initiator comes again with; [`NO_TAG`] when this is the end of
    /// the exchange (the F bit).
    pub tag: u32,
}

/// How a request comes.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// Its target transfer tag.
    pub tag: u32,
    /// Whether its text goes on in the next request (the C bit).
    pub goes_on: bool,
    /// Whether the initiator has no more to say (the F bit).
    pub is_final: bool,
    /// Its text, or a part of it.
    pub data: &'a [u8],
}

impl Exchange {
    /// Takes a request in.
    ///
    /// # Errors
    /// A tag that was not given out; a last request that goes on; text that is
    /// none.
    pub fn take(
        &mut self,
        request: &Request<'_>,
        asker: &Asker<'_>,
        parameters: &mut Parameters,
    ) -> Result<Part, Flaw> {
        let most = parameters.max_send;
        if request.tag == NO_TAG {
            // An exchange that was under way is over (RFC 7143, 11.10.4).
            self.request.clear();
            self.answer.clear();
        } else if request.tag != self.tag || !self.open {
            return Err(Flaw::Field);
        }
        if request.goes_on && request.is_final {
            return Err(Flaw::Field);
        }
        if self.answer.is_empty() {
            if self.request.len() + request.data.len() > text::LONGEST {
                return Err(Flaw::Text);
            }
            self.request.extend_from_slice(request.data);
            if request.goes_on {
                return Ok(self.part(Vec::new(), false, true));
            }
            let gathered = std::mem::take(&mut self.request);
            self.answer = answer(&text::parse(&gathered)?, asker, parameters);
        }
        let rest = self.answer.split_off(self.answer.len().min(most));
        let text = std::mem::replace(&mut self.answer, rest);
        let goes_on = !self.answer.is_empty();
        Ok(self.part(text, goes_on, goes_on || !request.is_final))
    }

    fn part(&mut self, text: Vec<u8>, goes_on: bool, open: bool) -> Part {
        self.open = open;
        if open {
            self.tag = (self.tag + 1) % (NO_TAG - 1);
        }
        let tag = if open { self.tag } else { NO_TAG };
        Part { text, goes_on, tag }
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

/// All targets that the initiator may use, one by name, or its own. Where there
/// is none the answer is empty; a value that is no name is rejected.
fn send_targets(wanted: &str, asker: &Asker<'_>, out: &mut Vec<u8>) {
    const FORMATS: [&str; 3] = ["iqn.", "eui.", "naa."];
    let is_name = FORMATS.iter().any(|format| wanted.starts_with(format));
    let wanted = match wanted {
        "" => asker.target.unwrap_or_default(),
        "All" => wanted,
        _ if is_name => wanted,
        _ => return text::put(out, "SendTargets", "Reject"),
    };
    // A listener on all addresses of both kinds has IPv4 ones mapped (RFC 4291,
    // 2.5.5.2), which no initiator could connect to.
    let ip = asker.portal.ip().to_canonical();
    let portal = SocketAddr::new(ip, asker.portal.port());
    let address = format!("{portal},{PORTAL_GROUP}");
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
        let request = Request {
            tag,
            goes_on: false,
            is_final: true,
            data: text.as_bytes(),
        };
        send(exchange, &request, most)
    }

    fn send(exchange: &mut Exchange, request: &Request<'_>, most: usize) -> Result<Part, Flaw> {
        let directory = OneTarget(target(MemoryDevice::new(8), None, None, 1));
        let asker = Asker {
            directory: &directory,
            initiator: INITIATOR,
            target: None,
            portal: "[::ffff:192.0.2.1]:3260".parse().unwrap(),
        };
        let mut parameters = Parameters {
            max_send: most,
            ..Parameters::default()
        };
        exchange.take(request, &asker, &mut parameters)
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
            ("Alle".to_owned(), "SendTargets=Reject\0".to_owned()),
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
        assert_eq!((first.text.len(), first.goes_on), (40, true));
        assert!(ask(&mut exchange, first.tag + 1, "", 40).is_err());
        let second = ask(&mut exchange, first.tag, "", 400).unwrap();
        assert_eq!((second.tag, second.goes_on), (NO_TAG, false));
        let text = [first.text, second.text].concat();
        assert_eq!(String::from_utf8(text).unwrap(), whole());
        assert!(ask(&mut exchange, first.tag, "", 40).is_err(), "it is over");
    }

    #[test]
    fn an_exchange_is_open_until_the_initiator_has_no_more_to_say() {
        let (mut exchange, most) = (Exchange::default(), 512);
        let begun = Request {
            tag: NO_TAG,
            goes_on: true,
            is_final: false,
            data: b"SendTar",
        };
        let part = send(&mut exchange, &begun, most).unwrap();
        assert!(part.text.is_empty() && !part.goes_on && part.tag != NO_TAG);
        let whole_text = Request {
            tag: part.tag,
            goes_on: false,
            data: b"gets=All\0",
            ..begun
        };
        let part = send(&mut exchange, &whole_text, most).unwrap();
        assert_eq!(String::from_utf8(part.text).unwrap(), whole());
        assert!(
            !part.goes_on && part.tag != NO_TAG,
            "F 0 is answered by F 0"
        );
        let end = ask(&mut exchange, part.tag, "", most).unwrap();
        assert_eq!((end.text.len(), end.tag), (0, NO_TAG));
        let both = Request {
            is_final: true,
            ..begun
        };
        assert_eq!(
            send(&mut exchange, &both, most).map(|_| ()),
            Err(Flaw::Field)
        );
    }
}
