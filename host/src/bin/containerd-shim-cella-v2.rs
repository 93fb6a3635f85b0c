//! The shim: containerd's way to Cella's sandboxes.

fn main() -> std::process::ExitCode {
    cella_host::shim::main(std::env::args())
}
