//! Objects without what the API server keeps for itself.
//!
//! `metadata.managedFields` lists all fields of an object, each as a JSON object of its own: read as JSON, ten times the
//! object itself. It is passed over while an object is read, so that a page of a list never holds it.

use std::fmt;

use serde::de::{DeserializeOwned, DeserializeSeed, Error as _, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

/// An object whose `managedFields` were never read.
#[derive(Clone, Debug)]
pub(super) struct Lean<K>(pub(super) K);

impl<'de, K: DeserializeOwned> Deserialize<'de> for Lean<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        K::deserialize(object(deserializer)?).map(Self).map_err(D::Error::custom)
    }
}

/// Says that a form in which objects are kept is of the same kind as they are, and where it has their metadata.
macro_rules! same_kind {
    ($form:ident, $self:ident => $meta:expr, $meta_mut:expr) => {
        impl<K: kube::Resource<DynamicType = ()>> kube::Resource for $form<K> {
            type DynamicType = ();
            type Scope = K::Scope;

            fn kind((): &()) -> std::borrow::Cow<'_, str> {
                K::kind(&())
            }
            fn group((): &()) -> std::borrow::Cow<'_, str> {
                K::group(&())
            }
            fn version((): &()) -> std::borrow::Cow<'_, str> {
                K::version(&())
            }
            fn plural((): &()) -> std::borrow::Cow<'_, str> {
                K::plural(&())
            }
            fn meta(&$self) -> &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta {
                $meta
            }
            fn meta_mut(&mut $self) -> &mut k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta {
                $meta_mut
            }
        }
    };
}
pub(super) use same_kind;

same_kind!(Lean, self => self.0.meta(), self.0.meta_mut());

/// Reads an object as JSON, without its `managedFields`.
pub(super) fn object<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Value, D::Error> {
    Fields { of_metadata: false }.deserialize(deserializer).map(Value::Object)
}

/// The fields of an object, or of its metadata.
struct Fields {
    of_metadata: bool,
}

impl<'de> DeserializeSeed<'de> for Fields {
    type Value = Map<String, Value>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Fields {
    type Value = Map<String, Value>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut fields = Map::new();
        while let Some(name) = map.next_key::<String>()? {
            let value = match (name.as_str(), self.of_metadata) {
                ("managedFields", true) => {
                    map.next_value::<IgnoredAny>()?;
                    continue;
                }
                ("metadata", false) => map.next_value_seed(Self { of_metadata: true })?.into(),
                _ => map.next_value()?,
            };
            fields.insert(name, value);
        }
        Ok(fields)
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::ConfigMap;
    use serde_json::json;

    use super::*;

    #[test]
    fn managed_fields_are_passed_over_and_all_else_is_read() {
        let text = json!({
            "apiVersion": "v1", "kind": "ConfigMap", "data": {"managedFields": "mine"},
            "metadata": {"name": "a", "managedFields": [{"manager": "x", "fieldsV1": {"f:data": {}}}], "uid": "1"},
        });
        let Lean(read): Lean<ConfigMap> = serde_json::from_str(&text.to_string()).unwrap();
        assert_eq!((read.metadata.name.as_deref(), read.metadata.uid.as_deref()), (Some("a"), Some("1")));
        assert_eq!(read.metadata.managed_fields, None);
        assert_eq!(read.data.unwrap()["managedFields"], "mine");
        assert!(serde_json::from_str::<Lean<ConfigMap>>("[]").is_err());
    }
}
