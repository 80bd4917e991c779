//! Measuring an engine on held-out cases of the miniature world.

use std::{collections::BTreeSet, time::Instant};

use image::RgbImage;

use super::{
    case::{Case, Spec, Style, held_out_seed},
    readout::succeeds,
    render::{SIDE, render},
    report::{Mean, Pictures, REPORT_VERSION, Rate, Report},
    scene::Scene,
    suites::{Part, ROW},
    wish::Operation,
    world::WORLD,
};
use crate::{
    CancelToken, EditRequest, Engine, Error, Event, Observer, Result, Stage, Strategy,
    pixels::{ModelRecord, Picture},
};

/// Seed of every picture's noise, as in the recipe's check.
const NOISE_SEED: u64 = 0;
/// Where the cases for the readout's own check begin.
const READOUT_START: u64 = 700_000;
/// Pixels by which a picture is shifted that must not be accepted.
const SHIFT_PX: usize = 3;

/// What is measured.
#[derive(Debug, Clone)]
pub struct Measurement {
    /// Draws the held-out cases.
    pub seed: u32,
    /// Cases of each row.
    pub count: u32,
    /// Which parts.
    pub parts: BTreeSet<Part>,
    /// Stops it.
    pub cancel: CancelToken,
}

impl Measurement {
    /// Everything, with `count` cases in each row.
    #[must_use]
    pub fn new(seed: u32, count: u32) -> Self {
        Self { seed, count, parts: Part::ALL.into(), cancel: CancelToken::new() }
    }

    /// Carries out the edits and judges each picture by the strict readout.
    ///
    /// # Errors
    /// A count outside its range, cancellation, and whatever an edit fails with.
    pub fn run(&self, engine: &Engine, observer: &dyn Observer) -> Result<Report> {
        self.check()?;
        let editor = Editor::new(self, engine, observer, self.edits());
        let pictures = |part: Part| -> Result<Vec<Pictures>> {
            let wanted = self.parts.contains(&part);
            let strategies = if wanted { strategies(part) } else { &[] };
            strategies.iter().map(|strategy| editor.pictures(part, *strategy)).collect()
        };
        Ok(Report {
            version: REPORT_VERSION,
            model: model_record(engine),
            seed: self.seed,
            count: self.count,
            noise_seed: NOISE_SEED,
            readout: check_readout(self.seed, self.count),
            single: pictures(Part::Single)?.pop(),
            wordings: pictures(Part::Wordings)?.pop(),
            many: pictures(Part::Many)?,
        })
    }

    /// Checks the count, which a caller may do before opening an engine.
    ///
    /// # Errors
    /// A count outside its range.
    pub fn check(&self) -> Result<()> {
        if (1..=ROW).contains(&self.count) {
            return Ok(());
        }
        Err(Error::field("count", self.count, format!("1 to {ROW}")))
    }

    /// How many edits it takes.
    fn edits(&self) -> usize {
        let rows = |part: &Part| part.rows().len() * strategies(*part).len();
        self.parts.iter().map(rows).sum::<usize>() * self.count as usize
    }
}

/// The ways in which a part's requests are carried out.
fn strategies(part: Part) -> &'static [Strategy] {
    match part {
        Part::Single | Part::Wordings | Part::Many => &[Strategy::Direct],
    }
}

/// An engine, and what the edits so far amount to.
pub(super) struct Editor<'a> {
    measurement: &'a Measurement,
    engine: &'a Engine,
    observer: &'a dyn Observer,
    start: Instant,
    done: std::cell::Cell<usize>,
    of: usize,
}

impl<'a> Editor<'a> {
    pub(super) fn new(
        measurement: &'a Measurement,
        engine: &'a Engine,
        observer: &'a dyn Observer,
        of: usize,
    ) -> Self {
        Self { measurement, engine, observer, start: Instant::now(), done: 0.into(), of }
    }

    fn pictures(&self, part: Part, strategy: Strategy) -> Result<Pictures> {
        let (mut rows, mut all) = (Vec::new(), Rate::new("all"));
        let mut outside = Mean::default();
        for row in part.rows() {
            let mut rate = Rate::new(row.name);
            for case in row.cases(self.measurement.seed, self.measurement.count) {
                let pixels = self.edit(&case, strategy)?;
                let right = succeeds(&pixels, &case.target);
                rate.count(right);
                all.count(right);
                outside_error(&pixels, &case).into_iter().for_each(|error| outside.add(error));
            }
            rows.push(rate);
        }
        let strategy = strategy.name();
        Ok(Pictures { strategy, rows, all, outside_error_levels: outside.value() })
    }

    /// What the engine makes of a case's request.
    pub(super) fn edit(&self, case: &Case, strategy: Strategy) -> Result<RgbImage> {
        let step = self.done.replace(self.done.get() + 1);
        let (of, elapsed) = (self.of, self.start.elapsed());
        self.observer.event(&Event::Step { stage: Stage::Measure, step, of, elapsed });
        let mut request = EditRequest::new(Picture::from_rgb(picture(&case.scene)), &case.request);
        request.seed = Some(NOISE_SEED);
        request.strategy = strategy;
        request.cancel = self.measurement.cancel.clone();
        Ok(self.engine.edit(&request, &())?.picture.rgb)
    }
}

fn model_record(engine: &Engine) -> ModelRecord {
    let model = engine.model();
    ModelRecord {
        name: model.name.clone(),
        class: model.class.to_owned(),
        digest: Some(model.digest.clone()),
    }
}

/// The scene's picture.
pub(super) fn picture(scene: &Scene) -> RgbImage {
    let side = u32::try_from(SIDE).expect("a scene is small");
    RgbImage::from_raw(side, side, render(scene)).expect("as many pixels as the side says")
}

/// Mean absolute error, in levels, over the cells that are the same before and after; `None` where
/// there are none.
pub(super) fn outside_error(pixels: &[u8], case: &Case) -> Option<f64> {
    let (before, after) = (render(&case.scene), render(&case.target));
    let mut error = Mean::default();
    for y in (0..SIDE).step_by(WORLD.cell) {
        for x in (0..SIDE).step_by(WORLD.cell) {
            let values = || cell(x, y);
            if values().all(|at| before[at] == after[at]) {
                values().for_each(|at| error.add(f64::from(pixels[at].abs_diff(after[at]))));
            }
        }
    }
    error.value()
}

/// The values of a cell, as positions in a picture's bytes.
fn cell(x: usize, y: usize) -> impl Iterator<Item = usize> {
    let line = move |y| (SIDE * y + x) * 3..(SIDE * y + x + WORLD.cell) * 3;
    (y..y + WORLD.cell).flat_map(line)
}

/// What the readout says about exact targets and about pictures that are wrong on purpose.
fn check_readout(seed: u32, count: u32) -> Vec<Rate> {
    let names = ["exact target", "unchanged input", "black", "shifted", "wrong color"];
    let mut rates = names.map(Rate::new);
    let operation = Some(Operation::Recolor);
    let spec = Spec { wishes: 1, operation, style: Style::Direct, held_out: false };
    for index in 0..u64::from(count) {
        let case = Case::sample(held_out_seed(u64::from(seed), READOUT_START + index), &spec);
        let target = render(&case.target);
        let mut shifted = target.clone();
        shifted.chunks_exact_mut(SIDE * 3).for_each(|line| line.rotate_right(SHIFT_PX * 3));
        let wrong = render(&with_wrong_color(&case));
        let black = vec![0; target.len()];
        let pictures = [target, render(&case.scene), black, shifted, wrong];
        for (rate, pixels) in rates.iter_mut().zip(pictures) {
            rate.count(succeeds(&pixels, &case.target));
        }
    }
    rates.into()
}

/// The target with the object that was to be recolored in the color after the one asked for.
fn with_wrong_color(case: &Case) -> Scene {
    let mut wrong = case.target.clone();
    for (place, thing) in &mut wrong.objects {
        if case.scene.objects.get(place) != Some(thing) {
            thing.color = (thing.color + 1) % WORLD.colors.len();
        }
    }
    wrong
}
