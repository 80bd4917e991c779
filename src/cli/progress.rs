//! The progress bar on stderr.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressStyle};
use pentimento::{Event, Observer, Plan, Stage};

/// Shows stages and steps to a person; silent when asked to be.
pub(crate) struct Bar {
    bar: ProgressBar,
    stage: Mutex<Option<Stage>>,
    /// The pass of several that runs, as it stands before the stage.
    sub_request: Mutex<String>,
    notes: bool,
}

impl Bar {
    pub(crate) fn new(quiet: bool) -> Self {
        let bar = if quiet { ProgressBar::hidden() } else { ProgressBar::no_length() };
        let sub_request = Mutex::new(String::new());
        Self { bar, stage: Mutex::new(None), sub_request, notes: !quiet }
    }

    /// Takes the bar off the screen.
    pub(crate) fn clear(&self) {
        self.bar.finish_and_clear();
    }

    /// Tells the person something, above the bar.
    pub(crate) fn note(&self, text: &str) {
        if self.notes {
            self.bar.suspend(|| super::say(&format!("note: {text}")));
        }
    }

    /// Shows a plan before it is carried out.
    fn plan(&self, plan: &Plan) {
        if self.notes {
            self.bar.suspend(|| super::say(&plan.to_string()));
        }
    }

    fn step(&self, stage: Stage, step: usize, of: usize) {
        let mut current = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
        if *current != Some(stage) {
            *current = Some(stage);
            self.bar.reset();
            self.bar.set_style(style(of));
            self.bar.set_length(of as u64);
            let before = self.sub_request.lock().unwrap_or_else(PoisonError::into_inner);
            self.bar.set_message(format!("{before}{}", stage.label()));
            self.bar.enable_steady_tick(Duration::from_millis(200));
        }
        self.bar.set_position(step as u64);
    }
}

fn style(steps: usize) -> ProgressStyle {
    let template = if steps > 1 {
        "{spinner} {msg:<22} {bar:24} {pos}/{len}  {elapsed}, {eta} left"
    } else {
        "{spinner} {msg:<22} {elapsed}"
    };
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

impl Observer for Bar {
    fn event(&self, event: &Event<'_>) {
        match *event {
            Event::Step { stage, step, of, .. } => self.step(stage, step, of),
            Event::Note(note) => self.note(note),
            Event::Planned(plan) => self.plan(plan),
            Event::StepStarted { index, of, prompt } => {
                *self.sub_request.lock().unwrap_or_else(PoisonError::into_inner) =
                    format!("{}/{of} {prompt}: ", index + 1);
            }
            _ => {}
        }
    }
}
