//! `pentimento eval`: what a model gets right.

use std::{path::Path, time::Instant};

use pentimento::{
    Engine, Result,
    eval::scenes::{
        DriftMeasurement, Measurement, Part, Pictures, PlanSource, REPORT_VERSION, Rate, Replies,
        Report,
    },
    pixels::{self, Overwrite, Picture},
};
use serde_json::json;

use super::{
    eval_args::{DriftArgs, PartArg, ScenesArgs},
    model, plan,
    progress::Bar,
};

pub(crate) fn scenes(args: &ScenesArgs) -> Result<()> {
    let overwrite = if args.force { Overwrite::Replace } else { Overwrite::Refuse };
    if let Some(path) = &args.contact_sheet {
        pixels::check_output(path, overwrite)?;
    }
    let mut measurement = Measurement::new(args.seed, args.count);
    if !args.only.is_empty() {
        measurement.parts = args.only.iter().map(|part| part.part()).collect();
    }
    measurement.planner = plan::options(&args.planner);
    measurement.steps = args.steps;
    measurement.step_cache = args.cache.settings();
    measurement.cancel = super::cancel_on_interrupt()?;
    measurement.check()?;
    let bar = Bar::new(args.report.quiet);
    let mut options = model::editor_options(&args.model, &args.lora, &measurement.cancel)?;
    options.planner = plan::source(&args.planner, &args.model.places)?;
    let start = Instant::now();
    let result = Engine::open(&model::source(&args.model)?, &options, &bar).and_then(|engine| {
        match &args.contact_sheet {
            Some(path) => contact_sheet(args, &measurement, &engine, &bar, (path, overwrite)),
            None => measure(args, &measurement, &engine, &bar),
        }
    });
    bar.clear();
    result?;
    if !args.report.quiet {
        bar.note(&format!("{:.1} s", start.elapsed().as_secs_f64()));
    }
    Ok(())
}

pub(crate) fn drift(args: &DriftArgs) -> Result<()> {
    let measurement = DriftMeasurement {
        seed: args.seed,
        count: args.count,
        passes: args.passes,
        cancel: super::cancel_on_interrupt()?,
    };
    let bar = Bar::new(args.report.quiet);
    let options = model::editor_options(&args.model, &args.lora, &measurement.cancel)?;
    let result = Engine::open(&model::source(&args.model)?, &options, &bar)
        .and_then(|engine| measurement.run(&engine, &bar));
    bar.clear();
    let report = result?;
    if args.report.json {
        return super::print_json(&report);
    }
    let mut lines = vec![format!("{} chains, seed {}", report.count, report.seed)];
    for way in &report.ways {
        heading(&mut lines, &format!("handed on as {}", way.hand_over.name()));
        lines.extend(way.rows.iter().map(|row| {
            format!(
                "  {:>3} passes  {:>6.2} dB  color shift {:>5.2} levels  exact {:>5.1} %",
                row.passes,
                row.psnr_db,
                row.color_shift,
                row.exact * 100.0
            )
        }));
    }
    super::print((lines.join("\n") + "\n").as_bytes())
}

fn measure(args: &ScenesArgs, measurement: &Measurement, engine: &Engine, bar: &Bar) -> Result<()> {
    let report = measurement.run(engine, bar)?;
    bar.clear();
    if args.report.json {
        return super::print_json(&report);
    }
    super::print(table(&report).as_bytes())
}

fn contact_sheet(
    args: &ScenesArgs,
    measurement: &Measurement,
    engine: &Engine,
    bar: &Bar,
    (path, overwrite): (&Path, Overwrite),
) -> Result<()> {
    let sheet = measurement.contact_sheet(engine, args.strategy.strategy(), bar)?;
    bar.clear();
    for note in pixels::save(&Picture::from_rgb(sheet.picture), path, overwrite, None)? {
        bar.note(&note);
    }
    let pairs = sheet.requests.iter();
    if args.report.json {
        let pairs = pairs.map(|(request, right)| json!({ "request": request, "right": right }));
        return super::print_json(&json!({
            "version": REPORT_VERSION,
            "output": path.to_string_lossy(),
            "seed": args.seed,
            "pairs": pairs.collect::<Vec<_>>(),
        }));
    }
    for (index, (request, right)) in pairs.enumerate() {
        let mark = if *right { "right" } else { "wrong" };
        super::print_line(&format!("{:>3}  {mark}  {request}", index + 1))?;
    }
    super::print_line(&path.display().to_string())
}

fn table(report: &Report) -> String {
    let mut lines = vec![format!(
        "model {}, seed {}, {} held-out cases a row",
        report.model.name, report.seed, report.count
    )];
    heading(&mut lines, "the readout accepts");
    lines.extend(report.readout.iter().map(line));
    if let (Some(cache), Some(reuse)) = (report.step_cache, report.reuse) {
        lines.push(format!(
            "step cache, threshold {}: all but the first block of {} of {} predictions left out",
            cache.threshold(),
            reuse.reused,
            reuse.of
        ));
    }
    let mut section = |title: &str, pictures: &Pictures| {
        let plan = match pictures.plan {
            PlanSource::None => "no plan",
            PlanSource::Planner => "the planner's plan",
            PlanSource::Annotation => "a faultless plan",
        };
        heading(&mut lines, &format!("{title}: {}, {plan}", pictures.strategy));
        lines.extend(pictures.rows.iter().map(line));
        lines.push(line(&pictures.all));
        if let Some(levels) = pictures.outside_error_levels {
            lines
                .push(format!("  mean error outside the edited places: {levels:.2} levels of 255"));
        }
    };
    let sections = [
        ("exactly right: one wish, said directly", report.single.as_slice()),
        ("exactly right: one wish in other wordings", report.wordings.as_slice()),
        ("exactly right: two to four wishes", report.many.as_slice()),
    ];
    for (title, pictures) in sections {
        pictures.iter().for_each(|pictures| section(title, pictures));
    }
    if let Some(plans) = &report.plans {
        heading(&mut lines, "plans for two to four wishes that equal the annotation");
        lines.push(line(plans));
    }
    if let Some(rows) = &report.decomposition {
        heading(&mut lines, "decomposition            well-formed   mean F1    exact");
        lines.extend(rows.iter().map(replies));
    }
    lines.join("\n") + "\n"
}

fn replies(row: &Replies) -> String {
    let [well_formed, exact] = [row.well_formed, row.exact].map(|share| share * 100.0);
    format!("  {:<24} {well_formed:>8.1} % {:>9.3} {exact:>6.1} %", row.name, row.f1)
}

fn heading(lines: &mut Vec<String>, title: &str) {
    lines.extend([String::new(), title.to_owned()]);
}

fn line(rate: &Rate) -> String {
    let Rate { name, right, of, share } = rate;
    format!("  {name:<24} {:>5.1} %  {right:>4} of {of}", share * 100.0)
}

impl PartArg {
    fn part(self) -> Part {
        match self {
            Self::Single => Part::Single,
            Self::Wordings => Part::Wordings,
            Self::Many => Part::Many,
            Self::Decomposition => Part::Decomposition,
        }
    }
}
