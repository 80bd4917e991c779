//! `pentimento models`

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::ExitCode,
};

use pentimento::{
    Result,
    library::{self, Entry, Verdict, Want, describe, resolve, verify, walk},
};
use serde_json::json;

use super::{
    places,
    progress::Bar,
    weights_args::{ListArgs, ModelInfoArgs, VerifyArgs},
};

/// What the program ends with when a file is not whole, as for every fault of a model's files.
const FAULTY: u8 = 3;

pub(crate) fn list(args: &ListArgs) -> Result<()> {
    let places = places::places(&args.places)?;
    let entries: Vec<Entry> = walk(&places).iter().map(describe).collect();
    if args.json {
        let looked: Vec<_> = places.list().into_iter().map(Path::to_string_lossy).collect();
        return super::print_json(&json!({ "places": looked, "models": entries }));
    }
    if entries.is_empty() {
        let looked: Vec<String> =
            places.list().iter().map(|place| place.display().to_string()).collect();
        let looked = if looked.is_empty() { "no place".to_owned() } else { looked.join(", ") };
        return super::print_line(&format!(
            "no models; looked in {looked}. --models-dir DIR adds a place"
        ));
    }
    super::print(entries.iter().map(line).collect::<String>().as_bytes())
}

fn line(entry: &Entry) -> String {
    let model = if entry.model.is_empty() { "unknown" } else { &entry.model };
    let mut text = format!("{}\n  {model}", entry.name);
    if let Some(version) = &entry.version {
        text += &format!(", {}", version.version);
    }
    if !entry.types.is_empty() {
        text += &format!(", {}", types(&entry.types));
    }
    if entry.bytes > 0 {
        text += &format!(", {}", indicatif::BinaryBytes(entry.bytes));
    }
    text += &format!(", {}\n  {}\n", entry.place.label(), entry.path.display());
    if let Some(problem) = &entry.problem {
        text += &format!("  cannot be used: {problem}\n");
    }
    text
}

fn types(types: &BTreeMap<String, usize>) -> String {
    let mut types: Vec<(&String, &usize)> = types.iter().collect();
    types.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
    let types: Vec<String> = types.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
    types.join(" + ")
}

pub(crate) fn info(args: &ModelInfoArgs) -> Result<()> {
    let places = places::places(&args.places)?;
    let path = resolve("NAME", &args.name, Want::Any, &places)?;
    super::info::tell(&path, args.json)
}

/// Prints a verdict on each; the exit code tells whether all are good.
pub(crate) fn check(args: &VerifyArgs) -> Result<ExitCode> {
    let places = places::places(&args.places)?;
    let paths: Vec<PathBuf> = match args.names.as_slice() {
        [] => walk(&places).into_iter().map(|candidate| candidate.path).collect(),
        names => names
            .iter()
            .map(|name| library::resolve("NAME", name, Want::Any, &places))
            .collect::<Result<_>>()?,
    };
    let cancel = super::cancel_on_interrupt()?;
    let bar = Bar::new(args.quiet);
    let verdicts = paths.iter().map(|path| {
        let verdict = verify(path, args.deep, &cancel, &bar)?;
        if !args.json {
            bar.clear();
            super::print(verdict_text(&verdict).as_bytes())?;
        }
        Ok(verdict)
    });
    let verdicts = verdicts.collect::<Result<Vec<Verdict>>>();
    bar.clear();
    let verdicts = verdicts?;
    if args.json {
        super::print_json(&verdicts)?;
    } else if verdicts.is_empty() {
        super::print_line("no models to check")?;
    }
    let good = verdicts.iter().all(Verdict::is_good);
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::from(FAULTY) })
}

fn verdict_text(verdict: &Verdict) -> String {
    let mut text = String::new();
    let path = verdict.path.display().to_string();
    if verdict.is_good() {
        text += &format!("ok       {path}, {}", indicatif::BinaryBytes(verdict.bytes));
        if verdict.hashes_match > 0 {
            text += &format!(", {} SHA-256 as published", verdict.hashes_match);
        }
        if verdict.deep {
            text += ", all numbers finite";
        }
        text.push('\n');
    }
    for problem in &verdict.problems {
        // What is said of a file of a folder begins with its own path.
        let own = problem.starts_with(&path);
        text += &if own {
            format!("damaged  {problem}\n")
        } else {
            format!("damaged  {path}: {problem}\n")
        };
    }
    text
}
