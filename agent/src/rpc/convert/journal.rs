//! Lines of the journal, and which of them are asked for.

use super::{Malformed, moment, optional};
use crate::attach::journal::Wanted;
use crate::attach::ports::Note;
use crate::rpc::pb;

impl From<&Note> for pb::Note {
    fn from(note: &Note) -> Self {
        Self {
            time: Some(note.time.into()),
            volume: note
                .volume
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default(),
            node: note
                .node
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default(),
            kind: note.kind.clone(),
            text: note.text.clone(),
            detail: note.detail.to_string(),
        }
    }
}

impl TryFrom<pb::Note> for Note {
    type Error = Malformed;
    fn try_from(note: pb::Note) -> Result<Self, Malformed> {
        Ok(Self {
            time: moment("time", note.time)?,
            volume: optional("volume", &note.volume)?,
            node: optional("node", &note.node)?,
            kind: note.kind,
            text: note.text,
            detail: optional("detail", &note.detail)?.unwrap_or_default(),
        })
    }
}

impl TryFrom<pb::ListNotesRequest> for Wanted {
    type Error = Malformed;
    fn try_from(request: pb::ListNotesRequest) -> Result<Self, Malformed> {
        let since = match request.since {
            None => None,
            since => Some(moment("since", since)?),
        };
        Ok(Self {
            volume: optional("volume", &request.volume)?,
            node: optional("node", &request.node)?,
            receipts: request.receipts,
            since,
        })
    }
}
