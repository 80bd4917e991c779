//! Build script: records what the program was built with.
fn main() {
    println!("cargo::rerun-if-changed=kernels");
}
