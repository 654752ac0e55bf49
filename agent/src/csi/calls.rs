//! How every call is run: to its end, logged and counted.
//!
//! A call works in a task of its own. A caller that goes away, or whose
//! deadline passes, gets no answer any more, but what was begun is finished and
//! not left half done at whatever point it had reached: a repeat finds it done,
//! or joins it. Secrets, contexts and mount flags are never logged.

use std::future::Future;
use std::time::{Duration, Instant};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use tonic::metadata::MetadataMap;
use tonic::{Code, Response, Status};
use tracing::{debug, info, warn};

use super::status::{Refusal, code_name};

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    method: &'static str,
    code: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Method {
    method: &'static str,
}

/// Whether a call changes anything; those that only look are logged at debug.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It may change something.
    Acts,
    /// It only looks.
    Looks,
}

/// Runs calls, logs and counts them.
#[derive(Debug, Clone)]
pub struct Calls {
    requests: Family<Outcome, Counter>,
    seconds: Family<Method, Histogram, fn() -> Histogram>,
}

/// From a map lookup to an unstage that waits for a live holder.
const SECONDS: [f64; 13] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0,
];

impl Default for Calls {
    fn default() -> Self {
        Self {
            requests: Family::default(),
            seconds: Family::new_with_constructor(|| Histogram::new(SECONDS)),
        }
    }
}

impl Calls {
    /// Puts the counters `drover_csi_requests_total{method,code}` and the
    /// histograms `drover_csi_request_seconds{method}` into `registry`.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "drover_csi_requests",
            "CSI calls answered",
            self.requests.clone(),
        );
        registry.register(
            "drover_csi_request_seconds",
            "Time from a CSI call to its answer",
            self.seconds.clone(),
        );
    }

    /// Runs `call` to its end, whether or not somebody still waits for it.
    /// `object` is what the call is about, for the log.
    pub async fn run<T, F>(
        &self,
        method: &'static str,
        kind: Kind,
        object: &str,
        call: F,
    ) -> Result<Response<T>, Status>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Refusal>> + Send + 'static,
    {
        let object: String = object.chars().take(128).collect();
        let calls = self.clone();
        let task = tokio::spawn(async move {
            let begun = Instant::now();
            // A task within the task: a panic of the call's is counted, too.
            let answer = match tokio::spawn(call).await {
                Ok(answer) => answer,
                Err(error) => Err(Refusal::Lost {
                    method,
                    detail: error.to_string(),
                }),
            };
            calls.record(method, kind, &object, &answer, begun.elapsed());
            answer
        });
        let answer = match task.await {
            Ok(answer) => answer,
            Err(error) => Err(Refusal::Lost {
                method,
                detail: error.to_string(),
            }),
        };
        Ok(Response::new(answer?))
    }

    fn record<T>(
        &self,
        method: &'static str,
        kind: Kind,
        object: &str,
        answer: &Result<T, Refusal>,
        took: Duration,
    ) {
        let code = code_name(answer.as_ref().err().map_or(Code::Ok, Refusal::code));
        self.requests.get_or_create(&Outcome { method, code }).inc();
        self.seconds
            .get_or_create(&Method { method })
            .observe(took.as_secs_f64());
        match (answer, kind) {
            (Ok(_), Kind::Acts) => info!(method, object, code, ?took, "csi call"),
            (Ok(_), Kind::Looks) => debug!(method, object, code, ?took, "csi call"),
            (Err(error), _) => warn!(method, object, code, ?took, %error, "csi call refused"),
        }
    }
}

/// How long the caller still waits, if it says (gRPC's `grpc-timeout`: up to
/// eight digits and a unit; gRPC over HTTP/2, "Requests").
pub fn caller_deadline(metadata: &MetadataMap) -> Option<Duration> {
    let text = metadata.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(count * 3600)),
        "M" => Some(Duration::from_secs(count * 60)),
        "S" => Some(Duration::from_secs(count)),
        "m" => Some(Duration::from_millis(count)),
        "u" => Some(Duration::from_micros(count)),
        "n" => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grpc_timeouts_are_read_as_grpc_writes_them() {
        let read = |text: &str| {
            let mut metadata = MetadataMap::new();
            metadata.insert("grpc-timeout", text.parse().unwrap());
            caller_deadline(&metadata)
        };
        assert_eq!(read("10S"), Some(Duration::from_secs(10)));
        assert_eq!(read("1500m"), Some(Duration::from_millis(1500)));
        assert_eq!(
            read("99999999H"),
            Some(Duration::from_secs(99_999_999 * 3600))
        );
        assert_eq!(read("7u"), Some(Duration::from_micros(7)));
        for wrong in ["", "S", "10", "10 S", "-1S", "123456789S", "10s", "1é"] {
            let mut metadata = MetadataMap::new();
            if let Ok(value) = wrong.parse() {
                metadata.insert("grpc-timeout", value);
            }
            assert_eq!(caller_deadline(&metadata), None, "{wrong:?}");
        }
        assert_eq!(caller_deadline(&MetadataMap::new()), None);
    }

    #[tokio::test]
    async fn a_call_that_nobody_waits_for_ends_all_the_same() {
        let calls = Calls::default();
        let (go, gate) = tokio::sync::oneshot::channel::<()>();
        let (done, ended) = tokio::sync::oneshot::channel();
        {
            let call = calls.run("Test", Kind::Acts, "x", async move {
                let _ = gate.await;
                let _ = done.send(());
                Ok(())
            });
            // One poll starts it; then its caller goes away.
            assert!(futures::poll!(std::pin::pin!(call)).is_pending());
        }
        go.send(()).unwrap();
        ended.await.unwrap();
    }

    #[tokio::test]
    async fn every_end_of_a_call_is_counted_with_its_code() {
        let calls = Calls::default();
        let mut registry = Registry::default();
        calls.register(&mut registry);
        calls
            .run("Probe", Kind::Looks, "", async { Ok(()) })
            .await
            .unwrap();
        let refused = calls
            .run::<(), _>("Stage", Kind::Acts, "", async {
                Err(Refusal::NotServed("Stage"))
            })
            .await;
        assert_eq!(refused.unwrap_err().code(), Code::Unimplemented);
        let lost = calls.run::<(), _>("Stage", Kind::Acts, "", async { panic!("on purpose") });
        assert_eq!(lost.await.unwrap_err().code(), Code::Internal);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            "drover_csi_requests_total{method=\"Probe\",code=\"OK\"} 1",
            "drover_csi_requests_total{method=\"Stage\",code=\"UNIMPLEMENTED\"} 1",
            "drover_csi_requests_total{method=\"Stage\",code=\"INTERNAL\"} 1",
            "drover_csi_request_seconds_count{method=\"Stage\"} 2",
        ] {
            assert!(text.contains(line), "{line} is not in:\n{text}");
        }
    }
}
