//! How much a picture suffers from many passes: a chain of edits that ends where it began.
//!
//! One object is recolored and recolored back, again and again, so that after every second pass the
//! exact picture is the first one; what differs then is loss.

use serde::Serialize;

use super::{
    case::held_out_seed,
    editing::picture,
    readout::succeeds,
    rng::Rng,
    scene::{Scene, Thing},
    world::WORLD,
};
use crate::{
    CancelToken, EditRequest, Engine, Error, Event, HandOver, Observer, Result, Strategy,
    pixels::Picture,
    plan::{Action, Plan, STEPS_MAX, Step},
};

/// The version of [`DriftReport`].
pub const DRIFT_REPORT_VERSION: u32 = 1;
/// The most chains.
const CHAINS_MAX: u32 = 10_000;
/// Where the cases begin among the held-out seeds of an evaluation.
const START: u64 = 800_000;
const PEAK: f64 = 255.0;

/// What is measured.
#[derive(Debug, Clone)]
pub struct DriftMeasurement {
    /// Draws the scenes.
    pub seed: u32,
    /// Chains.
    pub count: u32,
    /// Passes of a chain; even, so that it ends where it began.
    pub passes: usize,
    /// Stops it.
    pub cancel: CancelToken,
}

/// Both ways of handing a picture on, side by side.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DriftReport {
    /// [`DRIFT_REPORT_VERSION`].
    pub version: u32,
    /// The seed of the scenes.
    pub seed: u32,
    /// Chains.
    pub count: u32,
    /// Each way.
    pub ways: Vec<DriftOfWay>,
}

/// One way of handing a picture on.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DriftOfWay {
    /// The way.
    pub hand_over: HandOver,
    /// After every second pass.
    pub rows: Vec<DriftRow>,
}

/// How far the pictures are from the first ones.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct DriftRow {
    /// Passes made.
    pub passes: usize,
    /// Mean PSNR against the first picture in dB.
    pub psnr_db: f64,
    /// Mean over the chains of the largest shift of a channel's mean, in levels.
    pub color_shift: f64,
    /// Share of the pictures that still read back exactly.
    pub exact: f64,
}

impl DriftMeasurement {
    /// # Errors
    /// No chain or too many, an odd number of passes or too many, cancellation, and whatever an
    /// edit fails with.
    pub fn run(&self, engine: &Engine, observer: &dyn Observer) -> Result<DriftReport> {
        if !(1..=CHAINS_MAX).contains(&self.count) {
            return Err(Error::field("count", self.count, format!("1 to {CHAINS_MAX}")));
        }
        if self.passes == 0 || self.passes > STEPS_MAX || !self.passes.is_multiple_of(2) {
            let expected = format!("an even number from 2 to {STEPS_MAX}");
            return Err(Error::field("passes", self.passes, expected));
        }
        let mut ways = Vec::new();
        for hand_over in [HandOver::Latents, HandOver::Pixels] {
            ways.push(self.way(engine, hand_over, observer)?);
        }
        let (version, seed, count) = (DRIFT_REPORT_VERSION, self.seed, self.count);
        Ok(DriftReport { version, seed, count, ways })
    }

    fn way(
        &self,
        engine: &Engine,
        hand_over: HandOver,
        observer: &dyn Observer,
    ) -> Result<DriftOfWay> {
        let mut sums = vec![[0.0; 3]; self.passes.div_ceil(2)];
        for index in 0..self.count {
            let (scene, plan) = self.chain(index);
            let first = picture(&scene);
            let mut request = EditRequest::new(Picture::from_rgb(first.clone()), "");
            (request.strategy, request.hand_over) = (Strategy::Sequential, hand_over);
            (request.plan, request.seed) = (Some(plan), Some(0));
            request.cancel = self.cancel.clone();
            let rows = std::cell::RefCell::new(Vec::with_capacity(sums.len()));
            engine.edit(&request, &|event: &Event<'_>| match event {
                Event::StepDone { index, picture, .. } if index % 2 == 1 => {
                    let now = picture.rgb.as_raw();
                    let exact = f64::from(u8::from(succeeds(now, &scene)));
                    let (psnr, shift) = distance(first.as_raw(), now);
                    rows.borrow_mut().push([psnr, shift, exact]);
                }
                Event::Step { .. } => observer.event(event),
                _ => {}
            })?;
            for (sum, row) in sums.iter_mut().zip(rows.into_inner()) {
                sum.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
            }
        }
        let rows = sums.into_iter().enumerate().map(|(at, sum)| {
            let [psnr_db, color_shift, exact] = sum.map(|sum| sum / f64::from(self.count));
            DriftRow { passes: 2 * (at + 1), psnr_db, color_shift, exact }
        });
        Ok(DriftOfWay { hand_over, rows: rows.collect() })
    }

    /// A scene and the passes that recolor one of its objects to and fro.
    fn chain(&self, index: u32) -> (Scene, Plan) {
        let seed = held_out_seed(u64::from(self.seed), START + u64::from(index));
        let mut rng = Rng::new(seed);
        let scene = Scene::sample(&mut rng);
        let places: Vec<usize> = scene.objects.keys().copied().collect();
        let here = scene.objects[rng.pick(&places)];
        let mut there = Thing { color: rng.below(WORLD.colors.len()), ..here };
        while scene.holds(there) {
            there.color = (there.color + 1) % WORLD.colors.len();
        }
        let recolor = |from: Thing, to: Thing| {
            let color = &WORLD.colors[to.color].name;
            let prompt = format!("recolor the {} to {color}", from.name());
            Step::new(Action::Recolor, &from.name(), color, &prompt)
        };
        let steps = (0..self.passes)
            .map(|at| if at % 2 == 0 { recolor(here, there) } else { recolor(there, here) });
        let plan = Plan::new("there and back", steps.collect());
        (scene, plan)
    }
}

/// PSNR in dB, and the largest shift of a channel's mean in levels.
fn distance(first: &[u8], now: &[u8]) -> (f64, f64) {
    let (mut squares, mut shifts) = (0.0, [0.0; 3]);
    for (at, (a, b)) in first.iter().zip(now).enumerate() {
        let difference = f64::from(*b) - f64::from(*a);
        squares += difference * difference;
        shifts[at % 3] += difference;
    }
    #[expect(clippy::cast_precision_loss, reason = "a picture of the world is small")]
    let values = first.len() as f64;
    let psnr = 10.0 * (PEAK * PEAK * values / squares.max(1.0)).log10();
    let shift = shifts.into_iter().map(f64::abs).fold(0.0, f64::max);
    (psnr, shift * 3.0 / values)
}
