//! The strict readout: which scene a picture shows, region by region.

use super::{
    render::{SIDE, backdrop, draw},
    scene::{Scene, Thing, homes, place_count, row_and_column},
    world::{Light, WORLD},
};

/// Mean absolute error, in levels, up to which a region still counts as readable.
const ERROR_MAX: f64 = 12.0;

/// What a picture shows.
#[derive(Debug, Clone, PartialEq)]
pub struct Readout {
    /// The nearest scene.
    pub scene: Scene,
    /// The mean absolute error, in levels, of the region that fits worst.
    pub worst_error: f64,
}

/// A rectangle of pixels: x, y, width, height.
type Region = (usize, usize, usize, usize);

/// Whether the picture shows exactly the target: background, light and every place.
///
/// # Panics
/// When `pixels` are not [`SIDE`] × [`SIDE`] RGB pixels.
#[must_use]
pub fn succeeds(pixels: &[u8], target: &Scene) -> bool {
    let read = readout(pixels);
    read.scene == *target && read.worst_error <= ERROR_MAX
}

/// Reads a picture: background and light from the rows without places, then place by place.
///
/// # Panics
/// When `pixels` are not [`SIDE`] × [`SIDE`] RGB pixels.
#[must_use]
pub fn readout(pixels: &[u8]) -> Readout {
    assert_eq!(pixels.len(), SIDE * SIDE * 3, "pixels of a scene");
    let (background, light, mut worst_error) = read_whole(pixels);
    let lamp = &WORLD.lights[light];
    let empty = backdrop(background, lamp);
    let mut scene = Scene { background, light, objects: Default::default() };
    for place in 0..place_count() {
        let (thing, error) = read_place(pixels, &empty, place, lamp);
        worst_error = worst_error.max(error);
        if let Some(thing) = thing {
            scene.objects.insert(place, thing);
        }
    }
    Readout { scene, worst_error }
}

/// Background, light and the error of the rows without places.
fn read_whole(pixels: &[u8]) -> (usize, usize, f64) {
    let strip = (0, WORLD.clear.y, WORLD.size, WORLD.clear.height);
    let mut best = (0, 0, f64::INFINITY);
    for background in 0..WORLD.backgrounds.len() {
        for (light, lamp) in WORLD.lights.iter().enumerate() {
            let error = mean_error(pixels, &backdrop(background, lamp), strip);
            if error < best.2 {
                best = (background, light, error);
            }
        }
    }
    best
}

/// What stands in a place, and the error of the place.
fn read_place(pixels: &[u8], empty: &[u8], place: usize, light: &Light) -> (Option<Thing>, f64) {
    let (row, column) = row_and_column(place);
    let region = (column.x, row.y, WORLD.cell, WORLD.cell);
    let mut best = (None, mean_error(pixels, empty, region));
    let kinds = (0..WORLD.kinds.len()).filter(|&kind| homes(kind).contains(&place));
    for kind in kinds {
        for color in 0..WORLD.colors.len() {
            let thing = Thing { kind, color };
            let mut candidate = empty.to_vec();
            draw(&mut candidate, place, thing, light);
            let error = mean_error(pixels, &candidate, region);
            if error < best.1 {
                best = (Some(thing), error);
            }
        }
    }
    best
}

/// Mean absolute difference of two pictures over a region, in levels.
fn mean_error(a: &[u8], b: &[u8], (x, y, width, height): Region) -> f64 {
    let sum: u32 = (y..y + height)
        .map(|y| (y * WORLD.size + x) * 3)
        .flat_map(|at| a[at..at + width * 3].iter().zip(&b[at..at + width * 3]))
        .map(|(a, b)| u32::from(a.abs_diff(*b)))
        .sum();
    let count = u32::try_from(width * height * 3).expect("a region has few pixels");
    f64::from(sum) / f64::from(count)
}
