//! `pentimento plan`, and what `edit` shares with it.

use std::{io::Read, path::Path};

use pentimento::{
    Assistant, Error, Event, Observer, Plan, PlanOptions, PlanOutcome, PlanRequest, PlannerSource,
    RequestError, Result,
};
use serde_json::json;

use super::{
    args::{PlanArgs, PlannerArgs, PromptArgs},
    lora_tags, memory, model, places,
    progress::Bar,
    weights_args::PlacesArgs,
};

/// The largest plan that is read, in bytes; the library refuses it with the number.
const PLAN_BYTES_MAX: u64 = 2 << 20;

pub(crate) fn run(args: &PlanArgs) -> Result<()> {
    let prompt = prompt(&args.wish.prompt)?
        .ok_or_else(|| no_prompt("a sentence that says what should change, or --prompt-file"))?;
    let (prompt, tags) = lora_tags::split(&prompt)?;
    let mut request = PlanRequest::new(model::pictures(&args.wish.images)?, prompt);
    (request.area, request.vl_area) = (args.wish.area, args.wish.vl_area);
    request.planner = options(&args.planner);
    request.cancel = super::cancel_on_interrupt()?;
    let bar = Bar::new(args.report.quiet);
    for note in request.pictures.iter().flat_map(|picture| &picture.notes) {
        bar.note(note);
    }
    if !tags.is_empty() {
        bar.note(
            "the planner does not see the LoRA tags of the prompt; give them to edit as --lora",
        );
    }
    let mut engine = model::options(&args.model, &request.cancel)?;
    engine.planner = source(&args.planner, &args.model.places)?;
    let observer = |event: &Event<'_>| {
        if !matches!(event, Event::Planned(_)) {
            bar.event(event); // the plan itself goes to stdout
        }
    };
    let model = model::source(&args.model)?;
    if args.dry_run {
        let plan = Assistant::memory(&model, &engine, &request, &observer);
        bar.clear();
        return memory::print(&plan?, args.report.json);
    }
    let outcome = Assistant::open(&model, &engine, &observer)
        .and_then(|assistant| assistant.plan(&request, &observer));
    bar.clear();
    let outcome = outcome?;
    if args.report.verbose > 0 {
        bar.note(&how(&outcome));
    }
    match args.report.json {
        true => super::print_line(&outcome.plan.to_json()),
        false => super::print_line(&outcome.plan.to_string()),
    }
}

fn how(outcome: &PlanOutcome) -> String {
    let times: Vec<String> = outcome
        .stages
        .iter()
        .map(|report| format!("{} {:.2} s", report.stage.label(), report.elapsed.as_secs_f64()))
        .collect();
    let value = json!({ "planned_by": outcome.planned_by, "tokens": outcome.tokens });
    format!("{value}, {}", times.join(", "))
}

/// The prompt as it was given, if it was.
pub(crate) fn prompt(args: &PromptArgs) -> Result<Option<String>> {
    match (&args.prompt, &args.prompt_words, &args.prompt_file) {
        (Some(prompt), ..) | (None, Some(prompt), _) => Ok(Some(prompt.clone())),
        (None, None, Some(file)) => {
            let text = text_file("--prompt-file", file)?;
            Ok(Some(text.trim_end_matches(['\r', '\n']).to_owned()))
        }
        (None, None, None) => Ok(None),
    }
}

/// What a request without a prompt is told.
pub(crate) fn no_prompt(expected: &str) -> Error {
    let (field, found) = ("--prompt", "nothing".to_owned());
    RequestError::Field { field, found, expected: expected.to_owned() }.into()
}

/// How the planner writes.
pub(crate) fn options(args: &PlannerArgs) -> PlanOptions {
    PlanOptions {
        tokens_max: args.planner_tokens,
        temperature: args.planner_temperature,
        seed: args.planner_seed,
        grammar: !args.no_planner_grammar,
    }
}

/// Which model plans.
pub(crate) fn source(args: &PlannerArgs, places: &PlacesArgs) -> Result<PlannerSource> {
    let prompts = match &args.planner_prompt {
        Some(file) => Some(text_file("--planner-prompt", file)?),
        None => None,
    };
    Ok(PlannerSource {
        model: places::planner_folder(&args.planner, &places::places(places)?)?,
        adapter: args.planner_adapter.clone(),
        prompts,
    })
}

/// A plan from a file, or from stdin.
pub(crate) fn read(path: &Path) -> Result<Plan> {
    let mut bytes = Vec::new();
    if path.as_os_str() == "-" {
        std::io::stdin().lock().take(PLAN_BYTES_MAX).read_to_end(&mut bytes)?;
    } else {
        bytes = read_start("--plan", path, PLAN_BYTES_MAX)?;
    }
    Plan::from_json(&bytes)
}

/// A text file that a flag names; also a pipe, so it is read under a limit.
fn text_file(flag: &'static str, file: &Path) -> Result<String> {
    /// No prompt is nearly as long.
    const BYTES_MAX: u64 = 1 << 20;
    let bytes = read_start(flag, file, BYTES_MAX + 1)?;
    let field = |found: String, expected: String| {
        Error::from(RequestError::Field { field: flag, found, expected })
    };
    if bytes.len() as u64 > BYTES_MAX {
        let found = format!("{}: more than {BYTES_MAX} bytes", file.display());
        return Err(field(found, format!("a text of at most {BYTES_MAX} bytes")));
    }
    let text = String::from_utf8(bytes)
        .map_err(|error| field(format!("{}: {error}", file.display()), "UTF-8 text".to_owned()))?;
    // Editors on Windows put a mark before UTF-8 that is no part of the text.
    Ok(text.strip_prefix('\u{feff}').unwrap_or(&text).to_owned())
}

/// At most `bytes_max` bytes of a file that a flag names.
fn read_start(flag: &'static str, file: &Path, bytes_max: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read =
        fs_err::File::open(file).and_then(|opened| opened.take(bytes_max).read_to_end(&mut bytes));
    read.map_err(|error| RequestError::Field {
        field: flag,
        found: error.to_string(),
        expected: "a file that can be read".to_owned(),
    })?;
    Ok(bytes)
}
