//! Models that come and go by request, in the words of Triton and of KServe.

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;
use sensorium_proto::inference::{
    ModelRepositoryParameter, RepositoryIndexRequest, RepositoryIndexResponse, RepositoryModelLoadRequest,
    RepositoryModelLoadResponse, RepositoryModelUnloadRequest, RepositoryModelUnloadResponse,
    model_repository_parameter::ParameterChoice, repository_index_response::ModelIndex,
};
use tokio::task::spawn_blocking;
use tonic::{Code, Status};

use super::Service;
use crate::{
    repository::{ControlError, LoadParameters},
    wire::excerpt,
};

impl Service {
    pub(crate) async fn repository_index(
        &self,
        request: &RepositoryIndexRequest,
    ) -> Result<RepositoryIndexResponse, Status> {
        if !request.repository_name.is_empty() {
            return Err(Status::unimplemented(
                "repositories have no names on this server; leave repository_name empty",
            ));
        }
        let (repository, only_ready) = (self.repository()?.clone(), request.ready);
        // It looks at folders, which may be slow, or away.
        let entries = spawn_blocking(move || repository.index(only_ready)).await.map_err(|error| {
            tracing::error!(%error, "the repository could not be listed");
            Status::internal("the repository could not be listed")
        })?;
        let models = entries.into_iter().map(|entry| ModelIndex {
            name: entry.name,
            version: entry.version,
            state: entry.state.as_str().to_owned(),
            reason: entry.reason,
        });
        Ok(RepositoryIndexResponse { models: models.collect() })
    }

    /// That clients may load and unload models at all.
    ///
    /// # Errors
    /// UNAVAILABLE, with the mode in which they do not.
    pub(crate) fn models_may_change(&self) -> Result<(), Status> {
        self.repository()?.may_change().map_err(status)
    }

    pub(crate) async fn repository_model_load(
        &self,
        request: RepositoryModelLoadRequest,
    ) -> Result<RepositoryModelLoadResponse, Status> {
        let model_name = name(request.model_name, request.repository_name);
        let parameters = load_parameters(request.parameters)?;
        self.repository()?.load(&model_name, parameters).await.map_err(status)?;
        tracing::info!(model = model_name, "loaded by request");
        Ok(RepositoryModelLoadResponse { model_name, is_loaded: true })
    }

    pub(crate) async fn repository_model_unload(
        &self,
        request: RepositoryModelUnloadRequest,
    ) -> Result<RepositoryModelUnloadResponse, Status> {
        let model_name = name(request.model_name, request.repository_name);
        let mut dependents = false;
        for (parameter, value) in request.parameters {
            match (parameter.as_str(), value.parameter_choice) {
                ("unload_dependents", Some(ParameterChoice::BoolParam(value))) => dependents = value,
                _ => return Err(unknown(&parameter, "unload_dependents, a bool")),
            }
        }
        self.repository()?.unload(&model_name, dependents).await.map_err(status)?;
        tracing::info!(model = model_name, "unloaded by request");
        Ok(RepositoryModelUnloadResponse { model_name, is_unloaded: true })
    }
}

/// KServe's clients put the model where Triton's put the repository, which here has no name.
fn name(model: String, repository: String) -> String {
    if model.is_empty() { repository } else { model }
}

/// `config` is a configuration, `file:PATH` the content of a file.
fn load_parameters(parameters: HashMap<String, ModelRepositoryParameter>) -> Result<LoadParameters, Status> {
    let mut found = LoadParameters { config: None, files: BTreeMap::new() };
    for (name, value) in parameters {
        match (name.strip_prefix("file:"), value.parameter_choice) {
            (None, Some(ParameterChoice::StringParam(text))) if name == "config" => found.config = Some(text),
            (Some(path), Some(ParameterChoice::BytesParam(bytes))) => {
                found.files.insert(path.to_owned(), bytes);
            }
            (Some(path), Some(ParameterChoice::StringParam(text))) => {
                found.files.insert(path.to_owned(), Bytes::from(text));
            }
            _ => return Err(unknown(&name, "config, a string, and file:PATH, bytes")),
        }
    }
    Ok(found)
}

fn unknown(name: &str, known: &str) -> Status {
    Status::invalid_argument(format!(
        "parameter {:?} is not known, or of another type; known are {known}",
        excerpt(name)
    ))
}

#[expect(clippy::needless_pass_by_value, reason = "it is an argument of `map_err`")]
fn status(error: ControlError) -> Status {
    let code = match &error {
        ControlError::Forbidden { .. } => Code::Unavailable,
        ControlError::NotFound { .. } => Code::NotFound,
        ControlError::Parameters { .. } | ControlError::Failed { .. } => Code::InvalidArgument,
    };
    Status::new(code, crate::error::shortened(error.to_string()))
}
