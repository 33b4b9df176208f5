//! `grpc.health.v1`, of the server as a whole: every service of it is as ready as its models.
//! <https://github.com/grpc/grpc/blob/master/doc/health-checking.md>

use std::pin::Pin;

use sensorium_proto::{
    inference::grpc_inference_service_server::GrpcInferenceServiceServer,
    multimodal::multimodal_service_server::MultimodalServiceServer,
};
use tokio::sync::watch;
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, async_trait, server::NamedService};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus, health_server};

use super::Service;

/// Services that may be asked about; empty is the server.
const SERVICES: [&str; 3] = ["", GrpcInferenceServiceServer::<Service>::NAME, MultimodalServiceServer::<Service>::NAME];

fn response(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse { status: status.into() }
}

fn of(is_ready: bool) -> ServingStatus {
    if is_ready { ServingStatus::Serving } else { ServingStatus::NotServing }
}

/// Answers clients of `grpc.health.v1`.
#[derive(Clone, Debug)]
pub(crate) struct Health {
    ready: watch::Receiver<bool>,
    draining: CancellationToken,
}

impl Service {
    pub(crate) fn health(&self) -> Health {
        Health { ready: self.ready.clone(), draining: self.draining.clone() }
    }
}

#[async_trait]
impl health_server::Health for Health {
    async fn check(&self, request: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        let name = &request.get_ref().service;
        if SERVICES.contains(&name.as_str()) {
            return Ok(Response::new(response(of(*self.ready.borrow()))));
        }
        let name = crate::wire::excerpt(name);
        Err(Status::not_found(format!("this server has no service {name}; it has {}", SERVICES[1..].join(" and "))))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    /// Every change, until the server ends: a call that never did would hold its drain.
    async fn watch(&self, request: Request<HealthCheckRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let is_known = SERVICES.contains(&request.get_ref().service.as_str());
        let (ready, draining) = (self.ready.clone(), self.draining.clone());
        let statuses = futures::stream::unfold((ready, None), move |(mut ready, told)| {
            let draining = draining.clone();
            async move {
                let status = tokio::select! {
                    // What has changed is told before the end is.
                    biased;
                    status = other_than(told, is_known, &mut ready) => status,
                    () = draining.cancelled() => return None,
                };
                Some((Ok(response(status)), (ready, Some(status))))
            }
        });
        Ok(Response::new(Box::pin(statuses)))
    }
}

/// The status, once it is another one than was `told`.
async fn other_than(told: Option<ServingStatus>, is_known: bool, ready: &mut watch::Receiver<bool>) -> ServingStatus {
    loop {
        let status = if is_known { of(*ready.borrow_and_update()) } else { ServingStatus::ServiceUnknown };
        if told != Some(status) {
            return status;
        }
        if ready.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt as _;
    use health_server::Health as _;

    use super::*;

    fn about(service: &str) -> Request<HealthCheckRequest> {
        Request::new(HealthCheckRequest { service: service.to_owned() })
    }

    #[tokio::test]
    async fn it_is_not_serving_while_models_load_and_who_watches_hears_of_every_change_until_the_end() {
        let (ready, is_ready) = watch::channel(false);
        let health = Health { ready: is_ready, draining: CancellationToken::new() };
        let mut watched = Vec::new();
        for service in SERVICES {
            let status = health.check(about(service)).await.unwrap().into_inner().status();
            assert_eq!(status, ServingStatus::NotServing, "{service:?}");
            watched.push(health.watch(about(service)).await.unwrap().into_inner());
        }
        let unknown = health.check(about("other")).await.unwrap_err();
        assert!(unknown.message().starts_with("this server has no service other; it has inference."), "{unknown}");
        let mut other = health.watch(about("other")).await.unwrap().into_inner();
        assert_eq!(other.next().await.unwrap().unwrap().status(), ServingStatus::ServiceUnknown);
        for (change, status) in
            [(false, ServingStatus::NotServing), (true, ServingStatus::Serving), (false, ServingStatus::NotServing)]
        {
            ready.send_replace(change);
            for statuses in &mut watched {
                assert_eq!(statuses.next().await.unwrap().unwrap().status(), status);
            }
            assert!(futures::poll!(other.next()).is_pending());
        }
        health.draining.cancel();
        for mut statuses in watched.into_iter().chain([other]) {
            assert!(statuses.next().await.is_none());
        }
    }
}
