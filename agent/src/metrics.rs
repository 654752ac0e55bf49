//! /metrics, /healthz and /readyz of one process.
//!
//! Each room registers its own metrics; this serves them, as OpenMetrics where
//! the caller asks for it and else as Prometheus text, and says which of the
//! parts that must be up are.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};

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

/// A scrape that takes longer is given up: less than Prometheus waits.
const SCRAPE: Duration = Duration::from_secs(8);

struct Served {
    registry: Registry,
    readiness: Arc<Readiness>,
    /// One thread scrapes at a time, so that one that hangs is the only one.
    turn: Arc<Semaphore>,
}

impl Served {
    fn new(registry: Registry, readiness: Arc<Readiness>) -> Arc<Self> {
        Arc::new(Self {
            registry,
            readiness,
            turn: Arc::new(Semaphore::new(1)),
        })
    }

    /// All metrics as text, or why they are not to be had. Some are read from
    /// the kernel meanwhile, so it is done where a thread may wait.
    async fn scrape(self: Arc<Self>, within: Duration) -> Result<String, (StatusCode, String)> {
        let failed = |error: String| {
            let why = format!("encode metrics: {error}\n");
            (StatusCode::INTERNAL_SERVER_ERROR, why)
        };
        let scraped = async {
            let turn = Arc::clone(&self.turn).acquire_owned().await;
            let encoding = tokio::task::spawn_blocking(move || {
                let _turn = turn;
                let mut text = String::new();
                encode(&mut text, &self.registry).map(|()| text)
            });
            match encoding.await {
                Ok(Ok(text)) => Ok(text),
                Ok(Err(error)) => Err(failed(error.to_string())),
                Err(panic) => Err(failed(panic.to_string())),
            }
        };
        let late = |_| {
            let why = format!("metrics could not be read within {within:?}\n");
            (StatusCode::SERVICE_UNAVAILABLE, why)
        };
        tokio::time::timeout(within, scraped).await.map_err(late)?
    }
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
        .with_state(Served::new(registry, readiness));
    let stopped = async move { drop(stop.wait_for(|stop| *stop).await) };
    axum::serve(listener, router)
        .with_graceful_shutdown(stopped)
        .await
}

async fn metrics(State(served): State<Arc<Served>>, asked: HeaderMap) -> Response {
    let accepted = asked
        .get(header::ACCEPT)
        .and_then(|value| value.to_str().ok());
    let open = accepted.is_some_and(|value| value.contains("application/openmetrics-text"));
    match served.scrape(SCRAPE).await {
        Ok(text) if open => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Ok(text) => {
            let kind = "text/plain; version=0.0.4; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], prometheus_text(&text)).into_response()
        }
        Err(error) => error.into_response(),
    }
}

/// OpenMetrics text as Prometheus' text format 0.0.4 has it: there a family
/// bears the name of its samples, and knows neither units nor infos.
fn prometheus_text(open: &str) -> String {
    let suffix = |kind: &str| match kind {
        "counter" => "_total",
        "info" => "_info",
        _ => "",
    };
    let mut kinds = BTreeMap::new();
    for line in open.lines() {
        if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|l| l.split_once(' ')) {
            kinds.insert(name, kind);
        }
    }
    let mut text = String::with_capacity(open.len());
    for line in open.lines() {
        let mut words = line.splitn(4, ' ');
        let line = match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some("UNIT" | "EOF"), ..) => continue,
            (Some("#"), Some(what), Some(name), Some(rest)) => {
                let kind = kinds.get(name).copied().unwrap_or_default();
                let rest = match (what, rest) {
                    ("TYPE", "info") => "gauge",
                    ("TYPE", "unknown") => "untyped",
                    (_, rest) => rest,
                };
                format!("# {what} {name}{} {rest}", suffix(kind))
            }
            _ => line.to_owned(),
        };
        text.push_str(&line);
        text.push('\n');
    }
    text
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
    use std::sync::atomic::{AtomicBool, Ordering};

    use prometheus_client::collector::Collector;
    use prometheus_client::encoding::DescriptorEncoder;

    use super::*;

    #[test]
    fn families_bear_the_names_of_their_samples() {
        let open = "# HELP drover_x Things done.\n# TYPE drover_x counter\ndrover_x_total{a=\"b\"} 1\n\
            # HELP drover_y_seconds Time.\n# TYPE drover_y_seconds gauge\n# UNIT drover_y_seconds seconds\n\
            drover_y_seconds 2\n# HELP drover_z It.\n# TYPE drover_z info\ndrover_z_info{v=\"1\"} 1\n# EOF\n";
        let expected = "# HELP drover_x_total Things done.\n# TYPE drover_x_total counter\ndrover_x_total{a=\"b\"} 1\n\
            # HELP drover_y_seconds Time.\n# TYPE drover_y_seconds gauge\ndrover_y_seconds 2\n\
            # HELP drover_z_info It.\n# TYPE drover_z_info gauge\ndrover_z_info{v=\"1\"} 1\n";
        assert_eq!(prometheus_text(open), expected);
    }

    /// Does not encode itself as long as it hangs.
    #[derive(Debug)]
    struct Hangs(Arc<AtomicBool>);

    impl Collector for Hangs {
        fn encode(&self, _: DescriptorEncoder<'_>) -> std::fmt::Result {
            while self.0.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(())
        }
    }

    #[tokio::test]
    async fn a_collector_that_hangs_holds_one_thread_and_no_scrape() {
        let hangs = Arc::new(AtomicBool::new(true));
        let mut registry = registry();
        registry.register_collector(Box::new(Hangs(Arc::clone(&hangs))));
        let served = Served::new(registry, Arc::default());
        let scrape = |within| Arc::clone(&served).scrape(within);
        for _ in 0..3 {
            let (code, why) = scrape(Duration::from_millis(50)).await.unwrap_err();
            assert_eq!(code, StatusCode::SERVICE_UNAVAILABLE, "{why}");
        }
        // The scrapes and their one thread.
        assert_eq!(Arc::strong_count(&served), 2);
        hangs.store(false, Ordering::SeqCst);
        let text = scrape(Duration::from_secs(60)).await.unwrap();
        assert!(text.contains("drover_build_info"), "{text}");
    }

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
