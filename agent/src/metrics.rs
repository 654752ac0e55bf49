//! /metrics, /healthz and /readyz of one process.
//!
//! Each room registers its own metrics; this serves them as OpenMetrics text,
//! and says which of the parts that must be up are.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::watch;

/// Which parts of a process are up. A part that is named once counts for ever.
#[derive(Debug, Default)]
pub struct Readiness {
    parts: Mutex<BTreeMap<&'static str, Result<(), String>>>,
}

impl Readiness {
    /// Notes that a part is up, or why it is not.
    pub fn note(&self, part: &'static str, state: Result<(), String>) {
        let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        parts.insert(part, state);
    }

    /// Whether every part is up, and a line for each.
    pub fn report(&self) -> (bool, String) {
        let parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        let line = |(part, state): (&&str, &Result<(), String>)| match state {
            Ok(()) => format!("{part}: ok\n"),
            Err(why) => format!("{part}: {why}\n"),
        };
        (
            parts.values().all(Result::is_ok),
            parts.iter().map(line).collect(),
        )
    }
}

struct Served {
    registry: Registry,
    readiness: Arc<Readiness>,
}

/// A registry that already says which drover this is.
pub fn registry() -> Registry {
    let mut registry = Registry::default();
    let version = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
    registry.register("drover_build", "The drover that is running", version);
    registry
}

/// Serves until `stop` says so.
///
/// # Errors
/// When the address cannot be listened on.
pub async fn serve(
    address: SocketAddr,
    registry: Registry,
    readiness: Arc<Readiness>,
    mut stop: watch::Receiver<bool>,
) -> std::io::Result<()> {
    let listener = TcpListener::bind(address).await?;
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .with_state(Arc::new(Served {
            registry,
            readiness,
        }));
    let stopped = async move { drop(stop.wait_for(|stop| *stop).await) };
    axum::serve(listener, router)
        .with_graceful_shutdown(stopped)
        .await
}

async fn metrics(State(served): State<Arc<Served>>) -> Response {
    let mut text = String::new();
    match encode(&mut text, &served.registry) {
        Ok(()) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(error) => (
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("encode metrics: {error}\n"),
        )
            .into_response(),
    }
}

async fn ready(State(served): State<Arc<Served>>) -> Response {
    let (ready, report) = served.readiness.report();
    let code = if ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (code, report).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_part_that_is_down_is_enough() {
        let readiness = Readiness::default();
        readiness.note("pool", Ok(()));
        assert!(readiness.report().0);
        readiness.note("controller", Err("does not answer".into()));
        let (ready, report) = readiness.report();
        assert!(
            !ready && report.contains("controller: does not answer") && report.contains("pool: ok")
        );
        readiness.note("controller", Ok(()));
        assert!(readiness.report().0);
    }
}
