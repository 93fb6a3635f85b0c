//! The `cella` command.

fn main() -> std::process::ExitCode {
    cella_host::cli::main(std::env::args_os())
}
