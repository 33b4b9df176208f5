//! An S3 server that keeps its buckets in a folder, with users of one bucket each, and remembers what was asked of it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use s3s::auth::SimpleAuth;
use s3s::service::{S3Service, S3ServiceBuilder};
use tokio::net::TcpListener;
use tower::Service;

/// Somebody who may use one bucket.
#[derive(Clone, Debug)]
pub struct S3User {
    /// His access key.
    pub id: String,
    /// His secret key.
    pub secret: String,
    /// The bucket.
    pub bucket: String,
}

impl S3User {
    /// A user whose secret is made of his name.
    pub fn new(id: &str, bucket: &str) -> Self {
        Self { id: id.to_owned(), secret: format!("{id}-not-a-secret-but-a-test"), bucket: bucket.to_owned() }
    }
}

/// The server; it answers as long as the runtime lives on which it was started.
#[derive(Clone)]
pub struct S3Server {
    folder: PathBuf,
    endpoint: String,
    seen: Arc<Mutex<Vec<String>>>,
}

impl S3Server {
    /// Starts it at `address` with buckets in `folder`, one for each that a user may use. Every request is passed to `tell` as
    /// `USER METHOD /PATH STATUS`.
    ///
    /// # Errors
    /// When the address is taken, or the folder cannot be written.
    pub async fn start(
        folder: &Path,
        address: &str,
        users: &[S3User],
        tell: impl Fn(&str) + Clone + Send + Sync + 'static,
    ) -> Result<Self> {
        let mut auth = SimpleAuth::new();
        for user in users {
            std::fs::create_dir_all(folder.join(&user.bucket))?;
            auth.register(user.id.clone(), user.secret.clone().into());
        }
        let store = s3s_fs::FileSystem::new(folder).map_err(|error| anyhow::anyhow!("{error:?}"))?;
        let mut builder = S3ServiceBuilder::new(store);
        builder.set_auth(auth);
        let (service, users) = (builder.build(), Arc::new(users.to_vec()));
        let seen: Arc<Mutex<Vec<String>>> = Arc::default();
        let log = Arc::clone(&seen);
        let app = Router::new().fallback(move |request: Request| {
            let (service, users, log, tell) = (service.clone(), Arc::clone(&users), Arc::clone(&log), tell.clone());
            async move {
                let (line, response) = answer(service, &users, request).await;
                tell(&line);
                log.lock().unwrap_or_else(PoisonError::into_inner).push(line);
                response
            }
        });
        let listener = TcpListener::bind(address).await.context("the S3 server's address")?;
        let endpoint = format!("http://{}", listener.local_addr()?);
        tokio::spawn(async move { axum::serve(listener, app).await });
        Ok(Self { folder: folder.to_owned(), endpoint, seen })
    }

    /// Its URL.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Where the objects of a bucket are, as files.
    pub fn bucket(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The requests since the last call.
    pub fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What a client of it finds in its environment.
    pub fn environment(&self, user: &S3User) -> Vec<(String, String)> {
        [
            ("AWS_ENDPOINT_URL", self.endpoint.as_str()),
            ("AWS_ALLOW_HTTP", "true"),
            ("AWS_ACCESS_KEY_ID", &user.id),
            ("AWS_SECRET_ACCESS_KEY", &user.secret),
            ("AWS_REGION", "us-east-1"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec()
    }
}

async fn answer(mut service: S3Service, users: &[S3User], request: Request) -> (String, Response) {
    let authorization =
        request.headers().get("authorization").and_then(|value| value.to_str().ok()).unwrap_or_default();
    let credential = authorization.split_once("Credential=").map_or("", |(_, rest)| rest);
    let id = credential.split('/').next().unwrap_or_default().to_owned();
    let path = request.uri().path().to_owned();
    let bucket = path.trim_start_matches('/').split('/').next().unwrap_or_default();
    let line = format!("{id} {} {path}", request.method());
    let may = users.iter().any(|user| user.id == id && user.bucket == bucket);
    let response = if may {
        match Service::call(&mut service, request).await {
            Ok(response) => response.map(Body::new),
            Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error:?}")).into_response(),
        }
    } else {
        StatusCode::FORBIDDEN.into_response()
    };
    (format!("{line} {}", response.status().as_u16()), response)
}
