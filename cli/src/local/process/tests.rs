use std::time::Instant;

use super::*;

fn shell(dir: &Path, name: &str, script: &str) -> ProcessSpec {
    ProcessSpec {
        name: name.to_owned(),
        program: "/bin/sh".into(),
        args: vec!["-c".to_owned(), script.to_owned()],
        env: BTreeMap::new(),
        log: dir.join(format!("{name}.log")),
    }
}

/// Whether a process runs: it exists, and is not a zombie that waits to be collected.
fn runs(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or_default().trim_start().starts_with('Z'))
}

async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "not within 10 s: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Variable that tells a test's processes from all others.
const MARK: &str = "SENSORIUM_TEST_FOLDER";

/// Whether a process runs that was started with [`MARK`] set to this folder. It has its environment from the start, so one
/// that never came to writing its id is found, too; a zombie has none any more.
fn any_runs(marked: &Path) -> bool {
    let mark = format!("{MARK}={}", marked.display());
    // Not all of them are ours to read, and some end meanwhile.
    let environments = std::fs::read_dir("/proc").unwrap().flatten();
    let mut environments = environments.filter_map(|entry| std::fs::read(entry.path().join("environ")).ok());
    environments.any(|environment| environment.split(|&byte| byte == 0).any(|variable| variable == mark.as_bytes()))
}

/// The process ids that scripts wrote with `echo $$ > FILE`.
async fn pid_in(path: &Path) -> u32 {
    eventually("a script writes its process id", || {
        std::fs::read_to_string(path).is_ok_and(|text| text.ends_with('\n'))
    })
    .await;
    std::fs::read_to_string(path).unwrap().trim().parse().unwrap()
}

const LONG_GRACE: Duration = Duration::from_mins(1);

#[tokio::test]
async fn a_group_finishes_when_all_its_processes_have() {
    let dir = tempfile::tempdir().unwrap();
    let specs = [shell(dir.path(), "a", "sleep 0.1; touch $0.a"), shell(dir.path(), "b", "echo done")];
    let mut workers = Workers::start(&specs, LONG_GRACE).unwrap();
    workers.finish().await.unwrap();
    assert_eq!(log_tail(&specs[1].log, 5), ["done"]);
    assert!(workers.members.iter().all(|member| member.exited));
}

#[tokio::test]
async fn a_failing_worker_takes_its_group_down_and_is_the_one_named() {
    let dir = tempfile::tempdir().unwrap();
    let pid_file = dir.path().join("pid");
    let wait_for_other = format!("while [ ! -s {0} ]; do sleep 0.01; done; exit 3", pid_file.display());
    let specs = [
        shell(dir.path(), "worker-0", &format!("echo $$ > {}; exec sleep 600", pid_file.display())),
        shell(dir.path(), "worker-1", &wait_for_other),
    ];
    let mut workers = Workers::start(&specs, LONG_GRACE).unwrap();
    let error = workers.finish().await.unwrap_err();
    assert!(matches!(&error, ProcessError::Failed { index: 1, status, .. } if status.code() == Some(3)), "{error}");
    assert_eq!(error.to_string(), "worker-1 exited with code 3");
    let sleeper = pid_in(&pid_file).await;
    assert!(!runs(sleeper), "worker-0 is still there");
}

#[tokio::test]
async fn a_worker_that_says_the_job_is_wrong_is_named_though_another_failed_before() {
    let dir = tempfile::tempdir().unwrap();
    let pid_file = dir.path().join("pid");
    let wait_for_other = format!("while [ ! -s {0} ]; do sleep 0.01; done; exit 75", pid_file.display());
    let last = format!("trap 'exit 2' TERM; echo $$ > {}; while :; do sleep 0.02; done", pid_file.display());
    let specs = [shell(dir.path(), "worker-0", &wait_for_other), shell(dir.path(), "worker-1", &last)];
    let error = Workers::start(&specs, LONG_GRACE).unwrap().finish().await.unwrap_err();
    assert_eq!(error.to_string(), "worker-1 exited with code 2");
}

#[tokio::test]
async fn a_worker_that_a_signal_killed_is_reported_with_the_signal() {
    let dir = tempfile::tempdir().unwrap();
    let mut workers = Workers::start(&[shell(dir.path(), "worker-0", "kill -9 $$")], LONG_GRACE).unwrap();
    let error = workers.finish().await.unwrap_err();
    assert_eq!(error.to_string(), "worker-0 was killed by signal 9 (out of memory?)");
}

#[tokio::test]
async fn a_process_that_heeds_sigterm_ends_within_the_grace_period() {
    let dir = tempfile::tempdir().unwrap();
    let pid_file = dir.path().join("pid");
    let script =
        format!("trap 'echo bye; exit 143' TERM; echo $$ > {}; while :; do sleep 0.02; done", pid_file.display());
    let spec = shell(dir.path(), "polite", &script);
    let mut workers = Workers::start(std::slice::from_ref(&spec), LONG_GRACE).unwrap();
    let pid = pid_in(&pid_file).await;
    let begin = Instant::now();
    workers.stop(&CancellationToken::new()).await;
    assert!(begin.elapsed() < Duration::from_secs(20), "the grace period was waited out");
    assert!(!runs(pid));
    assert_eq!(log_tail(&spec.log, 1), ["bye"]);
}

#[tokio::test]
async fn a_process_that_ignores_sigterm_is_killed_after_the_grace_period() {
    let dir = tempfile::tempdir().unwrap();
    let pid_file = dir.path().join("pid");
    let script = format!("trap '' TERM; echo $$ > {}; while :; do sleep 0.02; done", pid_file.display());
    let grace = Duration::from_millis(300);
    let mut workers = Workers::start(&[shell(dir.path(), "stubborn", &script)], grace).unwrap();
    let pid = pid_in(&pid_file).await;
    let begin = Instant::now();
    workers.stop(&CancellationToken::new()).await;
    assert!(begin.elapsed() >= grace, "killed before its time");
    assert!(!runs(pid));
}

#[tokio::test]
async fn a_second_interrupt_cuts_the_grace_period_short() {
    let dir = tempfile::tempdir().unwrap();
    let pid_file = dir.path().join("pid");
    let script = format!("trap '' TERM; echo $$ > {}; while :; do sleep 0.02; done", pid_file.display());
    let mut workers = Workers::start(&[shell(dir.path(), "stubborn", &script)], LONG_GRACE).unwrap();
    let pid = pid_in(&pid_file).await;
    let hurry = CancellationToken::new();
    hurry.cancel();
    let begin = Instant::now();
    workers.stop(&hurry).await;
    assert!(begin.elapsed() < Duration::from_secs(20));
    assert!(!runs(pid));
}

#[tokio::test]
async fn dropping_the_group_kills_processes_and_what_they_started() {
    let dir = tempfile::tempdir().unwrap();
    let (pid_file, grandchild_file) = (dir.path().join("pid"), dir.path().join("grandchild"));
    let script = format!("sleep 600 & echo $! > {}; echo $$ > {}; wait", grandchild_file.display(), pid_file.display());
    let workers = Workers::start(&[shell(dir.path(), "parent", &script)], LONG_GRACE).unwrap();
    let (pid, grandchild) = (pid_in(&pid_file).await, pid_in(&grandchild_file).await);
    assert!(runs(pid) && runs(grandchild));
    drop(workers);
    eventually("both are gone", || !runs(pid) && !runs(grandchild)).await;
}

#[tokio::test]
async fn what_a_leader_leaves_behind_in_its_group_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let grandchild_file = dir.path().join("grandchild");
    let script = format!("sleep 600 & echo $! > {}", grandchild_file.display());
    let mut workers = Workers::start(&[shell(dir.path(), "leader", &script)], LONG_GRACE).unwrap();
    workers.finish().await.unwrap();
    let grandchild = pid_in(&grandchild_file).await;
    eventually("the grandchild is gone", || !runs(grandchild)).await;
}

#[tokio::test]
async fn a_child_reads_nothing_while_we_live_and_the_end_of_its_input_when_we_die() {
    let dir = tempfile::tempdir().unwrap();
    // `cat` ends at the end of input, as the programs do when they are told to exit with their parent.
    let script = format!("[ \"${EXIT_WITH_PARENT}\" = 1 ] && cat; echo parent gone");
    let spec = shell(dir.path(), "child", &script);
    let mut workers = Workers::start(std::slice::from_ref(&spec), LONG_GRACE).unwrap();
    tokio::select! {
        _ = workers.finish() => panic!("the child saw the end of its input while we live"),
        () = tokio::time::sleep(Duration::from_millis(200)) => {}
    }
    // The kernel closes the pipe when we die; dropping our end of it is the same to the child.
    workers.members[0].lifeline = None;
    workers.finish().await.unwrap();
    assert_eq!(log_tail(&spec.log, 1), ["parent gone"]);
}

#[tokio::test]
async fn a_program_that_cannot_start_is_named_and_leaves_no_process() {
    let dir = tempfile::tempdir().unwrap();
    let mut missing = shell(dir.path(), "worker-1", "");
    missing.program = dir.path().join("no-such-program");
    // Not the shell's last command, which some shells become: a process has no environment for a moment then.
    let mut first = shell(dir.path(), "worker-0", "sleep 600; exit");
    first.env.insert(MARK.to_owned(), dir.path().display().to_string());
    let workers = Workers::start(std::slice::from_ref(&first), LONG_GRACE).unwrap();
    assert!(any_runs(dir.path()), "else it would not be found below either");
    drop(workers);
    eventually("worker-0 is gone", || !any_runs(dir.path())).await;

    let Err(error) = Workers::start(&[first, missing], LONG_GRACE) else { panic!("it started") };
    assert!(matches!(&error, ProcessError::Start { name, .. } if name == "worker-1"), "{error}");
    eventually("worker-0 is gone again", || !any_runs(dir.path())).await;
}

#[test]
fn a_log_tail_has_the_last_lines_only_and_a_missing_log_has_none() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let lines: Vec<String> = (0..20_000).map(|i| format!("line {i}")).collect();
    std::fs::write(&path, lines.join("\n")).unwrap();
    assert_eq!(log_tail(&path, 2), ["line 19998", "line 19999"]);
    assert!(log_tail(&dir.path().join("none"), 2).is_empty());
}
