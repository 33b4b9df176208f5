//! Which process has which rank.

use super::workload::Role;

/// One process of a role.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Process {
    /// Which replica (pod) it is in.
    pub replica: u32,
    /// Which of that replica's processes it is.
    pub local_rank: u32,
    /// Which of the role's processes it is: `replica * processes + local_rank`.
    pub rank: u32,
}

impl Role {
    /// Number of processes in the role.
    pub fn world_size(&self) -> u32 {
        self.replicas * self.processes
    }

    /// Every process, by rank.
    pub fn all_processes(&self) -> impl Iterator<Item = Process> + use<> {
        let (replicas, processes) = (self.replicas, self.processes);
        (0..replicas).flat_map(move |replica| {
            (0..processes).map(move |local_rank| Process {
                replica,
                local_rank,
                rank: replica * processes + local_rank,
            })
        })
    }
}
