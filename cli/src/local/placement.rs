//! A plan on this machine: who listens where, which folder is which mount, and so the processes to start.
//!
//! Every replica is a group of processes on the loopback address, with ports of its own. A mount is a folder below the
//! state folder; nothing is mounted, so a read-only mount is a promise of the program and not enforced here.

use std::collections::BTreeMap;
use std::path::PathBuf;

use sensorium_operator::plan::{MountSource, Process, Program, Resolve, Role, WorkloadPlan};

use crate::error::Error;
use crate::local::ports::{FreePorts, Holder, holder};
use crate::local::process::ProcessSpec;
use crate::local::programs::Programs;
use crate::local::state_dir::{JobDir, StateDir};

/// Everything here talks over loopback.
const HOST: &str = "127.0.0.1";
/// Variables by which numeric libraries choose their number of threads.
const THREAD_VARIABLES: [&str; 2] = ["OMP_NUM_THREADS", "RAYON_NUM_THREADS"];

/// Ports that the user asked for, by name (`grpc`, `http`, `metrics`).
pub type PortWishes = BTreeMap<&'static str, u16>;

/// A declared port that was taken, and the free one that stands in for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replaced {
    /// Name of the port.
    pub name: String,
    /// The declared number.
    pub declared: u16,
    /// The one that is used.
    pub used: u16,
    /// Who has the declared one, where the system tells us.
    pub holder: Option<Holder>,
}

/// The ports of one attempt, by role, replica and name.
#[derive(Debug, Default)]
pub struct PortMap {
    numbers: BTreeMap<(String, u32, String), u16>,
    /// Declared ports that could not be had.
    pub replaced: Vec<Replaced>,
    /// Keeps the ports from being handed out again; to be dropped just before the processes start.
    pub reserved: FreePorts,
}

impl PortMap {
    /// Chooses a port for everything that listens: for the first replica of the servers that clients talk to the wished-for
    /// one, else the declared one if it is free; free ones for all others, whose numbers nobody outside needs to know.
    ///
    /// # Errors
    /// [`Error::PortTaken`] when a wish cannot be met.
    pub fn choose(plan: &WorkloadPlan, wishes: &PortWishes) -> Result<Self, Error> {
        let mut map = Self::default();
        for (position, role) in plan.roles.iter().enumerate() {
            for replica in 0..role.replicas {
                for (name, &declared) in &role.ports {
                    let is_public = role.program == Program::Server && position == 0 && replica == 0;
                    let number = if is_public {
                        map.public(name, declared, wishes.get(name.as_str()).copied())?
                    } else {
                        map.free()?
                    };
                    map.numbers.insert((role.name.clone(), replica, name.clone()), number);
                }
            }
        }
        Ok(map)
    }

    fn public(&mut self, name: &str, declared: u16, wish: Option<u16>) -> Result<u16, Error> {
        let port = wish.unwrap_or(declared);
        if self.reserved.reserve(port) {
            return Ok(port);
        }
        let holder = holder(port);
        if wish.is_some() {
            return Err(Error::PortTaken { name: name.to_owned(), port, holder });
        }
        let used = self.free()?;
        self.replaced.push(Replaced { name: name.to_owned(), declared, used, holder });
        Ok(used)
    }

    fn free(&mut self) -> Result<u16, Error> {
        self.reserved.take().map_err(Error::NoFreePort)
    }

    /// `HOST:PORT` of a port.
    pub fn address(&self, role: &str, replica: u32, name: &str) -> Option<String> {
        let number = self.numbers.get(&(role.to_owned(), replica, name.to_owned()))?;
        Some(format!("{HOST}:{number}"))
    }

    /// The addresses of a port of all replicas, joined by commas.
    fn addresses(&self, role: &str, name: &str) -> String {
        let numbers = self.numbers.iter().filter(|((of, _, called), _)| of == role && called == name);
        numbers.map(|(_, number)| format!("{HOST}:{number}")).collect::<Vec<_>>().join(",")
    }

    fn number(&self, role: &str, replica: u32, name: &str) -> u16 {
        // A plan only asks for ports that it declares (see `Resolve`), and all declared ports were given a number; 0
        // would make the program say that it cannot connect.
        self.numbers.get(&(role.to_owned(), replica, name.to_owned())).copied().unwrap_or(0)
    }
}

/// The processes of a plan, in order of roles and ranks, with their scratch folders made.
///
/// Unless the user's environment says otherwise, the processes share the machine's `cores` for computing.
///
/// # Errors
/// When a program is not installed or a folder cannot be made.
pub fn processes(
    plan: &WorkloadPlan,
    ports: &PortMap,
    state: &StateDir,
    programs: &Programs,
    cores: usize,
) -> Result<Vec<ProcessSpec>, Error> {
    let job = state.job(&plan.job);
    let mut specs = Vec::new();
    for role in &plan.roles {
        let program = programs.find(role.program)?;
        for process in role.all_processes() {
            let place = Place { role, process, ports, state, job: &job };
            place.make_folders()?;
            let mut env: BTreeMap<String, String> =
                role.env.iter().map(|(name, value)| (name.clone(), value.render(&place))).collect();
            for name in THREAD_VARIABLES {
                if role.program == Program::Trainer && std::env::var_os(name).is_none() {
                    let share = (cores / role.world_size().max(1) as usize).max(1);
                    env.entry(name.to_owned()).or_insert_with(|| share.to_string());
                }
            }
            specs.push(ProcessSpec {
                name: place.process_name(),
                program: program.clone(),
                args: role.args.iter().map(|argument| argument.render(&place)).collect(),
                env,
                log: job.log(&place.process_name()),
            });
        }
    }
    Ok(specs)
}

/// One process and its surroundings.
struct Place<'a> {
    role: &'a Role,
    process: Process,
    ports: &'a PortMap,
    state: &'a StateDir,
    job: &'a JobDir,
}

impl Place<'_> {
    /// Such as `worker-0`: also the name of its log.
    fn process_name(&self) -> String {
        format!("{}-{}", self.role.name, self.process.rank)
    }

    fn folder(&self, source: &MountSource) -> PathBuf {
        match source {
            MountSource::Claim(claim) => self.state.volume(claim),
            // Nothing here fetches for others or keeps secrets, and no plan that is run here says so.
            MountSource::Artifact(_) => self.state.volume("node-cache"),
            MountSource::Secret(name) => self.state.volume(name),
            MountSource::Config => self.job.config(),
            MountSource::Scratch => self.job.scratch(&self.process_name()),
        }
    }

    fn make_folders(&self) -> Result<(), Error> {
        for mount in &self.role.mounts {
            crate::local::state_dir::create_folder(&self.folder(&mount.source))?;
        }
        Ok(())
    }
}

impl Resolve for Place<'_> {
    fn host(&self, _role: &str, _index: u32) -> String {
        HOST.to_owned()
    }

    fn port(&self, role: &str, name: &str) -> u16 {
        self.ports.number(role, 0, name)
    }

    fn addresses(&self, role: &str, name: &str) -> String {
        self.ports.addresses(role, name)
    }

    fn service(&self) -> String {
        HOST.to_owned()
    }

    fn listen(&self, name: &str) -> String {
        format!("{HOST}:{}", self.ports.number(&self.role.name, self.process.replica, name))
    }

    fn mount_path(&self, name: &str) -> String {
        let mount = self.role.mounts.iter().find(|mount| mount.name == name);
        mount.map(|mount| self.folder(&mount.source).display().to_string()).unwrap_or_default()
    }

    fn rank(&self) -> String {
        self.process.rank.to_string()
    }

    fn local_rank(&self) -> String {
        self.process.local_rank.to_string()
    }

    fn result_file(&self) -> String {
        self.job.result().display().to_string()
    }
}

#[cfg(test)]
mod tests;
