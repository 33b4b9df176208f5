//! What can be changed while the server runs: which log lines are written, which requests are traced.

use std::collections::HashMap;

use sensorium_proto::inference::{
    LogSettingsRequest, LogSettingsResponse, TraceSettingRequest, TraceSettingResponse, log_settings_request,
    log_settings_response, trace_setting_request, trace_setting_response,
};
use sensorium_telemetry::SetSampling;
use tonic::Status;

use super::Service;
use crate::wire::excerpt;

use log_settings_request::setting_value::ParameterChoice as Asked;
use log_settings_response::setting_value::ParameterChoice as Said;

impl Service {
    /// Changes the log level where the request says so, and returns what applies. Triton's settings are read as levels:
    /// `log_verbose_level` 1 is debug, 2 and above trace; below them the least severe of info, warning and error that is
    /// on.
    pub(crate) fn log_settings(&self, request: LogSettingsRequest) -> Result<LogSettingsResponse, Status> {
        let before = Levels::of(&self.logs.filter());
        let mut levels = before;
        for (name, value) in request.settings {
            let value = value.parameter_choice;
            match (name.as_str(), value) {
                ("log_info", Some(Asked::BoolParam(on))) => levels.info = on,
                ("log_warning", Some(Asked::BoolParam(on))) => levels.warning = on,
                ("log_error", Some(Asked::BoolParam(on))) => levels.error = on,
                ("log_verbose_level", Some(Asked::Uint32Param(level))) => levels.verbose = level,
                // What clients echo that read the settings first.
                ("log_file", Some(Asked::StringParam(file))) if file.is_empty() => {}
                ("log_format", Some(Asked::StringParam(format))) if format == LOG_FORMAT || format == "default" => {}
                ("log_file", _) => {
                    return Err(Status::unimplemented("logs go to standard error; leave log_file empty"));
                }
                ("log_format", _) => return Err(Status::unimplemented("logs are JSON; leave log_format out")),
                _ => {
                    let name = excerpt(&name);
                    return Err(Status::invalid_argument(format!(
                        "log setting {name:?} is not known, or of another type; known are log_info, log_warning and \
                         log_error, bools, and log_verbose_level, an unsigned integer"
                    )));
                }
            }
        }
        if levels != before {
            self.logs.set(levels.filter()).map_err(|error| Status::internal(error.to_string()))?;
            tracing::info!(filter = levels.filter(), "the log level was changed by request");
        }
        // A severity is on below one that is.
        let levels = Levels::of(&self.logs.filter());
        let setting = |name: &str, value| {
            (name.to_owned(), log_settings_response::SettingValue { parameter_choice: Some(value) })
        };
        let settings = HashMap::from([
            setting("log_info", Said::BoolParam(levels.info)),
            setting("log_warning", Said::BoolParam(levels.warning)),
            setting("log_error", Said::BoolParam(levels.error)),
            setting("log_verbose_level", Said::Uint32Param(levels.verbose)),
            setting("log_format", Said::StringParam(LOG_FORMAT.to_owned())),
            setting("log_file", Said::StringParam(String::new())),
        ]);
        Ok(LogSettingsResponse { settings })
    }

    /// Changes which requests are traced where the request says so, and returns what applies.
    pub(crate) fn trace_setting(&self, request: TraceSettingRequest) -> Result<TraceSettingResponse, Status> {
        let model = (!request.model_name.is_empty()).then_some(request.model_name.as_str());
        if let Some(model) = model {
            self.repository()?.model(model, "").map_err(|error| error.into_status(model))?;
        }
        if !request.settings.is_empty() {
            self.traces.set(model, changed(self.traces.set_for(model), request.settings)?);
        }
        let sampling = self.traces.sampling(model);
        let is_traced = sampling.enabled && self.traces.is_exported();
        let setting =
            |name: &str, value: String| (name.to_owned(), trace_setting_response::SettingValue { value: vec![value] });
        let settings = HashMap::from([
            // Whatever is set: nothing is traced that nobody takes.
            setting("trace_level", if is_traced { "TIMESTAMPS" } else { "OFF" }.to_owned()),
            setting("trace_rate", sampling.rate.to_string()),
            setting("trace_count", sampling.count.map_or_else(|| "-1".to_owned(), |count| count.to_string())),
            setting("trace_mode", "opentelemetry".to_owned()),
        ]);
        Ok(TraceSettingResponse { settings })
    }
}

const LOG_FORMAT: &str = "json";

/// Triton's switches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Levels {
    info: bool,
    warning: bool,
    error: bool,
    verbose: u32,
}

impl Levels {
    /// The switches that a filter stands for; one with targets is read by its first level.
    fn of(filter: &str) -> Self {
        let known = ["off", "error", "warn", "info", "debug", "trace"];
        let is_level = |part: &&str| known.contains(part);
        let level = filter.split(',').find(is_level).unwrap_or("info");
        let rank = known.iter().position(|name| *name == level).unwrap_or(3);
        let verbose = rank.saturating_sub(3) as u32; // 0, 1 or 2
        Self { info: rank >= 3, warning: rank >= 2, error: rank >= 1, verbose }
    }

    /// The filter that comes closest: levels are a ladder here.
    fn filter(self) -> &'static str {
        match self {
            Self { verbose: 2.., .. } => "trace",
            Self { verbose: 1, .. } => "debug",
            Self { info: true, .. } => "info",
            Self { warning: true, .. } => "warn",
            Self { error: true, .. } => "error",
            _ => "off",
        }
    }
}

/// `set` with the values of a request; a setting without a value is cleared.
fn changed(
    mut set: SetSampling,
    settings: HashMap<String, trace_setting_request::SettingValue>,
) -> Result<SetSampling, Status> {
    for (name, setting) in settings {
        let Some(value) = setting.value.first() else {
            match name.as_str() {
                "trace_level" => set.enabled = None,
                "trace_rate" => set.rate = None,
                "trace_count" => set.count = None,
                _ => {}
            }
            continue;
        };
        let wrong = |wanted: &str| {
            let message = format!("trace setting {:?} is {:?}, it must be {wanted}", excerpt(&name), excerpt(value));
            Status::invalid_argument(message)
        };
        match name.as_str() {
            "trace_level" => {
                let enabled = match setting.value.iter().map(String::as_str).collect::<Vec<_>>()[..] {
                    ["OFF"] => false,
                    ["TIMESTAMPS"] => true,
                    _ => return Err(wrong("OFF or TIMESTAMPS; tensors are not traced")),
                };
                set.enabled = Some(enabled);
            }
            "trace_rate" => {
                let rate = value.parse().ok().filter(|rate| *rate > 0);
                set.rate = Some(rate.ok_or_else(|| wrong("one request of how many is traced, at least 1"))?);
            }
            "trace_count" => {
                let count: Option<i64> = value.parse().ok().filter(|count| *count >= -1);
                let count = count.ok_or_else(|| wrong("how many requests are traced, or -1"))?;
                set.count = Some(u64::try_from(count).ok());
            }
            "trace_mode" if value == "opentelemetry" => {}
            "log_frequency" if value == "0" => {}
            "trace_mode" | "log_frequency" | "trace_file" => {
                return Err(Status::unimplemented("traces are exported by OpenTelemetry, and not written to files"));
            }
            _ => return Err(wrong("one of trace_level, trace_rate and trace_count")),
        }
    }
    Ok(set)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(settings: &[(&str, &str)]) -> HashMap<String, trace_setting_request::SettingValue> {
        let setting = |(name, value): &(&str, &str)| {
            let value = if value.is_empty() { Vec::new() } else { vec![(*value).to_owned()] };
            ((*name).to_owned(), trace_setting_request::SettingValue { value })
        };
        settings.iter().map(setting).collect()
    }

    #[test]
    fn tritons_switches_are_a_ladder_of_levels() {
        for level in ["off", "error", "warn", "info", "debug", "trace"] {
            assert_eq!(Levels::of(level).filter(), level);
        }
        assert_eq!(Levels::of("hyper=off,debug").filter(), "debug");
        let quiet = Levels { info: false, ..Levels::of("info") };
        assert_eq!((quiet.filter(), Levels { verbose: 7, ..quiet }.filter()), ("warn", "trace"));
    }

    #[test]
    fn trace_settings_change_what_they_name() {
        let none = SetSampling::default();
        let set = changed(none, settings(&[("trace_rate", "100"), ("trace_count", "5")])).unwrap();
        assert_eq!(set, SetSampling { enabled: None, rate: Some(100), count: Some(Some(5)) });
        let set = changed(set, settings(&[("trace_level", "OFF"), ("trace_count", "-1"), ("trace_rate", "")])).unwrap();
        assert_eq!(set, SetSampling { enabled: Some(false), rate: None, count: Some(None) });
        assert_eq!(changed(set, settings(&[("trace_count", ""), ("trace_level", "")])).unwrap(), none);
        for wrong in [
            ("trace_rate", "0"),
            ("trace_rate", "x"),
            ("trace_count", "-2"),
            ("trace_level", "TENSORS"),
            ("trace_file", "/tmp/x"),
            ("other", "1"),
        ] {
            assert!(changed(none, settings(&[wrong])).is_err(), "{wrong:?}");
        }
    }
}
