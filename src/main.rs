//! The program `pentimento`.

mod cli;

fn main() -> std::process::ExitCode {
    cli::run()
}
