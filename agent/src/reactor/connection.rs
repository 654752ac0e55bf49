//! One connection: its protocol and its link, without any I/O.
//!
//! A driver tells it what happened ([`Connection::received`],
//! [`Connection::done`], [`Connection::sent`], [`Connection::woken`]) and does
//! afterwards what it finds in it: operations to begin, bytes to send, a space
//! to receive into.

use std::time::{Duration, Instant};

use super::link::{Begun, Fill, Link, Waker};
use super::protocol::{End, Outcome, Protocol, Tag};

/// A peer that takes nothing, or does not go on with what it began to send,
/// for this long is gone.
pub const STALLED: Duration = Duration::from_secs(30);

/// One connection's protocol and link.
pub struct Connection {
    protocol: Box<dyn Protocol>,
    link: Link,
    waker: Waker,
    end: Option<End>,
    /// Whether the space that was last given out is a fill's.
    filling: bool,
    /// When bytes last came.
    heard: Instant,
    /// When the peer last took bytes, or there were none to take.
    took: Instant,
}

impl Connection {
    /// A new connection that speaks `protocol`.
    pub fn new(protocol: Box<dyn Protocol>, waker: Waker, now: Instant) -> Self {
        Self {
            protocol,
            link: Link::new(waker.clone(), now),
            waker,
            end: None,
            filling: false,
            heard: now,
            took: now,
        }
    }

    /// Why it has ended, if it has. What is to be sent may still be sent.
    pub fn end(&self) -> Option<&End> {
        self.end.as_ref()
    }

    /// Ends it, if it has not ended.
    pub fn finish(&mut self, end: End) {
        if self.end.is_none() {
            self.protocol.ended(&end);
            self.end = Some(end);
        }
    }

    /// Where the next bytes are to be received. None while what came before
    /// fills all there is, while the peer does not take what is sent, and when
    /// the connection has ended. What is received
    /// there must be told by [`Self::received`] before this is asked again; the
    /// memory stays where it is until then.
    pub fn space(&mut self) -> Option<&mut [u8]> {
        if self.end.is_some() || self.link.is_clogged() {
            return None;
        }
        self.filling = self.link.fill.is_some();
        let space = match &mut self.link.fill {
            Some(Fill { buffer, at }) => &mut buffer[at.clone()],
            None => self.link.input.space(),
        };
        (!space.is_empty()).then_some(space)
    }

    /// So many bytes were received in the space; 0: the peer sends no more.
    pub fn received(&mut self, bytes: usize, now: Instant) {
        if bytes == 0 {
            self.finish(End::Closed);
            return;
        }
        self.heard = now;
        match &mut self.link.fill {
            Some(fill) if self.filling => fill.at.start += bytes,
            _ => self.link.input.came(bytes),
        }
        self.tell(now, |_, _| Ok(()));
    }

    /// An operation has ended.
    pub fn done(&mut self, tag: Tag, outcome: Outcome, now: Instant) {
        self.tell(now, |protocol, link| protocol.done(tag, outcome, link));
    }

    /// Its waker was used, or its deadline may have come.
    pub fn woken(&mut self, now: Instant) {
        if let Some(late) = self.late(now) {
            self.finish(late);
            return;
        }
        let due = self.protocol.deadline().is_some_and(|at| at <= now);
        if self.waker.take() || due {
            self.tell(now, |protocol, link| protocol.woken(link));
        }
    }

    /// When it is to be woken without anything else happening.
    pub fn deadline(&self) -> Option<Instant> {
        if self.end.is_some() {
            return None;
        }
        let sending = self.wants_to_send().then(|| self.took + STALLED);
        let receiving = self.owed().then(|| self.heard + STALLED);
        [self.protocol.deadline(), sending, receiving]
            .into_iter()
            .flatten()
            .min()
    }

    /// The next operation to begin.
    pub fn begun(&mut self) -> Option<Begun> {
        self.link.begun.pop_front()
    }

    /// Whether there is something to be sent.
    pub fn wants_to_send(&self) -> bool {
        self.link.wants_to_send()
    }

    /// What is to be sent, in order. The bytes stay where they are until
    /// [`Self::sent`] says that they are gone.
    pub fn output(&self) -> impl Iterator<Item = &[u8]> {
        self.link.output()
    }

    /// So many bytes of the output have gone out.
    pub fn sent(&mut self, bytes: usize, now: Instant) {
        self.took = now;
        self.link.sent(bytes);
        self.tell(now, |_, _| Ok(()));
    }

    /// Whether the peer has begun what it must go on with.
    fn owed(&self) -> bool {
        self.link.fill.is_some() || (!self.link.input().is_empty() && !self.link.starved)
    }

    fn late(&self, now: Instant) -> Option<End> {
        if self.wants_to_send() && now >= self.took + STALLED {
            Some(End::Late("the peer's taking of what was sent"))
        } else if self.owed() && now >= self.heard + STALLED {
            Some(End::Late("the rest of what the peer began to send"))
        } else {
            None
        }
    }

    /// Tells the protocol something, and then of all the input it can use.
    fn tell(
        &mut self,
        now: Instant,
        what: impl FnOnce(&mut dyn Protocol, &mut Link) -> Result<(), End>,
    ) {
        if self.end.is_some() {
            return;
        }
        self.link.now = now;
        let idle = !self.wants_to_send();
        let told = what(&mut *self.protocol, &mut self.link).and_then(|()| {
            if self.link.fed() {
                self.protocol.woken(&mut self.link)?;
            }
            self.pump()
        });
        if idle {
            self.took = now;
        }
        if let Err(end) = told {
            self.finish(end);
        }
    }

    fn pump(&mut self) -> Result<(), End> {
        let (protocol, link) = (&mut self.protocol, &mut self.link);
        loop {
            if let Some(Fill { buffer, at }) = &mut link.fill {
                let here = at.len().min(link.input.waiting().len());
                let end = at.start + here;
                buffer[at.start..end].copy_from_slice(&link.input.waiting()[..here]);
                at.start = end;
                link.input.consume(here);
                if at.start < at.end {
                    return Ok(());
                }
                if let Some(full) = link.fill.take() {
                    protocol.filled(full.buffer, link)?;
                }
                continue;
            }
            let before = link.input().len();
            if before == 0 {
                return Ok(());
            }
            protocol.received(link)?;
            if link.fill.is_none() && link.input().len() == before {
                return Ok(());
            }
        }
    }
}
