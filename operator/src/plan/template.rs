//! Arguments and environment with holes for what only the backend knows: addresses, paths, ranks.

use std::fmt;

use serde::{Serialize, Serializer};

/// A string with holes. Prints and serialises with the holes in braces, such as
/// `datasets={mount volumes/datasets}`; a brace of the text itself is doubled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template(Vec<Part>);

/// A piece of a [`Template`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// Itself.
    Text(String),
    /// `{host ROLE INDEX}`: the name or address under which other processes reach that replica.
    Host {
        /// Name of the role.
        role: String,
        /// Which replica.
        index: u32,
    },
    /// `{port ROLE NAME}`: the number of a port of that role's replica 0, which is the one that others connect to.
    Port {
        /// Name of the role.
        role: String,
        /// Name of the port.
        name: String,
    },
    /// `{addresses ROLE NAME}`: HOST:PORT of that role's port, for those who do not care which replica answers. One name
    /// for all of them on a cluster; every replica's, joined by commas, on one machine.
    Addresses {
        /// Name of the role.
        role: String,
        /// Name of the port.
        name: String,
    },
    /// `{service}`: the name by which clients reach the job, and for which its certificate is.
    Service,
    /// `{listen NAME}`: ADDRESS:PORT on which this process offers its port of that name. All interfaces in a pod,
    /// loopback on one machine; each replica has its own.
    Listen {
        /// Name of the port.
        name: String,
    },
    /// `{mount NAME}`: path of that mount.
    MountPath(String),
    /// `{rank}`: this process among all of its role, `replica * processes + local rank`.
    Rank,
    /// `{local rank}`: this process among those of its replica.
    LocalRank,
    /// `{result file}`: where rank 0 writes its result.
    ResultFile,
}

/// What a backend knows about one process, to fill the holes of that process's templates. A plan only asks for roles,
/// ports and mounts that it has itself.
pub trait Resolve {
    /// The name or address under which replica `index` of `role` is reached.
    fn host(&self, role: &str, index: u32) -> String;
    /// The number of the port `name` of `role`'s replica 0.
    fn port(&self, role: &str, name: &str) -> u16;
    /// HOST:PORT of the port `name` of all replicas of `role`.
    fn addresses(&self, role: &str, name: &str) -> String;
    /// The name by which clients reach the job.
    fn service(&self) -> String;
    /// ADDRESS:PORT on which this process offers its port `name`.
    fn listen(&self, name: &str) -> String;
    /// Path of the mount `name`.
    fn mount_path(&self, name: &str) -> String;
    /// This process among all of its role; in a pod a reference to where the number will be found.
    fn rank(&self) -> String;
    /// This process among those of its replica.
    fn local_rank(&self) -> String;
    /// Where the result is written.
    fn result_file(&self) -> String;
}

impl Template {
    /// A template of these parts.
    pub fn new(parts: impl Into<Vec<Part>>) -> Self {
        Self(parts.into())
    }

    /// A template without holes.
    pub fn text(text: impl Into<String>) -> Self {
        Self(vec![Part::Text(text.into())])
    }

    /// The parts in order.
    pub fn parts(&self) -> &[Part] {
        &self.0
    }

    /// The string with every hole filled.
    pub fn render(&self, resolve: &impl Resolve) -> String {
        self.0.iter().map(|part| part.render(resolve)).collect()
    }
}

impl Part {
    fn render(&self, resolve: &impl Resolve) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Host { role, index } => resolve.host(role, *index),
            Self::Port { role, name } => resolve.port(role, name).to_string(),
            Self::Addresses { role, name } => resolve.addresses(role, name),
            Self::Service => resolve.service(),
            Self::Listen { name } => resolve.listen(name),
            Self::MountPath(name) => resolve.mount_path(name),
            Self::Rank => resolve.rank(),
            Self::LocalRank => resolve.local_rank(),
            Self::ResultFile => resolve.result_file(),
        }
    }
}

impl fmt::Display for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|part| part.fmt(f))
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => f.write_str(&text.replace('{', "{{").replace('}', "}}")),
            Self::Host { role, index } => write!(f, "{{host {role} {index}}}"),
            Self::Port { role, name } => write!(f, "{{port {role} {name}}}"),
            Self::Addresses { role, name } => write!(f, "{{addresses {role} {name}}}"),
            Self::Service => f.write_str("{service}"),
            Self::Listen { name } => write!(f, "{{listen {name}}}"),
            Self::MountPath(name) => write!(f, "{{mount {name}}}"),
            Self::Rank => f.write_str("{rank}"),
            Self::LocalRank => f.write_str("{local rank}"),
            Self::ResultFile => f.write_str("{result file}"),
        }
    }
}

impl Serialize for Template {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Worker3;

    impl Resolve for Worker3 {
        fn host(&self, role: &str, index: u32) -> String {
            format!("{role}-{index}.vqa")
        }
        fn port(&self, role: &str, name: &str) -> u16 {
            assert_eq!((role, name), ("worker", "rendezvous"));
            29_500
        }
        fn addresses(&self, role: &str, name: &str) -> String {
            format!("vqa-{role}:{name}")
        }
        fn service(&self) -> String {
            "vqa.default.svc".to_owned()
        }
        fn listen(&self, name: &str) -> String {
            format!("0.0.0.0:{}", name.len())
        }
        fn mount_path(&self, name: &str) -> String {
            format!("/mnt/{name}")
        }
        fn rank(&self) -> String {
            "3".to_owned()
        }
        fn local_rank(&self) -> String {
            "1".to_owned()
        }
        fn result_file(&self) -> String {
            "/out/result.json".to_owned()
        }
    }

    #[test]
    fn every_hole_is_filled_by_its_own_value() {
        let template = Template::new([
            Part::Host { role: "worker".to_owned(), index: 0 },
            Part::Text(":".to_owned()),
            Part::Port { role: "worker".to_owned(), name: "rendezvous".to_owned() },
            Part::Text(" ".to_owned()),
            Part::Addresses { role: "encoder".to_owned(), name: "grpc".to_owned() },
            Part::Text(" ".to_owned()),
            Part::Service,
            Part::Text(" ".to_owned()),
            Part::Listen { name: "progress".to_owned() },
            Part::Text(" ".to_owned()),
            Part::MountPath("config".to_owned()),
            Part::Text(" ".to_owned()),
            Part::Rank,
            Part::Text("/".to_owned()),
            Part::LocalRank,
            Part::Text(" ".to_owned()),
            Part::ResultFile,
        ]);
        assert_eq!(
            template.render(&Worker3),
            "worker-0.vqa:29500 vqa-encoder:grpc vqa.default.svc 0.0.0.0:8 /mnt/config 3/1 /out/result.json"
        );
        assert_eq!(
            template.to_string(),
            "{host worker 0}:{port worker rendezvous} {addresses encoder grpc} {service} {listen progress} {mount config} {rank}/{local rank} {result file}"
        );
    }

    #[test]
    fn text_that_looks_like_a_hole_is_told_apart_when_printed_and_kept_when_rendered() {
        let template = Template::text("{rank}");
        assert_eq!(template.to_string(), "{{rank}}");
        assert_eq!(template.render(&Worker3), "{rank}");
    }
}
