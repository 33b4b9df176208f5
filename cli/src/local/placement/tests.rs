use std::net::TcpListener;

use sensorium_api::manifest::parse_documents;
use sensorium_operator::plan;

use super::*;

const TRAINING: &str = "
apiVersion: sensorium.dev/v1alpha1
kind: TrainingJob
metadata: {name: vqa}
spec:
  model: {artifact: start}
  data: {train: 'pvc://datasets/train', evaluation: 'pvc://datasets/test'}
  tasks: [{type: vqa}]
  training: {steps: 10, batch: {images: 8}}
  parallelism: {data: 2}
  workers: 2
  output: {artifact: vqa}
";

fn serving(port: u16) -> WorkloadPlan {
    planned(&format!(
        "
apiVersion: sensorium.dev/v1alpha1
kind: ServingJob
metadata: {{name: vqa}}
spec: {{model: {{artifact: vqa}}, ports: {{grpc: {port}}}}}
"
    ))
}

fn planned(manifest: &str) -> WorkloadPlan {
    plan::plan(&parse_documents(manifest, "manifest.yaml").unwrap()[0]).unwrap()
}

/// State, and programs that exist, in a folder of their own.
fn machine(dir: &tempfile::TempDir) -> (StateDir, Programs) {
    let state = StateDir::new(&dir.path().join("state")).unwrap();
    for program in [Program::Trainer, Program::Server] {
        std::fs::write(dir.path().join(program.binary()), "").unwrap();
    }
    (state, Programs::new([dir.path().to_owned()]))
}

/// The value of `--name value` among arguments.
fn option<'a>(spec: &'a ProcessSpec, name: &str) -> &'a str {
    let position = spec.args.iter().position(|argument| argument == name).unwrap();
    &spec.args[position + 1]
}

#[test]
fn workers_meet_at_one_address_and_compute_with_their_share_of_the_cores() {
    let dir = tempfile::tempdir().unwrap();
    let (state, programs) = machine(&dir);
    let plan = planned(TRAINING);
    let ports = PortMap::choose(&plan, &PortWishes::new()).unwrap();
    let specs = processes(&plan, &ports, &state, &programs, 8).unwrap();
    let names: Vec<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
    assert_eq!(names, ["worker-0", "worker-1"]);
    for (rank, spec) in specs.iter().enumerate() {
        assert_eq!(spec.env["RANK"], rank.to_string());
        assert_eq!(spec.env["WORLD_SIZE"], "2");
        assert_eq!(spec.env["MASTER_ADDR"], "127.0.0.1");
        assert_eq!(spec.env["MASTER_PORT"], specs[0].env["MASTER_PORT"]);
        if std::env::var_os("OMP_NUM_THREADS").is_none() {
            assert_eq!(spec.env["OMP_NUM_THREADS"], "4");
        }
    }
    assert_ne!(specs[0].env["MASTER_PORT"], "29500", "the declared port is for pods");
    assert_eq!(Some(option(&specs[0], "--progress-addr")), ports.address("worker", 0, "progress").as_deref());
    assert_ne!(option(&specs[0], "--progress-addr"), option(&specs[1], "--progress-addr"));
}

#[test]
fn mounts_are_folders_below_the_state_folder_and_are_there_when_the_program_starts() {
    let dir = tempfile::tempdir().unwrap();
    let (state, programs) = machine(&dir);
    let plan = planned(TRAINING);
    let ports = PortMap::choose(&plan, &PortWishes::new()).unwrap();
    let specs = processes(&plan, &ports, &state, &programs, 1).unwrap();
    let artifacts = state.volume("artifacts");
    assert!(artifacts.is_dir());
    assert!(specs[0].args.contains(&format!("artifacts={}", artifacts.display())));
    assert_eq!(option(&specs[0], "--config"), state.job(&plan.job).config().join("job.json").to_str().unwrap());
    assert!(PathBuf::from(&specs[0].env["TMPDIR"]).is_dir());
    assert_ne!(specs[0].env["TMPDIR"], specs[1].env["TMPDIR"]);
}

#[test]
fn a_server_gets_the_declared_port_when_it_is_free() {
    let free = FreePorts::default().take().unwrap();
    let ports = PortMap::choose(&serving(free), &PortWishes::new()).unwrap();
    assert_eq!(ports.address("server", 0, "grpc"), Some(format!("127.0.0.1:{free}")));
    assert!(ports.replaced.iter().all(|replaced| replaced.name != "grpc"));
}

#[test]
fn a_declared_port_that_is_taken_is_replaced_by_a_free_one_and_its_holder_named() {
    let taken = TcpListener::bind((HOST, 0)).unwrap();
    let declared = taken.local_addr().unwrap().port();
    let ports = PortMap::choose(&serving(declared), &PortWishes::new()).unwrap();
    let replaced = ports.replaced.iter().find(|replaced| replaced.name == "grpc").unwrap();
    assert_eq!(replaced.declared, declared);
    assert_eq!(replaced.holder.as_ref().unwrap().pid, std::process::id());
    assert_eq!(ports.address("server", 0, "grpc"), Some(format!("127.0.0.1:{}", replaced.used)));
}

#[test]
fn a_port_that_was_asked_for_and_is_taken_is_an_error_that_names_its_holder() {
    let taken = TcpListener::bind((HOST, 0)).unwrap();
    let wished = taken.local_addr().unwrap().port();
    let error = PortMap::choose(&serving(8001), &[("grpc", wished)].into()).unwrap_err();
    let Error::PortTaken { name, port, holder: Some(holder) } = error else { panic!("{error}") };
    assert_eq!((name.as_str(), port, holder.pid), ("grpc", wished, std::process::id()));
}

#[test]
fn a_program_that_is_not_installed_is_named_with_where_it_was_looked_for() {
    let dir = tempfile::tempdir().unwrap();
    let (state, _) = machine(&dir);
    let plan = planned(TRAINING);
    let ports = PortMap::choose(&plan, &PortWishes::new()).unwrap();
    let nowhere = Programs::new([dir.path().join("nowhere")]);
    let error = processes(&plan, &ports, &state, &nowhere, 1).unwrap_err();
    assert!(error.to_string().starts_with("cannot find the program sensorium-trainer; looked in /"), "{error}");
}

#[test]
fn servers_are_told_where_every_replica_of_an_encoder_listens_and_clients_reach_servers_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (state, programs) = machine(&dir);
    let plan = planned(
        "
apiVersion: sensorium.dev/v1alpha1
kind: ServingJob
metadata: {name: vqa}
spec: {model: {artifact: vqa}, encoders: [{graph: image_encoder, replicas: 2}]}
",
    );
    let wished = FreePorts::default().take().unwrap();
    let ports = PortMap::choose(&plan, &[("grpc", wished)].into()).unwrap();
    assert_eq!(ports.address("server", 0, "grpc"), Some(format!("{HOST}:{wished}")));
    let specs = processes(&plan, &ports, &state, &programs, 1).unwrap();
    let names: Vec<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
    assert_eq!(names, ["server-0", "image_encoder-0", "image_encoder-1"]);
    let listening = [&specs[1], &specs[2]].map(|spec| option(spec, "--grpc-addr"));
    assert_eq!(option(&specs[0], "--remote-graph"), format!("image_encoder={}", listening.join(",")));
    assert_eq!(option(&specs[1], "--graph"), "image_encoder");
}
