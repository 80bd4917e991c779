//! Measuring an engine on held-out cases of the miniature world.

use std::collections::BTreeSet;

use super::{
    case::{Case, Spec, Style, held_out_seed},
    editing::{Desk, Way, annotated_plan},
    readout::succeeds,
    render::{SIDE, render},
    report::{Mean, Pictures, PlanSource, REPORT_VERSION, Rate, Replies, Report},
    scene::Scene,
    suites::{Part, ROW},
    wish::Operation,
    world::WORLD,
};
use crate::{
    CancelToken, Engine, Error, Observer, Result, StepCache,
    plan::{Decomposition, Plan, PlanOptions, Score},
};

/// Seed of every picture's noise, as in the recipe's check.
pub(super) const NOISE_SEED: u64 = 0;
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
    /// How the planner writes. The replies of [`Part::Decomposition`] are always written without
    /// the grammar, which would keep them well-formed.
    pub planner: PlanOptions,
    /// Denoising steps of each edit; `None` is the model's default.
    pub steps: Option<usize>,
    /// Which steps of the edits may be left out.
    pub step_cache: Option<StepCache>,
    /// Stops it.
    pub cancel: CancelToken,
}

impl Measurement {
    /// Everything, with `count` cases in each row.
    #[must_use]
    pub fn new(seed: u32, count: u32) -> Self {
        let (parts, planner) = (Part::ALL.into(), PlanOptions::default());
        let cancel = CancelToken::new();
        Self { seed, count, parts, planner, steps: None, step_cache: None, cancel }
    }

    /// Carries out the edits and judges each picture by the strict readout.
    ///
    /// # Errors
    /// A count outside its range, cancellation, and whatever an edit fails with, except that a
    /// planner's failure counts as a wrong picture.
    pub fn run(&self, engine: &Engine, observer: &dyn Observer) -> Result<Report> {
        self.check()?;
        let of = self.parts.iter().map(|part| part.rows().len() * ways(*part).len()).sum::<usize>();
        let desk = Desk::new(self, engine, observer, of * self.count as usize);
        let wants = |part: Part| self.parts.contains(&part);
        let pictures = |part: Part| {
            if wants(part) { self.pictures(part, &desk) } else { Ok((Vec::new(), None)) }
        };
        let single = pictures(Part::Single)?.0.pop();
        let wordings = pictures(Part::Wordings)?.0.pop();
        let (many, plans) = pictures(Part::Many)?;
        let decomposition = wants(Part::Decomposition).then(|| self.replies(&desk)).transpose()?;
        let model = engine.model().record();
        let readout = check_readout(self.seed, self.count);
        let (version, seed, count) = (REPORT_VERSION, self.seed, self.count);
        Ok(Report {
            version,
            model,
            seed,
            count,
            noise_seed: NOISE_SEED,
            readout,
            single,
            wordings,
            many,
            plans,
            decomposition,
            step_cache: self.step_cache,
            reuse: self.step_cache.map(|_| desk.reuse()),
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

    /// Strict success of a part's cases in each of its ways, and how many plans equal the
    /// annotation where the planner was asked.
    fn pictures(&self, part: Part, desk: &Desk<'_>) -> Result<(Vec<Pictures>, Option<Rate>)> {
        let mut tallies: Vec<Tally> = ways(part).iter().map(|way| Tally::new(*way)).collect();
        let mut plans = None;
        for row in part.rows() {
            tallies.iter_mut().for_each(|tally| tally.begin(row.name));
            for case in row.cases(self.seed, self.count) {
                edit_in_all_ways(desk, &case, &mut tallies, &mut plans)?;
            }
        }
        Ok((tallies.into_iter().map(Tally::finish).collect(), plans))
    }

    fn replies(&self, desk: &Desk<'_>) -> Result<Vec<Replies>> {
        let mut rows = Vec::new();
        for row in Part::Decomposition.rows() {
            let [mut form, mut f1, mut exact] = [(); 3].map(|()| Mean::default());
            for case in row.cases(self.seed, self.count) {
                let truth = Decomposition::parse(&case.tags()).expect("a test parses them");
                let reply = desk.reply(&case)?;
                let score = reply.map(|reply| Score::of(&reply, &truth)).unwrap_or_default();
                form.add(score.format);
                f1.add(score.f1());
                exact.add(f64::from(u8::from(score.is_exact())));
            }
            let [well_formed, f1, exact] =
                [form, f1, exact].map(|mean| mean.value().unwrap_or(0.0));
            let (name, of) = (row.name.to_owned(), self.count);
            rows.push(Replies { name, of, well_formed, f1, exact });
        }
        Ok(rows)
    }
}

/// The ways in which a part's requests are carried out.
fn ways(part: Part) -> &'static [Way] {
    match part {
        Part::Single | Part::Wordings | Part::Decomposition => &[Way::DIRECT],
        Part::Many => &Way::ALL,
    }
}

/// Edits a case in each way; the planner is asked once.
fn edit_in_all_ways(
    desk: &Desk<'_>,
    case: &Case,
    tallies: &mut [Tally],
    plans: &mut Option<Rate>,
) -> Result<()> {
    let (mut asked, mut planned) = (false, None);
    for tally in tallies {
        let made = tally.edit(desk, case, planned.as_ref())?;
        if tally.way.plan == PlanSource::Planner && !asked {
            asked = true;
            let equal = made.as_ref().is_some_and(|plan| says(plan, case));
            plans.get_or_insert_with(|| Rate::new("plans")).count(equal);
            // A plan that could not be handed in is made again.
            planned = Some(made).filter(is_usable);
        }
    }
    Ok(())
}

/// Whether the planner failed, or its plan may be handed in.
fn is_usable(plan: &Option<Plan>) -> bool {
    plan.as_ref().is_none_or(|plan| plan.check().is_ok())
}

/// Whether a plan's steps are the annotation's, word for word.
fn says(plan: &Plan, case: &Case) -> bool {
    plan.steps.iter().map(|step| &step.prompt).eq(&case.sub_requests())
}

/// The counts of one way.
struct Tally {
    way: Way,
    pictures: Pictures,
    outside: Mean,
}

impl Tally {
    fn new(way: Way) -> Self {
        Self { way, pictures: Pictures::new(way.strategy, way.plan), outside: Mean::default() }
    }

    fn begin(&mut self, row: &str) {
        self.pictures.rows.push(Rate::new(row));
    }

    /// Edits and judges a case; returns the plan that was carried out. `planned` is what the
    /// planner has said to the same request, where it was asked before.
    fn edit(
        &mut self,
        desk: &Desk<'_>,
        case: &Case,
        planned: Option<&Option<Plan>>,
    ) -> Result<Option<Plan>> {
        let plan = match self.way.plan {
            PlanSource::None => None,
            PlanSource::Planner => planned.cloned().flatten(),
            PlanSource::Annotation => Some(annotated_plan(case)),
        };
        // A planner that has failed would fail again.
        let failed = self.way.plan == PlanSource::Planner && planned.is_some() && plan.is_none();
        let outcome = if failed { None } else { desk.edit(case, self.way.strategy, plan)? };
        let Some(outcome) = outcome else {
            self.count(false);
            return Ok(None);
        };
        let pixels = outcome.picture.rgb.as_raw();
        self.count(succeeds(pixels, &case.target));
        outside_error(pixels, case).into_iter().for_each(|error| self.outside.add(error));
        Ok(outcome.plan)
    }

    fn count(&mut self, right: bool) {
        self.pictures.all.count(right);
        if let Some(row) = self.pictures.rows.last_mut() {
            row.count(right);
        }
    }

    fn finish(self) -> Pictures {
        Pictures { outside_error_levels: self.outside.value(), ..self.pictures }
    }
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
