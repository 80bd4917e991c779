//! Measuring an engine: the same figures every time, and what is refused.

use std::{cell::RefCell, collections::BTreeSet};

use pentimento::{
    Engine, EngineOptions, Error, Event, ModelSource, Stage, Strategy,
    eval::scenes::{Case, Measurement, Operation, Part, Spec, Style, held_out_seed, render},
};

fn engine() -> Engine {
    let options = EngineOptions { device: pentimento::Device::Cpu, ..EngineOptions::default() };
    Engine::open(&ModelSource::Mini, &options, &()).unwrap()
}

#[test]
fn figures_are_the_same_with_any_number_of_threads() {
    let (engine, measurement) = (engine(), Measurement::new(11, 1));
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| measurement.run(&engine, &())).unwrap()
    };
    let report = run(1);
    assert_eq!(run(2), report);
    assert_eq!(run(2), report);
    let single = report.single.unwrap();
    let names: Vec<&str> = single.rows.iter().map(|row| row.name.as_str()).collect();
    assert_eq!(names, Operation::ALL.map(Operation::name));
    assert_eq!((single.all.of, single.strategy), (7, "direct"));
    assert!(single.rows.iter().all(|row| row.of == 1 && row.right <= 1));
    assert!(single.all.right >= 1, "the pack gets something right: {single:?}");
    assert!(single.outside_error_levels.unwrap() < 20.0);
    assert_eq!(report.wordings.unwrap().all.of, 4);
    let ways: Vec<_> = report.many.iter().map(|way| (way.strategy, way.plan.name())).collect();
    let expected = [
        ("direct", "none"),
        ("single", "planner"),
        ("sequential", "planner"),
        ("single", "annotation"),
        ("sequential", "annotation"),
    ];
    assert_eq!(ways, expected);
    assert!(report.many.iter().all(|pictures| pictures.all.of == 3));
    assert_eq!(report.plans.unwrap().of, 3);
    let replies = report.decomposition.unwrap();
    assert_eq!((replies.len(), replies[0].of), (7, 1));
    assert!(replies.iter().all(|row| row.exact <= row.f1 && row.f1 <= row.well_formed));
    assert!(replies[0].f1 > 0.0, "{replies:?}");
    let accepted: Vec<u32> = report.readout.iter().map(|rate| rate.right).collect();
    assert_eq!(accepted, [1, 0, 0, 0, 0]);
}

#[test]
fn a_measurement_tells_how_far_it_is_and_stops_when_asked() {
    let engine = engine();
    let mut measurement = Measurement::new(1, 1);
    measurement.parts = BTreeSet::from([Part::Single]);
    let steps = RefCell::new(Vec::new());
    let cancel = measurement.cancel.clone();
    let result = measurement.run(&engine, &|event: &Event<'_>| {
        if let Event::Step { stage: Stage::Measure, step, of, .. } = *event {
            steps.borrow_mut().push((step, of));
            if step == 2 {
                cancel.cancel();
            }
        }
    });
    assert!(matches!(result, Err(Error::Cancelled)), "{result:?}");
    assert_eq!(*steps.borrow(), [(0, 7), (1, 7), (2, 7)]);
}

#[test]
fn counts_outside_their_range_are_refused() {
    let engine = engine();
    let refused = |result: Result<(), Error>| {
        let message = result.unwrap_err().to_string();
        assert!(message.contains("count") && message.contains("1 to "), "{message}");
    };
    for count in [0, 10_001] {
        refused(Measurement::new(1, count).check());
        refused(Measurement::new(1, count).run(&engine, &()).map(|_| ()));
    }
    Measurement::new(1, 10_000).check().unwrap();
    for count in [0, 301] {
        refused(
            Measurement::new(1, count).contact_sheet(&engine, Strategy::Direct, &()).map(|_| ()),
        );
    }
}

#[test]
fn a_contact_sheet_shows_inputs_beside_results() {
    let engine = engine();
    let mut measurement = Measurement::new(5, 4);
    measurement.parts = BTreeSet::from([Part::Single]);
    let sheet = measurement.contact_sheet(&engine, Strategy::Direct, &()).unwrap();
    // Four pairs of 192 px pictures in two lines of three.
    assert_eq!(sheet.picture.dimensions(), (3 * (2 * 192 + 6 + 18) + 18, 2 * (192 + 18) + 18));
    assert_eq!(sheet.requests.len(), 4);
    for (index, operation) in (0..4).zip(Operation::ALL) {
        let spec =
            Spec { wishes: 1, operation: Some(operation), style: Style::Direct, held_out: false };
        let case = Case::sample(held_out_seed(5, u64::from(index) * 10_000), &spec);
        assert_eq!(sheet.requests[index as usize].0, case.request);
        let (left, top) = (18 + index % 3 * 408, 18 + index / 3 * 210);
        let input = render(&case.scene);
        for (x, y) in (0..192).flat_map(|y| (0..192).map(move |x| (x, y))) {
            let at = ((y / 3 * 64 + x / 3) * 3) as usize;
            assert_eq!(sheet.picture.get_pixel(left + x, top + y).0, input[at..at + 3]);
        }
    }
}
