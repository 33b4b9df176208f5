//! Lets this crate's program and tests find libtorch at run time: link arguments do not reach dependents, so each crate
//! whose tests or binaries load libtorch has these lines.

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    if let Ok(libtorch) = std::env::var("LIBTORCH") {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{libtorch}/lib");
    }
}
