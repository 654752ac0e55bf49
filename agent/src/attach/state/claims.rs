//! What follows when claims come and go.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use super::{Action, Claim, Holder, Phase, Refusal, Stage, Then, Turn};
use crate::attach::action::GRACE;
use crate::attach::proof::Cleared;
use crate::attach::record::{AccessMode, Ticket, TicketKind};
use crate::ids::{Epoch, NodeId, TicketId};

impl Claim {
    pub(super) fn new(mut ticket: Ticket, lease: Option<Duration>, now: SystemTime) -> Self {
        ticket.lease_ends = lease.map(|lease| now + lease);
        let as_micros = |lease: Duration| u64::try_from(lease.as_micros()).unwrap_or(u64::MAX);
        Self {
            ticket,
            lease_us: lease.map(as_micros),
        }
    }

    fn renew(&mut self, lease: Duration, now: SystemTime) {
        *self = Self::new(self.ticket.clone(), Some(lease), now);
    }
}

impl Turn {
    pub(super) fn publish(
        &mut self,
        holder: Holder,
        lost: &BTreeSet<NodeId>,
    ) -> Result<(), Refusal> {
        self.must_exist()?;
        if lost.contains(&holder.node) {
            return Err(Refusal::NodeLost(holder.node));
        }
        for node in lost {
            self.node_lost(node);
        }
        if let Some(present) = self.state.holder().cloned() {
            if present.node == holder.node {
                return self.publish_again(&present, holder);
            }
            return Err(Refusal::HeldBy(present.node));
        }
        if let Some(claim) = self
            .state
            .claims
            .iter()
            .find(|claim| blocks_publish(&claim.ticket, &holder.node))
        {
            return Err(Refusal::InUse(in_the_way(&self.state.spec.id, claim)));
        }
        self.interrupt(|ticket| !ticket.home_side && ticket.node != holder.node);
        self.hand_to(holder);
        Ok(())
    }

    /// The same node once more: nothing to do, unless it has become another host.
    fn publish_again(&mut self, present: &Holder, holder: Holder) -> Result<(), Refusal> {
        if present.mode != holder.mode {
            return Err(Refusal::Incompatible(format!(
                "volume {} is published to node {} as {}, not as {}",
                self.state.spec.id,
                holder.node,
                mode(present.mode),
                mode(holder.mode)
            )));
        }
        if !present.host.is_same_host(&holder.host) {
            self.state
                .claims
                .retain(|claim| claim.ticket.kind != TicketKind::Workload);
            self.hand_to(holder);
        }
        Ok(())
    }

    /// Decides a new epoch for `holder`, and what must end before it.
    fn hand_to(&mut self, holder: Holder) {
        self.state.epoch = self.state.epoch.next();
        self.state.claims.push(Claim {
            ticket: Ticket {
                id: workload_ticket(self.state.epoch),
                kind: TicketKind::Workload,
                node: holder.node.clone(),
                owner: "kubelet".to_owned(),
                interruptible: false,
                home_side: false,
                lease_ends: None,
            },
            lease_us: None,
        });
        match self.state.stage() {
            Stage::Closing | Stage::Handing => self.follow_with(Then::Export(holder)),
            Stage::Idle if self.state.epoch == Epoch(1) => {
                self.state.offered = self.state.epoch;
                self.enter(Phase::Exporting {
                    holder,
                    cleared: Cleared::First,
                });
            }
            _ => self.fence(Then::Export(holder)),
        }
    }

    /// Ends every export there may be.
    fn fence(&mut self, then: Then) {
        let held = match self.state.stage() {
            Stage::Exporting | Stage::Attached => self.state.holder().map(|held| held.node.clone()),
            _ => None,
        };
        self.enter(Phase::Fencing {
            closing: self.all_before(&then),
            holder: held,
            then,
        });
    }

    /// What must end before `then`: every epoch that was offered; before an
    /// export, every one below it. A copy of the store that is put back does not
    /// know what was offered after it was made.
    pub(super) fn all_before(&self, then: &Then) -> Epoch {
        match then {
            Then::Export(_) => Epoch(self.state.epoch.0.saturating_sub(1)),
            Then::Rest | Then::Delete | Then::Discard => self.state.offered,
        }
    }

    pub(super) fn unpublish(&mut self, node: Option<&NodeId>) {
        let Some(claim) = self.state.workload().cloned() else {
            return;
        };
        if node.is_some_and(|node| *node != claim.ticket.node) {
            return;
        }
        self.let_go();
        let text = format!("the workload on node {} has left", claim.ticket.node);
        self.note("unpublished", Some(&claim.ticket.node), text);
    }

    /// The workload's claim has ended: its export ends behind.
    fn let_go(&mut self) {
        self.state
            .claims
            .retain(|claim| claim.ticket.kind != TicketKind::Workload);
        match self.state.stage() {
            Stage::Handing => self.follow_with(Then::Rest),
            Stage::Exporting | Stage::Attached => self.fence(Then::Rest),
            _ => {}
        }
    }

    pub(super) fn delete(&mut self) -> Result<(), Refusal> {
        match self.state.stage() {
            Stage::Ending | Stage::Deleting | Stage::Gone => return Ok(()),
            Stage::Creating => {
                return Err(Refusal::NotYet(format!(
                    "volume {} is still being made on {}",
                    self.state.spec.id, self.state.spec.home
                )));
            }
            Stage::Idle | Stage::Closing | Stage::Handing | Stage::Exporting | Stage::Attached => {}
        }
        if let Some(claim) = self.state.claims.iter().find(|claim| {
            let ticket = &claim.ticket;
            match ticket.kind {
                TicketKind::Workload | TicketKind::Restore | TicketKind::Maintenance => true,
                TicketKind::Backup => !ticket.interruptible && !ticket.home_side,
            }
        }) {
            return Err(Refusal::InUse(in_the_way(&self.state.spec.id, claim)));
        }
        self.condemn(Then::Delete, "its deletion was asked for".to_owned());
        Ok(())
    }

    /// Ends every claim, and then the volume.
    fn condemn(&mut self, then: Then, why: String) {
        self.interrupt(|ticket| !ticket.home_side);
        self.state.claims.clear();
        self.note("deleting", None, why);
        match self.state.stage() {
            Stage::Closing => self.follow_with(then),
            _ => self.fence(then),
        }
    }

    pub(super) fn take(&mut self, ticket: Ticket, lease: Option<Duration>) -> Result<(), Refusal> {
        self.must_exist()?;
        let volume = self.state.spec.id.clone();
        if ticket.kind == TicketKind::Workload {
            return Err(Refusal::Incompatible(format!(
                "volume {volume}: a workload's ticket is taken by publishing the volume"
            )));
        }
        let bounded = matches!(ticket.kind, TicketKind::Maintenance | TicketKind::Restore);
        if bounded && lease.is_none() {
            return Err(Refusal::Incompatible(format!(
                "volume {volume}: {} ticket {} must have a deadline",
                kind_name(ticket.kind),
                ticket.id
            )));
        }
        let claim = Claim::new(ticket, lease, self.now);
        let place = self
            .state
            .claims
            .iter()
            .position(|present| present.ticket.id == claim.ticket.id);
        if let Some(place) = place {
            let present = &self.state.claims[place].ticket;
            let same = Ticket {
                lease_ends: present.lease_ends,
                ..claim.ticket.clone()
            } == *present;
            if !same {
                return Err(Refusal::Incompatible(format!(
                    "volume {volume} has another ticket {}, of {} on node {}",
                    present.id, present.owner, present.node
                )));
            }
            self.state.claims[place] = claim;
            return Ok(());
        }
        if claim.ticket.kind == TicketKind::Restore {
            self.must_rest()?;
        }
        let text = format!(
            "{} ticket {} of {} on node {}",
            kind_name(claim.ticket.kind),
            claim.ticket.id,
            claim.ticket.owner,
            claim.ticket.node
        );
        let node = claim.ticket.node.clone();
        self.state.claims.push(claim);
        self.note("ticket-taken", Some(&node), text);
        Ok(())
    }

    /// A restore writes at home: every export must have ended, with a receipt,
    /// and no other restore may write.
    fn must_rest(&self) -> Result<(), Refusal> {
        let volume = &self.state.spec.id;
        let mut claims = self.state.claims.iter();
        if let Some(other) = claims.find(|claim| claim.ticket.kind == TicketKind::Restore) {
            return Err(Refusal::InUse(in_the_way(volume, other)));
        }
        match (self.state.stage(), self.state.holder()) {
            (Stage::Idle, _) => Ok(()),
            (_, Some(holder)) => Err(Refusal::InUse(format!(
                "volume {volume} is published to node {}: unpublish it there first",
                holder.node
            ))),
            _ => Err(Refusal::NotYet(format!(
                "volume {volume}: the export up to epoch {} has not ended yet",
                self.state.offered
            ))),
        }
    }

    pub(super) fn renew(&mut self, ticket: &TicketId, lease: Duration) -> Result<(), Refusal> {
        let now = self.now;
        let claim = self
            .state
            .claims
            .iter_mut()
            .find(|claim| claim.ticket.id == *ticket)
            .ok_or_else(|| Refusal::NoTicket(ticket.clone()))?;
        if claim.ticket.kind == TicketKind::Workload {
            return Err(Refusal::Incompatible(format!(
                "ticket {ticket} is a workload's and ends by unpublish, never by time"
            )));
        }
        claim.renew(lease, now);
        Ok(())
    }

    pub(super) fn end(&mut self, ticket: &TicketId, why: &str) {
        let Some(claim) = self.claim(ticket) else {
            return;
        };
        let node = claim.ticket.node;
        if claim.ticket.kind == TicketKind::Workload {
            self.let_go();
        } else {
            self.drop_claim(ticket);
        }
        let text = format!(
            "{} ticket {ticket} has ended: {why}",
            kind_name(claim.ticket.kind)
        );
        self.note("ticket-ended", Some(&node), text);
    }

    /// A restore has failed, or nobody is left who would tell: half a volume is
    /// nobody's to use, so it goes with its claim.
    pub(super) fn fail_restore(&mut self, ticket: &TicketId, why: &str) -> Result<(), Refusal> {
        let restore = self.claim(ticket);
        if restore.is_none_or(|claim| claim.ticket.kind != TicketKind::Restore) {
            return Ok(());
        }
        // Its making is under way at the home, and would come after the deletion.
        if self.state.stage() == Stage::Creating {
            return self.must_exist();
        }
        self.drop_claim(ticket);
        let text = format!("restore ticket {ticket} has failed: {why}");
        // No restore has the claim of what a node was offered, or has.
        if self.state.stage() == Stage::Idle && self.state.offered == Epoch(0) {
            self.condemn(Then::Discard, text);
        } else {
            self.note("ticket-ended", None, text);
        }
        Ok(())
    }

    pub(super) fn expired(&mut self, ticket: &TicketId) -> Result<(), Refusal> {
        let Some(claim) = self.claim(ticket) else {
            return Ok(());
        };
        let Some(lease_us) = claim.lease_us else {
            return Ok(());
        };
        self.fail_restore(ticket, "its lease ran out")?;
        self.drop_claim(ticket);
        let text = format!(
            "{} ticket {ticket} of {} on node {} has ended: not renewed within {:?}",
            kind_name(claim.ticket.kind),
            claim.ticket.owner,
            claim.ticket.node,
            Duration::from_micros(lease_us)
        );
        self.note("lease-expired", Some(&claim.ticket.node), text);
        Ok(())
    }

    pub(super) fn node_lost(&mut self, node: &NodeId) {
        if let Some(claim) = self.state.workload().cloned()
            && claim.ticket.node == *node
        {
            self.let_go();
            let text = format!("node {node} was declared lost: its workload's claim has ended");
            self.note("node-lost", Some(node), text);
        }
        self.state.claims.retain(|claim| {
            let ticket = &claim.ticket;
            ticket.kind != TicketKind::Backup || ticket.home_side || ticket.node != *node
        });
    }

    /// Ends the tickets that `which` says, and tells their owners to stop.
    fn interrupt(&mut self, which: impl Fn(&Ticket) -> bool) {
        let claims = std::mem::take(&mut self.state.claims);
        let (ended, kept): (Vec<Claim>, Vec<Claim>) = claims
            .into_iter()
            .partition(|claim| claim.ticket.interruptible && which(&claim.ticket));
        self.state.claims = kept;
        for Claim { ticket, .. } in ended {
            let text = format!(
                "ticket {} of {} makes way for the workload",
                ticket.id, ticket.owner
            );
            self.note("interrupted", Some(&ticket.node), text);
            self.actions.push(Action::Interrupt {
                ticket: ticket.id,
                node: ticket.node,
                grace: GRACE,
            });
        }
    }

    fn must_exist(&self) -> Result<(), Refusal> {
        match self.state.stage() {
            Stage::Ending | Stage::Deleting | Stage::Gone => Err(Refusal::NoVolume),
            Stage::Creating => Err(Refusal::NotYet(format!(
                "volume {} is still being made on {}",
                self.state.spec.id, self.state.spec.home
            ))),
            Stage::Idle | Stage::Closing | Stage::Handing | Stage::Exporting | Stage::Attached => {
                Ok(())
            }
        }
    }

    fn claim(&self, ticket: &TicketId) -> Option<Claim> {
        self.state
            .claims
            .iter()
            .find(|claim| claim.ticket.id == *ticket)
            .cloned()
    }

    fn drop_claim(&mut self, ticket: &TicketId) {
        self.state.claims.retain(|claim| claim.ticket.id != *ticket);
    }
}

/// Whether a ticket keeps the volume from being published to `node`.
fn blocks_publish(ticket: &Ticket, node: &NodeId) -> bool {
    match ticket.kind {
        TicketKind::Workload => false,
        // It writes at home, where no gate of an export stops it.
        TicketKind::Restore => true,
        TicketKind::Maintenance => !ticket.interruptible,
        TicketKind::Backup => !ticket.interruptible && !ticket.home_side && ticket.node != *node,
    }
}

fn in_the_way(volume: &crate::ids::VolumeId, claim: &Claim) -> String {
    let ticket = &claim.ticket;
    format!(
        "volume {volume} is held by {} ticket {} of {} on node {}; end it first",
        kind_name(ticket.kind),
        ticket.id,
        ticket.owner,
        ticket.node
    )
}

fn workload_ticket(epoch: Epoch) -> TicketId {
    format!("workload-{epoch}")
        .parse()
        .expect("a word, a hyphen and a number are a ticket id")
}

/// A ticket's kind in words and metrics.
pub(in crate::attach) fn kind_name(kind: TicketKind) -> &'static str {
    match kind {
        TicketKind::Workload => "workload",
        TicketKind::Backup => "backup",
        TicketKind::Restore => "restore",
        TicketKind::Maintenance => "maintenance",
    }
}

fn mode(mode: AccessMode) -> &'static str {
    match mode {
        AccessMode::SingleWriter => "single writer",
        AccessMode::SingleReader => "single reader",
    }
}
