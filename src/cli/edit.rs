//! `pentimento edit`

use std::path::Path;

use pentimento::{
    EditOutcome, EditRequest, Engine, Error, Result, StageReport, Strategy,
    pixels::{self, EditRecord, Format, ModelRecord, Overwrite, RECORD_VERSION},
};
use serde_json::json;

use super::{
    args::{EditArgs, StrategyArg},
    model,
    progress::Bar,
};

pub(crate) fn run(args: EditArgs) -> Result<()> {
    let overwrite = if args.force { Overwrite::Replace } else { Overwrite::Refuse };
    let to_stdout = args.output.as_os_str() == "-";
    // What would make the result impossible to write is told before any work.
    if !to_stdout {
        pixels::check_output(&args.output, overwrite)?;
    }
    let request = request(&args)?;
    let bar = Bar::new(args.report.quiet);
    for note in request.pictures.iter().flat_map(|picture| &picture.notes) {
        bar.note(note);
    }
    let engine = model::open(&args.model, &bar)?;
    let result = engine.edit(&request, &bar);
    bar.clear();
    let outcome = result?;
    let record = (!args.no_metadata).then(|| record(&engine, &request, &outcome));

    if to_stdout {
        let encoded = pixels::encode_to_vec(&outcome.picture, Format::Png, record.as_ref())?;
        return super::print(&encoded.bytes);
    }
    for note in pixels::save(&outcome.picture, &args.output, overwrite, record.as_ref())? {
        bar.note(&note);
    }
    if args.report.json {
        return super::print_json(&summary(&args.output, &engine, &request, &outcome));
    }
    if !args.report.quiet {
        bar.note(&format!(
            "seed {}, {} steps, {}",
            outcome.seed,
            outcome.steps,
            times(&engine, &outcome)
        ));
    }
    super::print_line(&args.output.display().to_string())
}

fn request(args: &EditArgs) -> Result<EditRequest> {
    let prompt = match (&args.prompt, &args.prompt_words, &args.prompt_file) {
        (Some(prompt), ..) | (None, Some(prompt), _) => prompt.clone(),
        (None, None, Some(file)) => prompt_from_file(file)?,
        (None, None, None) => String::new(), // clap asks for one of them
    };
    let mut pictures = model::pictures(&args.images)?;
    let first = pictures.remove(0); // clap asks for at least one
    let mut request = EditRequest::new(first, prompt);
    request.pictures.append(&mut pictures);
    request.negative_prompt.clone_from(&args.negative_prompt);
    request.steps = args.steps;
    request.seed = args.seed.and_then(|seed| seed.number());
    request.rng = args.rng;
    request.cfg_scale = args.cfg_scale;
    (request.width, request.height) = (args.width, args.height);
    (request.area, request.vl_area) = (args.area, args.vl_area);
    request.strategy = match args.strategy {
        StrategyArg::Direct => Strategy::Direct,
    };
    request.cancel = super::cancel_on_interrupt()?;
    Ok(request)
}

fn prompt_from_file(file: &Path) -> Result<String> {
    let text = String::from_utf8(fs_err::read(file)?).map_err(|error| {
        Error::from(pentimento::RequestError::Field {
            field: "--prompt-file",
            found: format!("{}: {error}", file.display()),
            expected: "UTF-8 text".to_owned(),
        })
    })?;
    Ok(text.trim_end_matches(['\r', '\n']).to_owned())
}

fn record(engine: &Engine, request: &EditRequest, outcome: &EditOutcome) -> EditRecord {
    let model = engine.model();
    EditRecord {
        version: RECORD_VERSION,
        program: EditRecord::this_program(),
        prompt: request.prompt.clone(),
        negative_prompt: request.negative_prompt.clone(),
        seed: outcome.seed,
        rng: request.rng.name().to_owned(),
        steps: outcome.steps,
        sampler: "Euler".to_owned(),
        cfg_scale: outcome.cfg_scale,
        strategy: request.strategy.name().to_owned(),
        model: ModelRecord {
            name: model.name.clone(),
            class: model.class.to_owned(),
            digest: Some(model.digest.clone()),
        },
        working_size: outcome.working_size,
        input_sizes: request.pictures.iter().map(pixels::Picture::size).collect(),
        timings_ms: outcome.stages.iter().map(timing).collect(),
    }
}

fn timing(report: &StageReport) -> (String, u64) {
    let elapsed_ms = u64::try_from(report.elapsed.as_millis()).unwrap_or(u64::MAX);
    (report.stage.name().to_owned(), elapsed_ms)
}

fn summary(
    output: &Path,
    engine: &Engine,
    request: &EditRequest,
    outcome: &EditOutcome,
) -> serde_json::Value {
    let mut stages = vec![engine.load_report()];
    stages.extend(&outcome.stages);
    let size = outcome.picture.size();
    json!({
        "version": 1,
        "output": output,
        "width": size.width,
        "height": size.height,
        "working_size": outcome.working_size,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": outcome.seed,
        "rng": request.rng.name(),
        "steps": outcome.steps,
        "cfg_scale": outcome.cfg_scale,
        "strategy": request.strategy,
        "model": {
            "name": engine.model().name,
            "version": engine.model().version,
            "digest": engine.model().digest,
            "untrained": engine.model().untrained,
        },
        "stages": stages,
        "notes": outcome.notes,
    })
}

fn times(engine: &Engine, outcome: &EditOutcome) -> String {
    let stages = std::iter::once(engine.load_report()).chain(outcome.stages.iter().copied());
    let times: Vec<String> = stages
        .map(|report| format!("{} {:.2} s", report.stage.label(), report.elapsed.as_secs_f64()))
        .collect();
    times.join(", ")
}
