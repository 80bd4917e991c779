//! `pentimento edit`

use std::path::Path;

use pentimento::{
    EditOutcome, EditRequest, Engine, Event, HandOver, LoraSource, Observer, Result, Stage,
    StageReport,
    pixels::{self, Format, Overwrite},
};
use serde_json::json;

use super::{
    args::{EditArgs, HandOverArg},
    lora_tags, memory, model, plan,
    progress::Bar,
    steps::KeptSteps,
};

pub(crate) fn run(args: EditArgs) -> Result<()> {
    let overwrite = if args.force { Overwrite::Replace } else { Overwrite::Refuse };
    let to_stdout = args.output.as_os_str() == "-";
    if to_stdout && args.report.json && !args.dry_run {
        return Err(pentimento::RequestError::Field {
            field: "--json",
            found: "beside `--output -`".to_owned(),
            expected: "one of the two, as both write to stdout".to_owned(),
        }
        .into());
    }
    // What would make the result impossible to write is told before any work.
    if !to_stdout && !args.dry_run {
        pixels::check_output(&args.output, overwrite)?;
    }
    let (request, tagged) = request(&args)?;
    let kept = args
        .keep_steps
        .as_deref()
        .filter(|_| !args.dry_run)
        .map(|folder| KeptSteps::new(folder, overwrite));
    let kept = kept.transpose()?;
    let bar = Bar::new(args.report.quiet);
    for note in request.pictures.iter().flat_map(|picture| &picture.notes) {
        bar.note(note);
    }
    let mut options = model::editor_options(&args.model, &args.lora, &request.cancel)?;
    options.planner = plan::source(&args.planner, &args.model.places)?;
    options.loras.extend(tagged);
    let source = model::source(&args.model)?;
    if args.dry_run {
        let plan = Engine::memory(&source, &options, &request, &bar);
        bar.clear();
        return memory::print(&plan?, args.report.json);
    }
    let observer = |event: &Event<'_>| {
        bar.event(event);
        if let Some(kept) = &kept {
            kept.event(event);
        }
    };
    let result = Engine::open_for(&source, &options, &request, &bar)
        .and_then(|engine| Ok((engine.edit(&request, &observer)?, engine)));
    bar.clear();
    let (outcome, engine) = result?;
    for note in kept.map(KeptSteps::finish).transpose()?.into_iter().flatten() {
        bar.note(&note);
    }
    let record = engine.record(&request, &outcome);
    let written = (!args.no_metadata).then_some(&record);

    bar.note(&told(&engine, &outcome));
    if to_stdout {
        let encoded = pixels::encode_to_vec(&outcome.picture, Format::Png, written)?;
        return super::print(&encoded.bytes);
    }
    for note in pixels::save(&outcome.picture, &args.output, overwrite, written)? {
        bar.note(&note);
    }
    if args.report.json {
        return super::print_json(&summary(
            &args.output,
            &engine,
            &request,
            &outcome,
            &record.prompt,
        ));
    }
    super::print_line(&args.output.display().to_string())
}

/// The request, and the LoRA files that tags in its prompt name.
fn request(args: &EditArgs) -> Result<(EditRequest, Vec<LoraSource>)> {
    let stdin = |path: &std::path::PathBuf| path.as_os_str() == "-";
    if args.plan.as_ref().is_some_and(stdin) && args.wish.images.iter().any(stdin) {
        return Err(pentimento::RequestError::Field {
            field: "--plan",
            found: "`-` for the plan and for a picture".to_owned(),
            expected: "stdin at most once".to_owned(),
        }
        .into());
    }
    let plan = args.plan.as_deref().map(plan::read).transpose()?;
    let prompt = match plan::prompt(&args.wish.prompt)? {
        Some(prompt) => prompt,
        None if plan.is_some() => String::new(),
        None => {
            let expected = "a sentence that says what should change, --prompt-file or --plan";
            return Err(plan::no_prompt(expected));
        }
    };
    let (prompt, tags) = lora_tags::split(&prompt)?;
    let loras = lora_tags::files(&tags, args.lora_model_dir.as_deref())?;
    let mut pictures = model::pictures(&args.wish.images)?;
    let first = pictures.remove(0); // clap asks for at least one
    let mut request = EditRequest::new(first, prompt);
    request.pictures.append(&mut pictures);
    request.negative_prompt.clone_from(&args.negative_prompt);
    request.steps = args.steps;
    request.seed = args.seed.and_then(|seed| seed.number());
    request.rng = args.rng;
    request.cfg_scale = args.cfg_scale;
    let [width, height] =
        args.size.map_or([args.width, args.height], |size| size.map(Some)).map(|side| side?.px());
    (request.width, request.height) = (width, height);
    (request.area, request.vl_area) = (args.wish.area, args.wish.vl_area);
    request.strategy = args.strategy.strategy();
    request.hand_over = match args.hand_over {
        HandOverArg::Latents => HandOver::Latents,
        HandOverArg::Pixels => HandOver::Pixels,
    };
    request.step_cache = args.cache.settings();
    request.plan = plan;
    request.planner = plan::options(&args.planner);
    request.cancel = super::cancel_on_interrupt()?;
    Ok((request, loras))
}

fn summary(
    output: &Path,
    engine: &Engine,
    request: &EditRequest,
    outcome: &EditOutcome,
    prompt: &str,
) -> serde_json::Value {
    let mut stages = vec![engine.load_report()];
    stages.extend(&outcome.stages);
    let size = outcome.picture.size();
    json!({
        "version": 1,
        "output": output.to_string_lossy(),
        "width": size.width,
        "height": size.height,
        "working_size": outcome.working_size,
        "prompt": prompt,
        "negative_prompt": request.negative_prompt,
        "seed": outcome.seed,
        "rng": request.rng.name(),
        "steps": outcome.steps,
        "step_cache": request.step_cache,
        "reused": outcome.reused,
        "cfg_scale": outcome.cfg_scale,
        "strategy": outcome.strategy,
        "plan": outcome.plan,
        "planned_by": outcome.planned_by,
        "prompts": outcome.prompts,
        "planner": { "shares_text_encoder": engine.planner_is_shared() },
        "weights": engine.weights(),
        "memory": outcome.memory,
        "model": {
            "name": engine.model().name,
            "version": engine.model().version,
            "digest": engine.model().digest,
            "untrained": engine.model().untrained,
        },
        "loras": engine.loras(),
        "stages": stages,
        "notes": outcome.notes,
    })
}

/// Seed, steps and times of the stages, for the person at the terminal.
fn told(engine: &Engine, outcome: &EditOutcome) -> String {
    let time = |label: &str, report: &StageReport| {
        format!("{label} {:.2} s", report.elapsed.as_secs_f64())
    };
    let of_stage = |report: &StageReport| match report.stage {
        // What is read after opening is read while the planner writes.
        Stage::Load => time("reading the transformer meanwhile", report),
        stage => time(stage.label(), report),
    };
    let opened = engine.load_report();
    let opened = std::iter::once(time(opened.stage.label(), &opened));
    let times: Vec<String> = opened.chain(outcome.stages.iter().map(of_stage)).collect();
    format!("seed {}, {} steps, {}", outcome.seed, outcome.steps, times.join(", "))
}
