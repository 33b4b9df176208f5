//! Metrics for Prometheus.

use std::fmt::{self, Write as _};

use axum::{
    Router,
    http::{HeaderMap, StatusCode, header},
    response::IntoResponse,
    routing::get,
};

use crate::{blocking::aside, metrics::Metrics, service::Service};

const OPEN_METRICS: &str = "application/openmetrics-text";
const OPEN: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const PLAIN: &str = "text/plain; version=0.0.4; charset=utf-8";

/// `/metrics`: in the OpenMetrics text format for who accepts that, as Prometheus does, else in Prometheus' own, which is all that many
/// other readers know.
pub fn metrics(metrics: Metrics, service: Service) -> Router {
    let scrape = move |headers: HeaderMap| async move {
        let accepts = headers.get_all(header::ACCEPT).into_iter().filter_map(|value| value.to_str().ok());
        let is_open = accepts.into_iter().any(|value| value.contains(OPEN_METRICS));
        // Thousands of models have megabytes of them.
        let text = aside(usize::MAX, move || {
            let text = metrics.encode(&service.scraped())?;
            Ok::<_, fmt::Error>(if is_open { text } else { plain(&text) })
        });
        let kind = if is_open { OPEN } else { PLAIN };
        match text.await {
            Ok(text) => ([(header::CONTENT_TYPE, kind)], text).into_response(),
            Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
        }
    };
    Router::new().route("/metrics", get(scrape))
}

/// OpenMetrics in Prometheus' own text format: a counter has its full name in the lines about it, and there are neither units nor an
/// end. No metric here has exemplars.
fn plain(open: &str) -> String {
    let mut text = String::with_capacity(open.len());
    let mut help = None;
    for line in open.lines() {
        let words: Vec<&str> = line.splitn(4, ' ').collect();
        match words[..] {
            ["#", "HELP", ..] => help = Some(words[3..].concat()),
            ["#", "TYPE", name, kind] => {
                let suffix = if kind == "counter" { "_total" } else { "" };
                // What has no type there only for want of that suffix is a counter here, as Triton says.
                let kind = if kind == "unknown" { "counter" } else { kind };
                // Into a string, which does not fail.
                if let Some(help) = help.take() {
                    let _ = writeln!(text, "# HELP {name}{suffix} {help}");
                }
                let _ = writeln!(text, "# TYPE {name}{suffix} {kind}");
            }
            ["#", ..] => {}
            _ => {
                text.push_str(line);
                text.push('\n');
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_prometheus_alone_knows_is_left_out_for_others() {
        let open = "# HELP asked Requests, with # signs.\n# TYPE asked counter\nasked_total{model=\"a # b\"} 3\n\
                    # HELP took_seconds Time.\n# TYPE took_seconds histogram\n# UNIT took_seconds seconds\n\
                    took_seconds_sum 0.5\ntook_seconds_count 1\ntook_seconds_bucket{le=\"+Inf\"} 1\n\
                    # HELP nv_x Old.\n# TYPE nv_x unknown\nnv_x 1\n# EOF\n";
        let expected = "# HELP asked_total Requests, with # signs.\n# TYPE asked_total counter\nasked_total{model=\"a # b\"} 3\n\
                        # HELP took_seconds Time.\n# TYPE took_seconds histogram\n\
                        took_seconds_sum 0.5\ntook_seconds_count 1\ntook_seconds_bucket{le=\"+Inf\"} 1\n\
                        # HELP nv_x Old.\n# TYPE nv_x counter\nnv_x 1\n";
        assert_eq!(plain(open), expected);
    }
}
