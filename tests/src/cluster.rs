//! A real API server with the controllers behind it, and no node: one per test program, shared by its tests.

use std::fmt::Debug;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Namespace as NamespaceObject, ServiceAccount};
use kube::api::{DynamicObject, Patch, PatchParams, PostParams};
use kube::config::{AuthInfo, KubeConfigOptions, Kubeconfig};
use kube::core::GroupVersionKind;
use kube::discovery::Scope;
use kube::{Api, Client, Config, Resource, ResourceExt};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tempfile::{NamedTempFile, TempDir};

/// Who the tests are to the API server, in `managedFields`.
const FIELD_MANAGER: &str = "sensorium-tests";
/// The controllers make a namespace usable within milliseconds; a busy machine may need more.
const NAMESPACE_LIMIT: Duration = Duration::from_mins(2);
/// How often [`Namespace::eventually`] looks.
const POLL: Duration = Duration::from_millis(50);

/// A real API server that this test program started. `scripts/cluster run` holds it, and takes it down when this program
/// ends, in whichever way: it reads a pipe whose other end is here.
pub struct ApiCluster {
    _holder: Child,
    state: PathBuf,
}

impl ApiCluster {
    /// The cluster of this test program, started by the first call. That takes about six seconds, and minutes on a
    /// machine where `make cluster-binaries` has never run.
    ///
    /// # Errors
    /// When it does not start; the script says why on standard error, with the end of the logs.
    pub fn shared() -> Result<&'static Self> {
        static SHARED: OnceLock<Result<ApiCluster, String>> = OnceLock::new();
        let started = SHARED.get_or_init(|| Self::start().map_err(|error| format!("{error:#}")));
        started.as_ref().map_err(|message| anyhow!("{message}"))
    }

    fn start() -> Result<Self> {
        // The script makes and removes `state`; only the name has to be new.
        let state = TempDir::with_prefix("sensorium-api-")?.path().to_owned();
        let mut command = Command::new(scripts().join("cluster"));
        command.args(["run", "api"]).arg(&state).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut holder = command.spawn().context("scripts/cluster")?;
        let mut line = String::new();
        BufReader::new(holder.stdout.take().context("its output is a pipe")?).read_line(&mut line)?;
        ensure!(line == "ready\n", "scripts/cluster run api did not start a cluster; it says why on standard error");
        Ok(Self { _holder: holder, state })
    }

    /// A new client of the administrator. It belongs to the runtime that calls, which is another one in each test.
    ///
    /// # Errors
    /// When the kubeconfig cannot be read.
    pub async fn client(&self) -> Result<Client> {
        let config = Kubeconfig::read_from(self.kubeconfig())?;
        let config = Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await?;
        Ok(Client::try_from(config)?)
    }

    /// The administrator's kubeconfig.
    pub fn kubeconfig(&self) -> PathBuf {
        self.state.join("admin.kubeconfig")
    }

    /// Where the logs of the API server and the controllers are.
    pub fn logs(&self) -> PathBuf {
        self.state.join("logs")
    }

    /// A program of the cluster (`kubectl`, `helm`) or any other, with `KUBECONFIG` set to the administrator's.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(scripts().join("cluster"));
        command.arg("exec").arg(&self.state).arg(program);
        command
    }

    /// A new namespace with a name that starts with `prefix`, ready for pods. It goes with the cluster.
    ///
    /// # Errors
    /// When the API server refuses.
    pub async fn namespace(&self, prefix: &str) -> Result<Namespace> {
        let client = self.client().await?;
        let mut wanted = NamespaceObject::default();
        wanted.metadata.generate_name = Some(format!("{prefix}-"));
        let made = Api::all(client.clone()).create(&PostParams::default(), &wanted).await?;
        let namespace = Namespace { client, name: made.name_any() };
        // Pods are refused until the controllers have made this account.
        namespace.eventually::<ServiceAccount>("default", "to exist", NAMESPACE_LIMIT, |_| true).await?;
        Ok(namespace)
    }
}

/// A namespace of its own for a test, and a client.
#[derive(Clone)]
pub struct Namespace {
    client: Client,
    name: String,
}

impl Namespace {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The administrator's client.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The objects of a kind in it.
    pub fn api<K>(&self) -> Api<K>
    where
        K: Resource<Scope = NamespaceResourceScope>,
        K::DynamicType: Default,
    {
        Api::namespaced(self.client.clone(), &self.name)
    }

    /// Applies every document of a YAML text, those that live in a namespace in this one, as `kubectl apply --server-side` would; returns what the API server
    /// made of them.
    ///
    /// # Errors
    /// When a document is no object or the API server refuses it: then the error is a [`kube::Error::Api`].
    pub async fn apply(&self, manifest: &str) -> Result<Vec<DynamicObject>> {
        let mut applied = Vec::new();
        for document in serde_yaml_ng::Deserializer::from_str(manifest) {
            let object = DynamicObject::deserialize(document).context("a document is not a Kubernetes object")?;
            let types = object.types.clone().context("a document has no apiVersion and kind")?;
            let kind = GroupVersionKind::try_from(&types)?;
            let (resource, capabilities) = kube::discovery::pinned_kind(&self.client, &kind).await?;
            let api: Api<DynamicObject> = match capabilities.scope {
                Scope::Namespaced => Api::namespaced_with(self.client.clone(), &self.name, &resource),
                Scope::Cluster => Api::all_with(self.client.clone(), &resource),
            };
            let parameters = PatchParams::apply(FIELD_MANAGER).force();
            applied.push(api.patch(&object.name_any(), &parameters, &Patch::Apply(&object)).await?);
        }
        Ok(applied)
    }

    /// Waits until the object `name` exists and `condition` holds for it.
    ///
    /// # Errors
    /// When that is not so within `limit`; `what` says what it was waited for (`"to be Ready"`).
    pub async fn eventually<K>(
        &self,
        name: &str,
        what: &str,
        limit: Duration,
        condition: impl Fn(&K) -> bool,
    ) -> Result<K>
    where
        K: Resource<Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned + serde::Serialize,
        K::DynamicType: Default,
    {
        let api = self.api::<K>();
        let deadline = Instant::now() + limit;
        loop {
            let found = api.get_opt(name).await?;
            match found {
                Some(object) if condition(&object) => return Ok(object),
                last if Instant::now() > deadline => {
                    let kind = K::kind(&K::DynamicType::default()).into_owned();
                    let last = last.map_or_else(|| Ok("it does not exist".to_owned()), |last| yaml(&last))?;
                    bail!("{kind}/{name} was expected {what}, and is not after {} s:\n{last}", limit.as_secs());
                }
                _ => tokio::time::sleep(POLL).await,
            }
        }
    }

    /// Waits until the object `name` is gone.
    ///
    /// # Errors
    /// When it is still there after `limit`.
    pub async fn eventually_gone<K>(&self, name: &str, limit: Duration) -> Result<()>
    where
        K: Resource<Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned + serde::Serialize,
        K::DynamicType: Default,
    {
        let deadline = Instant::now() + limit;
        while let Some(last) = self.api::<K>().get_opt(name).await? {
            if Instant::now() > deadline {
                bail!("{name} is still there after {} s:\n{}", limit.as_secs(), yaml(&last)?);
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }

    /// A kubeconfig of a service account of this namespace, to see what its roles allow.
    ///
    /// # Errors
    /// When there is no such account.
    pub async fn kubeconfig_of(&self, account: &str, cluster: &ApiCluster) -> Result<NamedTempFile> {
        let request = TokenRequest {
            spec: Some(TokenRequestSpec { expiration_seconds: Some(3600), ..TokenRequestSpec::default() }),
            ..TokenRequest::default()
        };
        let accounts = self.api::<ServiceAccount>();
        let granted = accounts.create_token_request(account, &PostParams::default(), &request).await?;
        let token = granted.status.and_then(|status| status.token).context("the API server returned no token")?;
        let mut config = Kubeconfig::read_from(cluster.kubeconfig())?;
        for user in &mut config.auth_infos {
            user.auth_info = Some(AuthInfo { token: Some(token.clone().into()), ..AuthInfo::default() });
        }
        let file = NamedTempFile::new()?;
        serde_yaml_ng::to_writer(&file, &config)?;
        Ok(file)
    }
}

/// What the API server said when it refused, if it did.
pub fn refusal(error: &anyhow::Error) -> Option<&str> {
    match error.downcast_ref::<kube::Error>()? {
        kube::Error::Api(status) => Some(&status.message),
        _ => None,
    }
}

fn yaml(object: &impl serde::Serialize) -> Result<String> {
    let mut value = serde_json::to_value(object)?;
    if let Some(metadata) = value["metadata"].as_object_mut() {
        metadata.remove("managedFields"); // longer than the rest, and of no help
    }
    Ok(serde_yaml_ng::to_string(&value)?)
}

fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts")
}
