//! Ginkgo's JSON report, summed up.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// The sum of a run of csi-sanity.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Specs that ran.
    pub run: u64,
    /// Of them, those that passed.
    pub passed: u64,
    /// Of them, those that failed in whatever way.
    pub failed: u64,
    /// Specs that did not run.
    pub skipped: u64,
    /// The skipped, with csi-sanity's reason.
    pub skips: Vec<String>,
    /// The failed, with csi-sanity's message.
    pub failures: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Suite {
    spec_reports: Option<Vec<Spec>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Spec {
    container_hierarchy_texts: Option<Vec<String>>,
    leaf_node_type: String,
    leaf_node_text: String,
    state: String,
    failure: Option<Failure>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Failure {
    message: Option<String>,
}

impl Report {
    /// Reads Ginkgo's report.
    ///
    /// # Errors
    /// When it is none.
    pub fn read(text: &str) -> Result<Self> {
        let suites: Vec<Suite> = serde_json::from_str(text).context("no report of Ginkgo")?;
        let mut report = Self::default();
        for spec in suites
            .into_iter()
            .filter_map(|suite| suite.spec_reports)
            .flatten()
        {
            report.add(spec);
        }
        Ok(report)
    }

    fn add(&mut self, spec: Spec) {
        let message = spec
            .failure
            .and_then(|failure| failure.message)
            .unwrap_or_default();
        let is_spec = spec.leaf_node_type == "It";
        let mut name = spec.container_hierarchy_texts.unwrap_or_default().join(" ");
        if !name.is_empty() {
            name.push(' ');
        }
        name.push_str(if is_spec {
            &spec.leaf_node_text
        } else {
            &spec.leaf_node_type
        });
        let told = if message.is_empty() {
            name
        } else {
            format!("{name}: {message}")
        };
        match (spec.state.as_str(), is_spec) {
            ("passed", true) => {
                self.run += 1;
                self.passed += 1;
            }
            // The suite's own set-up and clean-up are no specs.
            ("passed" | "skipped" | "pending", false) => {}
            ("skipped" | "pending", true) => {
                self.skipped += 1;
                self.skips.push(told);
            }
            // Failed, panicked, interrupted, aborted, timed out; and a failed
            // set-up fails the run.
            (_, _) => {
                self.run += 1;
                self.failed += 1;
                self.failures.push(told);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_end_of_a_spec_is_counted() {
        let text = r#"[{"SpecReports":[
            {"ContainerHierarchyTexts":null,"LeafNodeType":"BeforeSuite","LeafNodeText":"","State":"passed"},
            {"ContainerHierarchyTexts":["Node","Stage"],"LeafNodeType":"It","LeafNodeText":"works","State":"passed"},
            {"ContainerHierarchyTexts":["Node"],"LeafNodeType":"It","LeafNodeText":"waits","State":"timedout","Failure":{"Message":"too long"}},
            {"ContainerHierarchyTexts":["Group"],"LeafNodeType":"It","LeafNodeText":"snaps","State":"skipped","Failure":{"Message":"not advertised"}},
            {"ContainerHierarchyTexts":null,"LeafNodeType":"AfterSuite","LeafNodeText":"","State":"panicked"}
        ]}]"#;
        let report = Report::read(text).unwrap();
        assert_eq!(
            (report.run, report.passed, report.failed, report.skipped),
            (3, 1, 2, 1)
        );
        assert_eq!(report.skips, ["Group snaps: not advertised"]);
        assert_eq!(report.failures, ["Node waits: too long", "AfterSuite"]);
    }

    #[test]
    fn something_else_is_refused() {
        assert!(Report::read("{}").is_err());
        assert_eq!(Report::read("[]").unwrap(), Report::default());
    }
}
