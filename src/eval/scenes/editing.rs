//! Cases given to an engine: edits in several ways, and the planner's replies.

use std::{cell::Cell, time::Instant};

use image::RgbImage;

use super::{
    case::Case,
    measure::{Measurement, NOISE_SEED},
    render::{SIDE, render},
    report::{PlanSource, Reuse},
    scene::Scene,
};
use crate::{
    EditOutcome, EditRequest, Engine, Error, Event, Observer, RequestError, Result, Stage,
    Strategy,
    pixels::Picture,
    plan::{Action, Plan, PlanOptions, Step},
    request::PlanRequest,
};

/// An engine, and how far the work has come.
pub(super) struct Desk<'a> {
    measurement: &'a Measurement,
    engine: &'a Engine,
    observer: &'a dyn Observer,
    start: Instant,
    done: Cell<usize>,
    of: usize,
    reuse: Cell<Reuse>,
}

/// A way to carry a request out.
#[derive(Debug, Clone, Copy)]
pub(super) struct Way {
    pub(super) strategy: Strategy,
    pub(super) plan: PlanSource,
}

impl Way {
    /// The request as it is.
    pub(super) const DIRECT: Self = Self { strategy: Strategy::Direct, plan: PlanSource::None };
    /// All ways that are measured; the first one with a planner comes before those that use its
    /// plan.
    pub(super) const ALL: [Self; 5] = [
        Self::DIRECT,
        Self { strategy: Strategy::Single, plan: PlanSource::Planner },
        Self { strategy: Strategy::Sequential, plan: PlanSource::Planner },
        Self { strategy: Strategy::Single, plan: PlanSource::Annotation },
        Self { strategy: Strategy::Sequential, plan: PlanSource::Annotation },
    ];
}

impl<'a> Desk<'a> {
    /// For `of` pieces of work.
    pub(super) fn new(
        measurement: &'a Measurement,
        engine: &'a Engine,
        observer: &'a dyn Observer,
        of: usize,
    ) -> Self {
        Self {
            measurement,
            engine,
            observer,
            start: Instant::now(),
            done: Cell::new(0),
            of,
            reuse: Cell::default(),
        }
    }

    /// What the engine makes of a case's request; `None` where its planner fails. The planner is
    /// not asked where `plan` is given.
    pub(super) fn edit(
        &self,
        case: &Case,
        strategy: Strategy,
        plan: Option<Plan>,
    ) -> Result<Option<EditOutcome>> {
        self.tell();
        let mut request = EditRequest::new(Picture::from_rgb(picture(&case.scene)), &case.request);
        request.seed = Some(NOISE_SEED);
        request.strategy = strategy;
        request.plan = plan;
        request.planner.clone_from(&self.measurement.planner);
        request.steps = self.measurement.steps;
        request.step_cache = self.measurement.step_cache;
        request.cancel = self.measurement.cancel.clone();
        let outcome = unless_planner_fails(self.engine.edit(&request, &()))?;
        if let Some(outcome) = &outcome {
            let Reuse { reused, of } = self.reuse.get();
            let made = outcome.steps * outcome.prompts.len(); // without guidance, one a step
            self.reuse.set(Reuse { reused: reused + outcome.reused, of: of + made });
        }
        Ok(outcome)
    }

    /// What a step cache left out so far.
    pub(super) fn reuse(&self) -> Reuse {
        self.reuse.get()
    }

    /// What the decomposition agent says to a case's request; `None` where it does not finish.
    pub(super) fn reply(&self, case: &Case) -> Result<Option<String>> {
        self.tell();
        let pictures = vec![Picture::from_rgb(picture(&case.scene))];
        let mut request = PlanRequest::new(pictures, &case.request);
        request.planner = PlanOptions { grammar: false, ..self.measurement.planner.clone() };
        request.cancel = self.measurement.cancel.clone();
        unless_planner_fails(self.engine.decompose(&request, &()))
    }

    fn tell(&self) {
        let step = self.done.replace(self.done.get() + 1);
        let (of, elapsed) = (self.of, self.start.elapsed());
        self.observer.event(&Event::Step { stage: Stage::Measure, step, of, elapsed });
    }
}

/// A planner's failure is a finding; every other error ends the measurement.
fn unless_planner_fails<T>(result: Result<T>) -> Result<Option<T>> {
    match result {
        Err(Error::Request(RequestError::Malformed { .. } | RequestError::Unfinished { .. })) => {
            Ok(None)
        }
        result => result.map(Some),
    }
}

/// The plan that a case's wishes stand for.
pub(super) fn annotated_plan(case: &Case) -> Plan {
    let steps = case.edits().map(|edit| {
        let action = Action::named(edit.action).expect("a test names them all");
        Step::new(action, &edit.subject, &edit.goal, &edit.sub_request)
    });
    Plan::new(&case.request, steps.collect())
}

/// The scene's picture.
pub(super) fn picture(scene: &Scene) -> RgbImage {
    let side = u32::try_from(SIDE).expect("a scene is small");
    RgbImage::from_raw(side, side, render(scene)).expect("as many pixels as the side says")
}
