//! The port against the recipe's golden numbers, and the readout against wrong pictures.

use serde::Deserialize;

use super::{world::WORLD, *};

#[derive(Deserialize)]
struct Golden {
    seed: u64,
    #[serde(default)]
    count: usize,
    op: Option<String>,
    style: Option<String>,
    #[serde(default)]
    held_out: bool,
    request: String,
    sub_requests: Vec<String>,
    tags: String,
    input: String,
    target: String,
}

fn golden() -> Vec<Golden> {
    serde_json::from_str(include_str!("../../../tests/data/world_golden.json")).unwrap()
}

fn spec_of(golden: &Golden) -> Spec {
    let style = match golden.style.as_deref() {
        Some("direct") => Style::Direct,
        Some("indirect") => Style::Indirect,
        Some("picture") => Style::Picture,
        _ => Style::Any,
    };
    let operation = golden.op.as_ref().map(|name| Operation::named(name).unwrap());
    Spec { wishes: golden.count, operation, style, held_out: golden.held_out }
}

/// 64-bit FNV-1a, as the recipe writes it.
fn fnv1a(bytes: &[u8]) -> String {
    let hash = bytes.iter().fold(0xCBF2_9CE4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01B3)
    });
    format!("{hash:016x}")
}

fn recolored_cases() -> impl Iterator<Item = Case> {
    let operation = Some(Operation::Recolor);
    let spec = Spec { wishes: 1, operation, style: Style::Direct, held_out: false };
    (0..40).map(move |index| Case::sample(held_out_seed(3, index), &spec))
}

#[test]
fn cases_equal_the_recipe() {
    for row in golden() {
        let case = Case::sample(row.seed, &spec_of(&row));
        assert_eq!(case.request, row.request, "seed {}", row.seed);
        assert_eq!(case.sub_requests(), row.sub_requests, "seed {}", row.seed);
        assert_eq!(case.tags(), row.tags, "seed {}", row.seed);
        assert_eq!(fnv1a(&render(&case.scene)), row.input, "seed {}", row.seed);
        assert_eq!(fnv1a(&render(&case.target)), row.target, "seed {}", row.seed);
    }
}

#[test]
fn the_data_are_whole() {
    assert_eq!(WORLD.size, SIDE);
    let names: Vec<_> = WORLD.operations.iter().map(|operation| operation.name.as_str()).collect();
    assert_eq!(names, Operation::ALL.map(Operation::name));
    for kind in &WORLD.kinds {
        assert!(kind.rows.iter().all(|row| row.len() == WORLD.cell), "{}", kind.name);
        assert_eq!(kind.rows.len(), WORLD.cell, "{}", kind.name);
    }
    for background in &WORLD.backgrounds {
        let height: usize = background.bands.iter().map(|band| band.0).sum();
        assert_eq!(height, WORLD.size, "{}", background.said.name);
    }
}

#[test]
fn perfect_pictures_read_back() {
    for index in 0..40 {
        let case = Case::sample(held_out_seed(2, index), &Spec::default());
        let read = readout(&render(&case.target));
        assert_eq!(read.scene, case.target);
        assert!(read.worst_error == 0.0, "{}", read.worst_error);
    }
}

#[test]
fn the_untouched_input_fails() {
    for case in recolored_cases() {
        assert!(!succeeds(&render(&case.scene), &case.target));
    }
}

#[test]
fn a_black_picture_fails() {
    for case in recolored_cases() {
        assert!(!succeeds(&vec![0; SIDE * SIDE * 3], &case.target));
    }
}

#[test]
fn a_shifted_target_fails() {
    for case in recolored_cases() {
        let mut pixels = render(&case.target);
        pixels.chunks_exact_mut(SIDE * 3).for_each(|line| line.rotate_right(9));
        assert!(!succeeds(&pixels, &case.target));
        let mut pixels = render(&case.target);
        pixels.rotate_right(3 * SIDE * 3);
        assert!(!succeeds(&pixels, &case.target));
    }
}

#[test]
fn a_wrong_color_fails() {
    for case in recolored_cases() {
        let mut wrong = case.target.clone();
        let thing = wrong.objects.values_mut().next().unwrap();
        thing.color = (thing.color + 1) % WORLD.colors.len();
        assert!(!succeeds(&render(&wrong), &case.target));
    }
}

#[test]
fn errors_are_measured_outside_the_edited_places() {
    for case in recolored_cases() {
        let target = render(&case.target);
        assert_eq!(measure::outside_error(&target, &case), Some(0.0));
        // The edited object covers one cell of sixteen: what happens there does not count.
        let input = render(&case.scene);
        assert_eq!(measure::outside_error(&input, &case), Some(0.0));
        let mut pixels = target;
        let edited = case
            .target
            .objects
            .iter()
            .find(|(place, thing)| case.scene.objects.get(place) != Some(thing));
        let row = scene::row_and_column(*edited.unwrap().0).0.y;
        let other = if row == 0 { SIDE - 1 } else { 0 };
        let value = &mut pixels[other * SIDE * 3];
        *value = if *value < 128 { *value + 90 } else { *value - 90 };
        let error = measure::outside_error(&pixels, &case).unwrap();
        assert!((error - 90.0 / (15.0 * 16.0 * 16.0 * 3.0)).abs() < 1e-12, "{error}");
    }
    let spec = Spec { wishes: 1, operation: Some(Operation::Background), ..Spec::default() };
    let case = Case::sample(held_out_seed(1, 0), &spec);
    assert_eq!(measure::outside_error(&render(&case.scene), &case), None);
}

#[test]
fn annotations_are_plans() {
    for index in 0..60 {
        let case = Case::sample(held_out_seed(4, index), &Spec::default());
        let plan = editing::annotated_plan(&case);
        plan.check().unwrap();
        let reply = crate::plan::Decomposition::parse(&case.tags()).unwrap();
        assert_eq!(reply.actions.len(), plan.steps.len());
        assert!(crate::plan::Score::of(&case.tags(), &reply).is_exact());
    }
}

#[test]
fn a_lost_object_fails() {
    for case in recolored_cases() {
        let mut wrong = case.target.clone();
        wrong.objects.pop_first();
        assert!(!succeeds(&render(&wrong), &case.target));
    }
}
