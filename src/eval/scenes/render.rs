//! The pixels of a scene.

use super::{
    scene::{Scene, Thing, row_and_column},
    world::{Light, WORLD},
};

/// Width and height of a scene's picture, in pixels.
pub const SIDE: usize = 64;

/// The scene's picture: rows of RGB pixels, [`SIDE`] × [`SIDE`] × 3 bytes.
#[must_use]
pub fn render(scene: &Scene) -> Vec<u8> {
    let light = &WORLD.lights[scene.light];
    let mut pixels = backdrop(scene.background, light);
    for (&place, &thing) in &scene.objects {
        draw(&mut pixels, place, thing, light);
    }
    pixels
}

/// The background alone.
pub(super) fn backdrop(background: usize, light: &Light) -> Vec<u8> {
    let mut pixels = vec![0; WORLD.size * WORLD.size * 3];
    let background = &WORLD.backgrounds[background];
    let mut top = 0;
    for &(height, r, g, b) in &background.bands {
        rectangle(&mut pixels, (0, top), (WORLD.size, height), [r, g, b]);
        top += height;
    }
    for &(x, y, width, height, r, g, b) in &background.marks {
        rectangle(&mut pixels, (x, y), (width, height), [r, g, b]);
    }
    pixels.iter_mut().for_each(|value| *value = light.mix.apply(*value));
    pixels
}

/// Draws an object over what is there.
pub(super) fn draw(pixels: &mut [u8], place: usize, thing: Thing, light: &Light) {
    let (row, column) = row_and_column(place);
    for (y, line) in WORLD.kinds[thing.kind].rows.iter().enumerate() {
        for (x, ch) in line.chars().enumerate().filter(|&(_, ch)| ch != '.') {
            let rgb = ink(thing.color, ch).map(|value| light.mix.apply(value));
            rectangle(pixels, (column.x + x, row.y + y), (1, 1), rgb);
        }
    }
}

fn ink(color: usize, ch: char) -> [u8; 3] {
    WORLD
        .inks
        .get(&ch)
        .copied()
        .unwrap_or_else(|| WORLD.colors[color].rgb.map(|value| WORLD.shades[&ch].apply(value)))
}

fn rectangle(
    pixels: &mut [u8],
    (x, y): (usize, usize),
    (width, height): (usize, usize),
    rgb: [u8; 3],
) {
    for line in pixels.chunks_exact_mut(WORLD.size * 3).skip(y).take(height) {
        line[x * 3..(x + width) * 3].chunks_exact_mut(3).for_each(|pixel| {
            pixel.copy_from_slice(&rgb);
        });
    }
}
