//! The login, decided without acting: who it is, whether that is proved, and
//! what is agreed on (RFC 7143, 6.3 and 11.12, 11.13).
//!
//! ```text
//!   security (0) ──────► operational (1) ──────► full feature (3)
//!      │  └────────────────────────────────────────────▲
//!      └─ CHAP:  method ─► algorithm ─► challenge ─► proved
//! ```
//!
//! An initiator that need prove nothing may begin in the operational stage.
//! Each stage is left when the initiator asks for it and nothing is open.

use std::sync::Arc;

use super::chap::{self, Algorithm, CHALLENGE};
use super::negotiate::{MAX_RECEIVE, Negotiated, Parameters};
use super::session::Nexus;
use super::target::{Access, Directory, Found, Target};
use super::text;
use super::wire::answer::LoginAnswer;
use super::wire::{DEFAULT_MAX_DATA, Flaw, LoginRequest};

/// Why a login is refused: class and detail (RFC 7143, 11.13.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status(pub u16);

impl Status {
    /// It goes on.
    pub const SUCCESS: Self = Self(0);
    /// The initiator broke a rule.
    pub const INITIATOR_ERROR: Self = Self(0x0200);
    /// It did not prove who it is.
    pub const AUTHENTICATION_FAILED: Self = Self(0x0201);
    /// It may not use this target.
    pub const FORBIDDEN: Self = Self(0x0202);
    /// There is no such target.
    pub const NOT_FOUND: Self = Self(0x0203);
    /// There is no such target any more.
    pub const REMOVED: Self = Self(0x0204);
    /// It does not speak version 0.
    pub const VERSION: Self = Self(0x0205);
    /// A session has one connection here.
    pub const TOO_MANY_CONNECTIONS: Self = Self(0x0206);
    /// A key that must be there is not.
    pub const MISSING_PARAMETER: Self = Self(0x0207);
    /// Neither a normal nor a discovery session.
    pub const SESSION_TYPE: Self = Self(0x0209);
    /// The session that the connection is for does not exist.
    pub const NO_SESSION: Self = Self(0x020a);
    /// Something that is no login during a login.
    pub const INVALID_DURING_LOGIN: Self = Self(0x020b);
    /// The target failed.
    pub const TARGET_ERROR: Self = Self(0x0300);
    /// The session before has not settled: to be tried again.
    pub const UNAVAILABLE: Self = Self(0x0301);
    /// As many sessions as there may be.
    pub const OUT_OF_RESOURCES: Self = Self(0x0302);

    /// Its name in metrics and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::SUCCESS => "success",
            Self::INITIATOR_ERROR => "initiator-error",
            Self::AUTHENTICATION_FAILED => "authentication-failed",
            Self::FORBIDDEN => "forbidden",
            Self::NOT_FOUND => "not-found",
            Self::REMOVED => "removed",
            Self::VERSION => "version",
            Self::TOO_MANY_CONNECTIONS => "too-many-connections",
            Self::MISSING_PARAMETER => "missing-parameter",
            Self::SESSION_TYPE => "session-type",
            Self::NO_SESSION => "no-session",
            Self::INVALID_DURING_LOGIN => "invalid-during-login",
            Self::UNAVAILABLE => "unavailable",
            Self::OUT_OF_RESOURCES => "out-of-resources",
            _ => "target-error",
        }
    }
}

impl From<Flaw> for Status {
    fn from(_: Flaw) -> Self {
        Self::INITIATOR_ERROR
    }
}

const SECURITY: u8 = 0;
const OPERATIONAL: u8 = 1;
const FULL_FEATURE: u8 = 3;
/// The one portal group: all portals lead to the same targets.
pub const PORTAL_GROUP: &str = "1";

/// What the session is for.
#[derive(Clone)]
pub enum Purpose {
    /// To ask which targets there are.
    Discovery,
    /// To use this target.
    Normal(Arc<Target>),
}

/// A login that succeeded.
#[derive(Clone)]
pub struct Agreed {
    /// The initiator port.
    pub nexus: Nexus,
    /// The connection's id in its session.
    pub connection: u16,
    /// What the session is for.
    pub purpose: Purpose,
    /// What was agreed on.
    pub parameters: Parameters,
}

/// The answer to a request.
pub struct Reply {
    /// The response's fields.
    pub answer: LoginAnswer,
    /// Its text.
    pub text: Vec<u8>,
    /// Set with the last one of a login that succeeded. The target's part of
    /// the session's id is still to be filled in.
    pub agreed: Option<Agreed>,
}

/// Makes an identifier and a challenge that nobody can foresee; none where the
/// system has no such numbers.
pub type Random = fn() -> Option<(u8, [u8; CHALLENGE])>;

/// A login in the making.
pub struct Login {
    random: Random,
    first: Option<LoginRequest>,
    stage: u8,
    text: Vec<u8>,
    who: Option<Who>,
    proof: Proof,
    parameters: Parameters,
    negotiated: Negotiated,
    declared: bool,
}

struct Who {
    initiator: String,
    purpose: Purpose,
    access: Option<Access>,
}

/// How far the initiator has proved who it is.
enum Proof {
    Open,
    Method,
    Challenged {
        algorithm: Algorithm,
        identifier: u8,
        challenge: [u8; CHALLENGE],
    },
    Done,
}

impl Login {
    /// A login of which nothing has come.
    pub fn new(random: Random) -> Self {
        Self {
            random,
            first: None,
            stage: SECURITY,
            text: Vec::new(),
            who: None,
            proof: Proof::Open,
            parameters: Parameters::default(),
            negotiated: Negotiated::default(),
            declared: false,
        }
    }

    /// Takes a request and its text in.
    ///
    /// # Errors
    /// Why the login is refused; the connection is to be closed behind that.
    pub fn step(
        &mut self,
        request: &LoginRequest,
        data: &[u8],
        directory: &dyn Directory,
    ) -> Result<Reply, Status> {
        self.check(request)?;
        if self.text.len() + data.len() > text::LONGEST {
            return Err(Status::INITIATOR_ERROR);
        }
        self.text.extend_from_slice(data);
        if request.goes_on {
            return Ok(self.reply(request, false, Vec::new()));
        }
        let gathered = std::mem::take(&mut self.text);
        let pairs = text::parse(&gathered)?;
        let mut out = Vec::new();
        if self.who.is_none() {
            let who = identify(request, &pairs, directory)?;
            if let Purpose::Normal(_) = who.purpose {
                text::put(&mut out, "TargetPortalGroupTag", PORTAL_GROUP);
            }
            self.who = Some(who);
        }
        self.prove(&pairs, request, &mut out)?;
        self.negotiate(&pairs, &mut out)?;
        // A login response is one PDU, as long as every initiator takes (RFC 7143, 13.12).
        if out.len() > DEFAULT_MAX_DATA {
            return Err(Status::INITIATOR_ERROR);
        }
        let leaves = request.transit && matches!(self.proof, Proof::Done);
        Ok(self.reply(request, leaves, out))
    }

    /// Whether the request follows what came before it.
    fn check(&mut self, request: &LoginRequest) -> Result<(), Status> {
        if request.min_version > 0 {
            return Err(Status::VERSION);
        }
        let first = *self.first.get_or_insert_with(|| {
            self.stage = request.current;
            *request
        });
        let same = first.max_version == request.max_version
            && first.min_version == request.min_version
            && first.isid == request.isid
            && first.tsih == request.tsih
            && first.task == request.task
            && first.connection == request.connection;
        let forward = match (request.current, request.next) {
            _ if !request.transit => true,
            (SECURITY, OPERATIONAL | FULL_FEATURE) | (OPERATIONAL, FULL_FEATURE) => true,
            _ => false,
        };
        let sound = same
            && forward
            && request.current == self.stage
            && matches!(request.current, SECURITY | OPERATIONAL)
            && !(request.transit && request.goes_on);
        if sound {
            Ok(())
        } else {
            Err(Status::INITIATOR_ERROR)
        }
    }

    /// Takes the keys of authentication in.
    fn prove(
        &mut self,
        pairs: &[(&str, &str)],
        request: &LoginRequest,
        out: &mut Vec<u8>,
    ) -> Result<(), Status> {
        let access = self.who.as_ref().and_then(|who| who.access.as_ref());
        let incoming = access.and_then(|access| access.incoming.as_ref());
        let value = |key| text::value(pairs, key);
        match &self.proof {
            Proof::Done => Ok(()),
            Proof::Open => match (value("AuthMethod"), incoming) {
                (None, None) => {
                    // An initiator that says nothing of it wants no proof either.
                    self.proof = Proof::Done;
                    Ok(())
                }
                (Some(offer), None) if offer.split(',').any(|method| method == "None") => {
                    text::put(out, "AuthMethod", "None");
                    self.proof = Proof::Done;
                    Ok(())
                }
                (Some(offer), Some(_)) if offer.split(',').any(|method| method == "CHAP") => {
                    text::put(out, "AuthMethod", "CHAP");
                    self.proof = Proof::Method;
                    Ok(())
                }
                // It may say so later in this stage, unless it wants to leave it.
                (None, Some(_)) if self.stage == SECURITY && !request.transit => Ok(()),
                _ => Err(Status::AUTHENTICATION_FAILED),
            },
            Proof::Method => {
                let offer = value("CHAP_A").ok_or(Status::AUTHENTICATION_FAILED)?;
                let algorithm = Algorithm::choose(offer).ok_or(Status::AUTHENTICATION_FAILED)?;
                let (identifier, challenge) = (self.random)().ok_or(Status::TARGET_ERROR)?;
                text::put(out, "CHAP_A", &algorithm.number().to_string());
                text::put(out, "CHAP_I", &identifier.to_string());
                text::put(out, "CHAP_C", &chap::encode(&challenge));
                self.proof = Proof::Challenged {
                    algorithm,
                    identifier,
                    challenge,
                };
                Ok(())
            }
            Proof::Challenged {
                algorithm,
                identifier,
                challenge,
            } => {
                let secret = incoming.ok_or(Status::TARGET_ERROR)?;
                let response = value("CHAP_R").and_then(chap::decode);
                let expected = algorithm.response(*identifier, secret.secret.as_bytes(), challenge);
                let proved = value("CHAP_N") == Some(secret.name.as_str())
                    && response.is_some_and(|response| chap::equal(&response, &expected));
                if !proved {
                    return Err(Status::AUTHENTICATION_FAILED);
                }
                if let Some(asked) = value("CHAP_C") {
                    let outgoing = access.and_then(|access| access.outgoing.as_ref());
                    let own = outgoing.ok_or(Status::AUTHENTICATION_FAILED)?;
                    let asked = chap::decode(asked).ok_or(Status::AUTHENTICATION_FAILED)?;
                    let number = value("CHAP_I")
                        .and_then(text::number)
                        .and_then(|number| u8::try_from(number).ok())
                        .ok_or(Status::AUTHENTICATION_FAILED)?;
                    // Its own challenge handed back: it wants to be told its answer.
                    if chap::equal(&asked, challenge) || own.secret == secret.secret {
                        return Err(Status::AUTHENTICATION_FAILED);
                    }
                    let response = algorithm.response(number, own.secret.as_bytes(), &asked);
                    text::put(out, "CHAP_N", &own.name);
                    text::put(out, "CHAP_R", &chap::encode(&response));
                }
                self.proof = Proof::Done;
                Ok(())
            }
        }
    }

    /// Takes all other keys in, each of them once (RFC 7143, 6.3).
    fn negotiate(&mut self, pairs: &[(&str, &str)], out: &mut Vec<u8>) -> Result<(), Status> {
        for (key, offer) in pairs {
            match *key {
                "InitiatorName" | "InitiatorAlias" | "TargetName" | "SessionType"
                | "AuthMethod" | "CHAP_A" | "CHAP_I" | "CHAP_C" | "CHAP_N" | "CHAP_R" => {}
                _ => {
                    if !self.negotiated.first_time(key) {
                        return Err(Status::INITIATOR_ERROR);
                    }
                    if let Some(answer) = self.parameters.take(key, offer) {
                        text::put(out, key, &answer);
                    }
                }
            }
        }
        if self.stage == OPERATIONAL && !self.declared {
            self.declared = true;
            self.parameters.max_receive = MAX_RECEIVE;
            text::put(out, "MaxRecvDataSegmentLength", &MAX_RECEIVE.to_string());
        }
        Ok(())
    }

    fn reply(&mut self, request: &LoginRequest, leaves: bool, text: Vec<u8>) -> Reply {
        let next = if leaves { request.next } else { 0 };
        if leaves {
            self.stage = next;
        }
        let agreed = match &self.who {
            Some(who) if self.stage == FULL_FEATURE => {
                self.parameters.settle();
                Some(Agreed {
                    nexus: Nexus {
                        initiator: who.initiator.clone(),
                        isid: request.isid,
                    },
                    connection: request.connection,
                    purpose: who.purpose.clone(),
                    parameters: self.parameters,
                })
            }
            _ => None,
        };
        Reply {
            answer: LoginAnswer {
                transit: leaves,
                next,
                ..refusal(request, Status::SUCCESS)
            },
            text,
            agreed,
        }
    }
}

/// The response to a request whose login is refused.
pub fn refusal(request: &LoginRequest, status: Status) -> LoginAnswer {
    LoginAnswer {
        transit: false,
        goes_on: false,
        current: request.current,
        next: 0,
        isid: request.isid,
        tsih: request.tsih,
        task: request.task,
        status: status.0,
    }
}

/// Who wants what, by the first request's keys.
fn identify(
    request: &LoginRequest,
    pairs: &[(&str, &str)],
    directory: &dyn Directory,
) -> Result<Who, Status> {
    let value = |key| text::value(pairs, key);
    let initiator = value("InitiatorName").filter(|name| !name.is_empty());
    let initiator = initiator.ok_or(Status::MISSING_PARAMETER)?.to_owned();
    match value("SessionType").unwrap_or("Normal") {
        "Normal" => {}
        "Discovery" if request.tsih != 0 => return Err(Status::NO_SESSION),
        "Discovery" => {
            return Ok(Who {
                initiator,
                purpose: Purpose::Discovery,
                access: None,
            });
        }
        _ => return Err(Status::SESSION_TYPE),
    }
    let name = value("TargetName").ok_or(Status::MISSING_PARAMETER)?;
    let target = match directory.find(name) {
        Found::Live(target) if target.gate().is_closed() => return Err(Status::REMOVED),
        Found::Live(target) => target,
        Found::Closed => return Err(Status::REMOVED),
        Found::Unknown => return Err(Status::NOT_FOUND),
    };
    let access = target.access(&initiator).cloned();
    if access.is_none() {
        return Err(Status::FORBIDDEN);
    }
    if request.tsih != 0 {
        return Err(if target.has_session(request.tsih) {
            Status::TOO_MANY_CONNECTIONS
        } else {
            Status::NO_SESSION
        });
    }
    Ok(Who {
        initiator,
        purpose: Purpose::Normal(target),
        access,
    })
}

#[cfg(test)]
#[path = "login_tests.rs"]
mod tests;
