//! The program itself.

use std::process::Command;

use crate::bench::Bench;

const PROGRAM: &str = env!("CARGO_BIN_EXE_sensorium-server-torch");

#[test]
fn it_checks_a_repository_and_goes_by_its_own_name() {
    let bench = Bench::new();
    bench.compile("good", "def forward(self, x):\n    return x\n", &[]);
    let config = "input { name: \"x\" data_type: TYPE_FP32 dims: -1 } output { name: \"OUTPUT__0\" data_type: TYPE_FP32 dims: -1 }";
    bench.write("good", "config.pbtxt", config);
    let check = || {
        let output = Command::new(PROGRAM).arg("--check").arg("--model-repository").arg(bench.path()).output().unwrap();
        (output.status.success(), String::from_utf8(output.stdout).unwrap())
    };
    let (is_well, said) = check();
    assert!(is_well && said.contains("good") && said.contains("READY"), "{said}");
    bench.compile("vague", "def forward(self, x):\n    return x\n", &[]);
    let (is_well, said) = check();
    assert!(!is_well && said.contains("write it in config.pbtxt"), "{said}");
    let output = Command::new(PROGRAM).arg("--version").output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.starts_with("sensorium-server-torch "), "{said}");
}
