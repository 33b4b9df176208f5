//! What an encoder is made of: one object of each kind, all with its name. The kinds are listed here and nowhere else.

use std::collections::BTreeSet;
use std::fmt::Debug;

use futures::future::BoxFuture;
use kube::core::NamespaceResourceScope;
use kube::{Resource, ResourceExt};
use serde::{Serialize, de::DeserializeOwned};

use super::{Servings, settle};
use crate::controller::children::{Children, Key};
use crate::controller::visit::Visit;
use crate::controller::{Error, apply};
use crate::render::Encoder;

type Done<'a, T> = BoxFuture<'a, Result<T, Error>>;

/// The objects of one kind.
pub(super) trait Part: Send + Sync {
    /// Makes the encoder's object what it should be: nothing, where it should have none.
    fn settle<'a>(&'a self, visit: &'a Visit<'_>, key: &'a Key, encoder: &'a Encoder) -> Done<'a, ()>;

    /// Makes the encoder's object if it is gone; one that is there stays as it is. Whether it was made.
    fn restore<'a>(&'a self, visit: &'a Visit<'_>, key: &'a Key, encoder: &'a Encoder) -> Done<'a, bool>;

    /// Removes the objects whose names are not among `kept`.
    fn sweep<'a>(&'a self, visit: &'a Visit<'_>, key: &'a Key, kept: &'a BTreeSet<String>) -> Done<'a, ()>;

    /// Whether the encoder of this name has its object, or may well have none.
    fn is_whole(&self, key: &Key, name: &str) -> bool;
}

struct Objects<'a, K> {
    known: &'a Children<K>,
    /// The one of an encoder.
    of: fn(&Encoder) -> Option<&K>,
    /// Whether every encoder has one.
    is_always: bool,
}

impl Servings {
    /// The kinds in the order in which objects are made. They are removed in the opposite order, so that pods have their
    /// policy before they come and until they are told to go.
    pub(super) fn parts(&self) -> [Box<dyn Part + '_>; 5] {
        [
            Box::new(Objects { known: &self.policies, of: |encoder| Some(&encoder.network), is_always: true }),
            Box::new(Objects { known: &self.budgets, of: |encoder| Some(&encoder.budget), is_always: true }),
            Box::new(Objects { known: &self.services, of: |encoder| Some(&encoder.service), is_always: true }),
            Box::new(Objects { known: &self.deployments, of: |encoder| Some(&encoder.deployment), is_always: true }),
            Box::new(Objects { known: &self.autoscalers, of: |encoder| encoder.autoscaler.as_ref(), is_always: false }),
        ]
    }
}

impl<K> Part for Objects<'_, K>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + Debug
        + Serialize
        + DeserializeOwned
        + Send
        + Sync,
{
    fn settle<'a>(&'a self, visit: &'a Visit<'_>, key: &'a Key, encoder: &'a Encoder) -> Done<'a, ()> {
        Box::pin(settle(visit, self.known, key, &encoder.name, (self.of)(encoder)))
    }

    fn restore<'a>(&'a self, visit: &'a Visit<'_>, key: &'a Key, encoder: &'a Encoder) -> Done<'a, bool> {
        Box::pin(async move {
            match (self.of)(encoder) {
                Some(object) if !self.known.has(key, &encoder.name) => apply::create(visit, object).await,
                _ => Ok(false),
            }
        })
    }

    fn sweep<'a>(&'a self, visit: &'a Visit<'_>, key: &'a Key, kept: &'a BTreeSet<String>) -> Done<'a, ()> {
        Box::pin(async move {
            for child in self.known.of(key) {
                if !kept.contains(&child.name_any()) {
                    apply::delete(visit, &*child).await?;
                }
            }
            Ok(())
        })
    }

    fn is_whole(&self, key: &Key, name: &str) -> bool {
        !self.is_always || self.known.has(key, name)
    }
}
