//! The program: arguments in, exit code out. Nothing here computes.

mod args;
mod ask;
mod bench;
mod convert;
mod doctor;
mod edit;
mod eval;
mod eval_args;
mod exit;
mod info;
mod lora_tags;
mod memory;
mod memory_args;
mod model;
mod models;
mod places;
mod plan;
mod progress;
mod steps;
mod weights_args;

use std::{
    process::ExitCode,
    sync::{Arc, atomic::AtomicBool},
};

use clap::CommandFactory;
use pentimento::{CancelToken, Error, Result};

use self::{
    args::{Cli, Command},
    eval_args::EvalCommand,
    weights_args::ModelsCommand,
};

/// Runs the program.
pub(crate) fn run() -> ExitCode {
    let cli = match args::parse(std::env::args_os()) {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let json = cli.command.json();
    init_log(cli.command.verbose());
    match dispatch(cli.command) {
        Ok(code) => code,
        // Whoever read our output has gone; that is not a failure of ours.
        Err(Error::Io(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => {
            ExitCode::SUCCESS
        }
        Err(error) => exit::report(&error, json),
    }
}

fn dispatch(command: Command) -> Result<ExitCode> {
    match command {
        Command::Edit(args) => edit::run(*args),
        Command::Plan(args) => plan::run(&args),
        Command::Ask(args) => ask::run(*args),
        Command::Eval { what: EvalCommand::Scenes(args) } => eval::scenes(&args),
        Command::Eval { what: EvalCommand::Drift(args) } => eval::drift(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Info(args) => info::run(&args),
        Command::Convert(args) => convert::run(*args),
        Command::Models { what: ModelsCommand::List(args) } => models::list(&args),
        Command::Models { what: ModelsCommand::Info(args) } => models::info(&args),
        Command::Models { what: ModelsCommand::Verify(args) } => return models::check(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Completions { shell } => {
            let mut out = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "pentimento", &mut out);
            print(&out)
        }
    }?;
    Ok(ExitCode::SUCCESS)
}

/// Prints what clap has to say: help on stdout with 0, a mistake on stderr with 2.
fn usage(error: &clap::Error) -> ExitCode {
    let code = u8::try_from(error.exit_code()).unwrap_or(2);
    match error.print() {
        Ok(()) => ExitCode::from(code),
        Err(_) => ExitCode::FAILURE,
    }
}

fn init_log(verbose: u8) {
    let default = match verbose {
        0 => "pentimento=warn",
        1 => "pentimento=info",
        _ => "pentimento=debug",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(default));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
}

/// A token that the first Ctrl-C, or a polite `kill`, cancels; the second ends the process with 130 at once.
fn cancel_on_interrupt() -> Result<CancelToken> {
    use signal_hook::{
        consts::{SIGINT, SIGTERM},
        flag,
    };
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        flag::register_conditional_shutdown(signal, 130, Arc::clone(&interrupted))?;
        flag::register(signal, Arc::clone(&interrupted))?;
    }
    Ok(CancelToken::from_flag(interrupted))
}

/// A line for the person at the terminal. Where stderr is closed or its disk is full nobody reads it,
/// which is no reason to lose a picture.
fn say(text: &str) {
    use std::io::Write;
    drop(writeln!(std::io::stderr().lock(), "{text}"));
}

/// Data on stdout.
fn print(bytes: &[u8]) -> Result<()> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    out.write_all(bytes)?;
    Ok(out.flush()?)
}

/// A line of data on stdout.
fn print_line(text: &str) -> Result<()> {
    print(format!("{text}\n").as_bytes())
}

/// A value as JSON on stdout.
fn print_json(value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(std::io::Error::from)?;
    print_line(&text)
}

impl Command {
    fn json(&self) -> bool {
        match self {
            Self::Edit(args) => args.report.json,
            Self::Plan(args) => args.report.json,
            Self::Ask(args) => args.report.json,
            Self::Eval { what: EvalCommand::Scenes(args) } => args.report.json,
            Self::Eval { what: EvalCommand::Drift(args) } => args.report.json,
            Self::Bench(args) => args.report.json,
            Self::Info(args) => args.json,
            Self::Convert(args) => args.report.json,
            Self::Models { what: ModelsCommand::List(args) } => args.json,
            Self::Models { what: ModelsCommand::Info(args) } => args.json,
            Self::Models { what: ModelsCommand::Verify(args) } => args.json,
            Self::Doctor(args) => args.json,
            Self::Completions { .. } => false,
        }
    }

    fn verbose(&self) -> u8 {
        match self {
            Self::Edit(args) => args.report.verbose,
            Self::Plan(args) => args.report.verbose,
            Self::Ask(args) => args.report.verbose,
            Self::Convert(args) => args.report.verbose,
            Self::Eval { what: EvalCommand::Scenes(args) } => args.report.verbose,
            Self::Eval { what: EvalCommand::Drift(args) } => args.report.verbose,
            Self::Bench(args) => args.report.verbose,
            _ => 0,
        }
    }
}
