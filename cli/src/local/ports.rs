//! Ports of this machine: free ones, and who holds the others.

use std::fmt;
use std::net::{Ipv4Addr, TcpListener};

/// A process that listens on a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Its process id.
    pub pid: u32,
    /// Its short name, as `ps` shows it.
    pub name: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} ({})", self.pid, self.name)
    }
}

/// Free ports, handed out once each.
///
/// The listeners that reserve them stay open until this is dropped, so that no port is handed out twice; drop it just
/// before the processes start. Another program can still take a port in between; the job then fails and is restarted
/// with others.
#[derive(Debug, Default)]
pub struct FreePorts(Vec<TcpListener>);

impl FreePorts {
    /// Reserves this very port of the loopback address, if it is free.
    pub fn reserve(&mut self, port: u16) -> bool {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port));
        listener.map(|listener| self.0.push(listener)).is_ok()
    }

    /// A port of the loopback address that nobody listens on.
    ///
    /// # Errors
    /// When the system has no port left.
    pub fn take(&mut self) -> std::io::Result<u16> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let port = listener.local_addr()?.port();
        self.0.push(listener);
        Ok(port)
    }
}

/// Who listens on a TCP port, where the system tells us: other users' processes are often hidden.
pub fn holder(port: u16) -> Option<Holder> {
    let inodes: Vec<String> = ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .filter_map(|table| std::fs::read_to_string(table).ok())
        .flat_map(|table| listening_inodes(&table, port))
        .map(|inode| format!("socket:[{inode}]"))
        .collect();
    std::fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let mut descriptors = std::fs::read_dir(entry.path().join("fd")).ok()?.flatten();
        descriptors.find(|descriptor| {
            std::fs::read_link(descriptor.path())
                .is_ok_and(|target| inodes.iter().any(|inode| target.as_os_str() == inode.as_str()))
        })?;
        let name = std::fs::read_to_string(entry.path().join("comm")).ok()?;
        Some(Holder { pid, name: name.trim().to_owned() })
    })
}

/// Socket inodes that listen on `port`, from the text of `/proc/net/tcp` (format: proc_pid_net(5)).
fn listening_inodes(table: &str, port: u16) -> Vec<String> {
    const LISTEN: &str = "0A";
    let suffix = format!(":{port:04X}");
    table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let [_, local, _, state, _, _, _, _, _, inode, ..] = fields[..] else { return None };
            (local.ends_with(&suffix) && state == LISTEN).then(|| inode.to_owned())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_holder_of_a_port_is_named() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(!FreePorts::default().reserve(port));
        let holder = holder(port).expect("this process listens on it");
        assert_eq!(holder.pid, std::process::id());
        assert!(!holder.name.is_empty());
    }

    #[test]
    fn a_port_nobody_listens_on_has_no_holder() {
        let port = FreePorts::default().take().unwrap();
        assert_eq!(holder(port), None);
    }

    #[test]
    fn no_free_port_is_handed_out_twice() {
        let mut ports = FreePorts::default();
        let mut taken: Vec<u16> = (0..50).map(|_| ports.take().unwrap()).collect();
        taken.sort_unstable();
        taken.dedup();
        assert_eq!(taken.len(), 50);
        assert!(!FreePorts::default().reserve(taken[0]));
        drop(ports);
        assert!(FreePorts::default().reserve(taken[0]));
    }

    #[test]
    fn only_listening_sockets_of_that_very_port_count() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
            0: 0100007F:1F41 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 111 1 0 100 0 0 10 0\n\
            1: 0100007F:1F41 0100007F:C350 01 00000000:00000000 00:00000000 00000000     0        0 222 1 0 20 4 30 10 -1\n\
            2: 0100007F:1F42 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 333 1 0 100 0 0 10 0\n";
        assert_eq!(listening_inodes(table, 0x1F41), ["111"]);
    }
}
