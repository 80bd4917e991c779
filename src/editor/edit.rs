//! One edit, from the request's pictures to the result: plan, passes, picture.

use super::{
    Engine,
    beside::beside,
    checked::{Checked, check_length},
    pass::Work,
    placement,
    planning::PlanWork,
    stages::Stages,
};
use crate::{
    diffusion::StepCache,
    error::Result,
    plan::{Plan, PlannedBy},
    progress::{CancelToken, Event, Observer, Stage},
    request::{EditOutcome, EditRequest, Strategy},
};

/// What a person should know when the agents failed.
const ORDERED_BY_RULE: &str = "the planner's steps did not cover the request, so they follow the \
                               built-in wording and order";

/// What the passes are to do.
struct Course {
    /// Never [`Strategy::Auto`].
    strategy: Strategy,
    plan: Option<Plan>,
    planned_by: Option<PlannedBy>,
    /// What the editor is told, pass by pass.
    prompts: Vec<String>,
}

pub(super) fn run(
    engine: &Engine,
    request: &EditRequest,
    observer: &dyn Observer,
) -> Result<EditOutcome> {
    let checked = Checked::new(engine, request)?;
    let mut notes = checked.notes.clone();
    let mut stages = Stages::new(observer, &engine.opened.precision.device);
    let mut memory = engine.settle(request)?;
    let layers = engine.diffusion.transformer().config().layers;
    notes.extend(placement::note(memory.placement, layers));
    let mut work = Work::begin(engine, &checked)?;

    // 1. The planner says what the editor is told.
    let course = course(engine, &checked, &mut work, &mut stages)?;
    if course.planned_by == Some(PlannedBy::Rule) {
        notes.push(ORDERED_BY_RULE.to_owned());
    }
    for note in &notes {
        observer.event(&Event::Note(note));
    }
    if let Some(plan) = &course.plan {
        observer.event(&Event::Planned(plan));
    }
    let of = course.prompts.len();
    for prompt in &course.prompts {
        check_length(engine, "prompt", prompt)?;
    }
    for (index, prompt) in course.prompts.iter().enumerate() {
        if of > 1 {
            observer.event(&Event::StepStarted { index, of, prompt });
        }
        // 2. to 6. One pass of the editor, on what the pass before left.
        work.pass(prompt, &mut stages, observer)?;
        if of > 1 {
            let picture = &work.picture()?;
            observer.event(&Event::StepDone { index, of, picture });
        }
    }

    if let Some(cache) = request.step_cache {
        let note = reuse_note(&checked, of, work.reused(), cache);
        observer.event(&Event::Note(&note));
        notes.push(note);
    }

    memory.placement = engine.residence.placement();
    memory.made_room = work.rungs().to_vec();
    for rung in &memory.made_room {
        let note = format!("memory ran out after all: {}", rung.label());
        observer.event(&Event::Note(&note));
        notes.push(note);
    }
    Ok(EditOutcome {
        picture: work.picture()?,
        reused: work.reused(),
        seed: checked.seed,
        steps: checked.schedule.steps(),
        cfg_scale: if checked.negative.is_some() { checked.cfg_scale } else { 1.0 },
        working_size: checked.sizes.working,
        strategy: course.strategy,
        plan: course.plan,
        planned_by: course.planned_by,
        prompts: course.prompts,
        stages: stages.finish(),
        memory,
        notes,
    })
}

/// What a step cache left out in so many passes.
fn reuse_note(checked: &Checked<'_>, passes: usize, reused: usize, cache: StepCache) -> String {
    let each = if checked.negative.is_some() { 2 } else { 1 };
    let of = checked.schedule.steps() * each * passes;
    format!(
        "the step cache (threshold {}) left out all but the first block of {reused} of {of} \
         predictions; without it the picture is another",
        cache.threshold()
    )
}

/// Plans where the strategy asks for it, and turns the plan into passes.
fn course(
    engine: &Engine,
    checked: &Checked<'_>,
    work: &mut Work<'_>,
    stages: &mut Stages<'_>,
) -> Result<Course> {
    let request = checked.request;
    let (plan, planned_by) = match (&request.plan, request.strategy) {
        (Some(plan), _) => (plan.clone(), None),
        (None, Strategy::Direct) => return Ok(Course::direct(request, None, None)),
        (None, _) => {
            let sight = work.sight()?;
            let planning = work.climb(|work| {
                engine.before_planning()?;
                let _room = work.room_for(Stage::Plan)?;
                let mut plan = |cancel: &CancelToken| {
                    let plan_work = PlanWork {
                        request: &request.prompt,
                        pictures: &sight.pictures,
                        seen: &sight.seen,
                        options: &request.planner,
                        cancel,
                    };
                    engine.opened.planner.plan(&engine.opened.vlm, &plan_work, stages)
                };
                if !engine.has_blocks_to_read() {
                    return plan(&request.cancel);
                }
                let load = |cancel: &CancelToken| engine.read_blocks(cancel);
                let (elapsed, planning) = beside(&request.cancel, load, plan)?;
                stages.add(Stage::Load, elapsed);
                Ok(planning)
            })?;
            (planning.plan, Some(planning.planned_by))
        }
    };
    let one_step = plan.steps.len() == 1;
    let strategy = match request.strategy {
        Strategy::Auto if one_step && request.plan.is_none() => {
            return Ok(Course::direct(request, Some(plan), planned_by));
        }
        Strategy::Sequential => Strategy::Sequential,
        _ => Strategy::Single,
    };
    let prompts = match strategy {
        Strategy::Sequential => plan.steps.iter().map(|step| step.prompt.clone()).collect(),
        _ => vec![plan.merged(&engine.opened.pipeline.merge)],
    };
    Ok(Course { strategy, plan: Some(plan), planned_by, prompts })
}

impl Course {
    /// The request as it is.
    fn direct(request: &EditRequest, plan: Option<Plan>, planned_by: Option<PlannedBy>) -> Self {
        let prompts = vec![request.prompt.clone()];
        Self { strategy: Strategy::Direct, plan, planned_by, prompts }
    }
}
