//! The world's data: sprites, colors, backgrounds, light, places and wordings, read from world.json.

use std::{collections::BTreeMap, sync::LazyLock};

use serde::Deserialize;

/// The data compiled into the crate; a test reads it whole.
pub(super) static WORLD: LazyLock<World> = LazyLock::new(|| {
    serde_json::from_str(include_str!("../../../models/mini/world.json"))
        .expect("world.json is part of the crate and tested")
});

/// Everything that is drawn or said.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct World {
    #[serde(rename = "format")]
    _format: u32,
    pub(super) size: usize,
    pub(super) cell: usize,
    pub(super) columns: Vec<Column>,
    pub(super) rows: Vec<Row>,
    /// The rows of pixels in which no place lies.
    pub(super) clear: Clear,
    pub(super) held_out_base: u64,
    pub(super) colors: Vec<Color>,
    pub(super) shades: BTreeMap<char, Mix>,
    pub(super) inks: BTreeMap<char, [u8; 3]>,
    pub(super) kinds: Vec<Kind>,
    pub(super) backgrounds: Vec<Background>,
    pub(super) lights: Vec<Light>,
    pub(super) operations: Vec<Weighted>,
    pub(super) wordings: BTreeMap<String, Wording>,
    pub(super) references: BTreeMap<String, Split<String>>,
    pub(super) groups: BTreeMap<String, Split<String>>,
    /// What stands between clauses, and before the last one.
    pub(super) joins: Split<[String; 2]>,
    /// What stands between the sub-requests of a merged prompt.
    pub(super) merge: String,
    /// The goal of a deletion.
    pub(super) gone: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Column {
    pub(super) name: String,
    pub(super) x: usize,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Row {
    pub(super) name: String,
    pub(super) y: usize,
    pub(super) home: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Clear {
    pub(super) y: usize,
    pub(super) height: usize,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Color {
    pub(super) name: String,
    pub(super) article: String,
    pub(super) rgb: [u8; 3],
}

/// Moves a value towards `to`, keeping `num / den` of the distance.
#[derive(Debug, Clone, Copy, Deserialize)]
pub(super) struct Mix {
    num: u16,
    den: u16,
    to: u16,
}

impl Mix {
    pub(super) fn apply(self, value: u8) -> u8 {
        let sum = u16::from(value) * self.num + self.to * (self.den - self.num);
        u8::try_from(sum.div_euclid(self.den)).expect("a mean of bytes is a byte")
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Kind {
    pub(super) name: String,
    pub(super) plural: String,
    pub(super) home: String,
    /// One character per pixel: a shade of the object's color, an ink, or `.` for nothing.
    pub(super) rows: Vec<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Background {
    /// Height and color of each band, from the top.
    pub(super) bands: Vec<(usize, u8, u8, u8)>,
    /// Rectangles on top: x, y, width, height, color.
    pub(super) marks: Vec<(usize, usize, usize, usize, u8, u8, u8)>,
    #[serde(flatten)]
    pub(super) said: Said,
}

#[derive(Debug, Deserialize)]
pub(super) struct Light {
    #[serde(flatten)]
    pub(super) mix: Mix,
    #[serde(flatten)]
    pub(super) said: Said,
}

/// How a background or a light level is called.
#[derive(Debug, Deserialize)]
pub(super) struct Said {
    pub(super) name: String,
    pub(super) train: Vec<String>,
    pub(super) indirect: Vec<String>,
    pub(super) held_out: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Weighted {
    pub(super) name: String,
    pub(super) weight: usize,
}

/// The wordings of one operation.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Wording {
    pub(super) canonical: String,
    pub(super) direct: Vec<String>,
    #[serde(default)]
    pub(super) indirect: Vec<String>,
    #[serde(default)]
    pub(super) held_out: Vec<String>,
}

/// Wordings that are trained on, and wordings that are only measured.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Split<T> {
    pub(super) train: Vec<T>,
    pub(super) held_out: Vec<T>,
}

impl<T> Split<T> {
    pub(super) fn part(&self, held_out: bool) -> &[T] {
        if held_out { &self.held_out } else { &self.train }
    }
}
