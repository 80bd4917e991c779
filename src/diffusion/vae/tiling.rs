//! Working through a picture in overlapping tiles, so that memory does not grow with the picture.

use candle_core::{Device, Tensor};

use crate::{
    error::{Error, Result},
    ops::{self, Combination},
};

/// When and how the autoencoder works in tiles.
///
/// Only the layers in which a pixel sees its neighbours are tiled; the attention in the middle sees
/// the whole picture either way. What a tile gets wrong lies near its edges, as far as the layers
/// see, and the blending leaves it out where the overlap is wide enough
/// ([`Autoencoder::exact_overlap_px`](super::Autoencoder::exact_overlap_px)): then tiles equal the
/// whole but for rounding. The default is wide enough for the published models.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tiling {
    /// Pictures with more pixels than this are tiled.
    pub above_pixels: usize,
    /// The longest side of a tile in pixels.
    pub tile_px: usize,
    /// Pixels that neighbouring tiles share at least; at most half a tile.
    pub overlap_px: usize,
}

impl Default for Tiling {
    fn default() -> Self {
        Self { above_pixels: 2 << 20, tile_px: 1024, overlap_px: 256 }
    }
}

impl Tiling {
    /// Never.
    pub const OFF: Self = Self { above_pixels: usize::MAX, tile_px: 1024, overlap_px: 0 };

    /// Whether a picture of this size is tiled.
    #[must_use]
    pub fn applies(&self, height_px: usize, width_px: usize) -> bool {
        height_px.saturating_mul(width_px) > self.above_pixels
    }

    /// Pixels of the largest tile of a picture of this size; `None` where it is not tiled.
    #[must_use]
    pub fn largest_tile(&self, [height_px, width_px]: [usize; 2]) -> Option<u64> {
        let side = |px: usize| px.min(self.tile_px);
        let tile = (side(height_px) * side(width_px)) as u64;
        self.applies(height_px, width_px).then_some(tile)
    }

    /// The tiles of a picture of `height × width` units, for layers that see `sight_px` pixels to
    /// each side.
    pub(super) fn tiles(&self, [height, width]: [usize; 2], sight: Sight) -> Result<Tiles> {
        let Sight { unit_px, sight_px } = sight;
        let whole = |px: usize| px.is_multiple_of(unit_px);
        if self.tile_px == 0 || !whole(self.tile_px) {
            let expected = format!("a multiple of {unit_px} above 0");
            return Err(Error::field("tile size", self.tile_px, expected));
        }
        if self.overlap_px.saturating_mul(2) > self.tile_px || !whole(self.overlap_px) {
            let expected = format!("a multiple of {unit_px}, at most {} / 2", self.tile_px);
            return Err(Error::field("tile overlap", self.overlap_px, expected));
        }
        #[expect(clippy::integer_division, reason = "checked to be multiples")]
        let (tile, overlap) = (self.tile_px / unit_px, self.overlap_px / unit_px);
        let sight = sight_px.div_ceil(unit_px);
        let spans = |side| spans(side, tile, overlap, sight);
        Ok(Tiles { rows: spans(height), columns: spans(width) })
    }
}

/// What tiles need to know about the layers that run in them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sight {
    /// Pixels along the side of a unit; tiles begin and end at whole units.
    pub(super) unit_px: usize,
    /// How far the layers see.
    pub(super) sight_px: usize,
}

/// The tiles of a picture: every row of tiles with every column.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tiles {
    rows: Vec<Span>,
    columns: Vec<Span>,
}

/// A tile's place along one side, in units.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Span {
    start: usize,
    len: usize,
    fade_in: Fade,
    fade_out: Fade,
}

/// How a tile ends where another goes on: `left_out` units do not count, then the weight grows to
/// one over `ramp` units. Both are 0 at the picture's edge.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Fade {
    left_out: usize,
    ramp: usize,
}

impl Fade {
    /// For neighbours that share `shared` units: as much as the layers see is left out on both
    /// sides, but something remains to blend.
    #[expect(clippy::integer_division, reason = "half of what two neighbours share")]
    fn new(shared: usize, sight: usize) -> Self {
        let left_out = sight.min(shared.saturating_sub(1) / 2);
        Self { left_out, ramp: shared - 2 * left_out }
    }

    /// The weight `distance` places from the end, where a unit has `places` places.
    #[expect(clippy::cast_precision_loss, reason = "sides are far below 2^24")]
    fn weight(self, distance: usize, places: usize) -> f32 {
        let inside = distance as f32 + 0.5 - (self.left_out * places) as f32;
        match self.ramp {
            0 => 1.0,
            ramp => (inside / (ramp * places) as f32).clamp(0.0, 1.0),
        }
    }
}

/// Tiles of at most `tile` units along a side of `side`, of equal length and spread evenly, each
/// sharing at least `overlap` with the next.
#[expect(clippy::integer_division, reason = "the start of a tile in whole units")]
fn spans(side: usize, tile: usize, overlap: usize, sight: usize) -> Vec<Span> {
    let whole = Span { start: 0, len: side, fade_in: Fade::default(), fade_out: Fade::default() };
    if side <= tile {
        return vec![whole];
    }
    let gaps = (side - tile).div_ceil(tile - overlap);
    let len = (side + gaps * overlap).div_ceil(gaps + 1);
    let start = |i: usize| i * (side - len) / gaps;
    let fade = |i: usize| Fade::new(start(i) + len - start(i + 1), sight);
    let span = |i: usize| Span {
        start: start(i),
        len,
        fade_in: if i == 0 { Fade::default() } else { fade(i - 1) },
        fade_out: if i == gaps { Fade::default() } else { fade(i) },
    };
    (0..=gaps).map(span).collect()
}

impl Span {
    /// The weight of each of the span's places when one unit has `places` places, before all
    /// spans' weights are made to add up to one.
    fn weights(&self, places: usize) -> impl Iterator<Item = f32> {
        let (fade_in, fade_out) = (self.fade_in, self.fade_out);
        let len = self.len * places;
        (0..len).map(move |i| fade_in.weight(i, places).min(fade_out.weight(len - 1 - i, places)))
    }
}

/// How many places one unit becomes: encoding keeps the unit of a latent pixel, decoding spreads it
/// over its pixels.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scale {
    /// Places of the input per unit.
    pub(super) input: usize,
    /// Places of the output per unit.
    pub(super) output: usize,
}

impl Tiles {
    /// Applies `f` to every tile of `x: [b, c, h, w]` and blends the results.
    pub(super) fn map(
        &self,
        x: &Tensor,
        scale: Scale,
        f: impl Fn(Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let row = |row: &Span| {
            let strip = x.narrow(2, row.start * scale.input, row.len * scale.input)?;
            blend(&self.columns, 3, scale.output, x.device(), |column| {
                let (start, len) = (column.start * scale.input, column.len * scale.input);
                f(ops::laid_out(&strip.narrow(3, start, len)?)?)
            })
        };
        blend(&self.rows, 2, scale.output, x.device(), row)
    }
}

/// Adds up the parts that `part` makes along `axis`, each faded at its ends.
fn blend(
    spans: &[Span],
    axis: usize,
    places: usize,
    device: &Device,
    part: impl Fn(&Span) -> Result<Tensor>,
) -> Result<Tensor> {
    if let [only] = spans {
        return part(only);
    }
    let end = spans.iter().map(|span| span.start + span.len).max().unwrap_or(0) * places;
    let mut total = vec![0.0_f32; end];
    for span in spans {
        for (sum, weight) in total[span.start * places..].iter_mut().zip(span.weights(places)) {
            *sum += weight;
        }
    }
    let mut blended: Option<Tensor> = None;
    for span in spans {
        let first = span.start * places;
        let weights: Vec<f32> =
            span.weights(places).zip(&total[first..]).map(|(weight, sum)| weight / sum).collect();
        let len = weights.len();
        let mut shape = [1; 4];
        shape[axis] = len;
        let x = part(span)?;
        let weights = Tensor::from_vec(weights, &shape, device)?.to_dtype(x.dtype())?;
        let x = ops::combine(&x, &weights, Combination::Product)?.pad_with_zeros(
            axis,
            first,
            end - first - len,
        )?;
        blended = Some(match blended {
            Some(sum) => ops::add(&sum, &x)?,
            None => x,
        });
    }
    blended.ok_or_else(|| Error::field("picture", "0 tiles", "at least one"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PIXELS: Sight = Sight { unit_px: 1, sight_px: 0 };

    #[test]
    fn tiles_cover_a_side_and_share_enough() {
        for (tile, overlap) in [(8, 0), (8, 2), (8, 4), (5, 2), (1, 0), (12, 6)] {
            for (side, sight) in (1..60).flat_map(|side| [0, 1, 2, 9].map(|sight| (side, sight))) {
                let name = format!("{side} {tile} {overlap} {sight}");
                let spans = spans(side, tile, overlap, sight);
                assert_eq!(spans[0].start, 0);
                let last = spans[spans.len() - 1];
                assert_eq!(last.start + last.len, side, "{name}");
                for pair in spans.windows(2) {
                    let shared = pair[0].start + pair[0].len - pair[1].start;
                    assert!(shared >= overlap && pair[0].len <= tile, "{name}: {shared}");
                    assert_eq!(pair[0].fade_out, pair[1].fade_in);
                }
                let totals = [1, 8].map(|places| total_weights(&spans, side, places));
                assert!(totals.iter().flatten().all(|&sum| sum > 0.01), "{name}: {totals:?}");
            }
        }
    }

    fn total_weights(spans: &[Span], side: usize, places: usize) -> Vec<f32> {
        let mut total = vec![0.0; side * places];
        for span in spans {
            let sums = &mut total[span.start * places..];
            sums.iter_mut().zip(span.weights(places)).for_each(|(sum, weight)| *sum += weight);
        }
        total
    }

    #[test]
    fn what_layers_cannot_see_right_is_left_out() {
        let spans = spans(40, 20, 9, 4);
        for pair in spans.windows(2) {
            let weights: Vec<f32> = pair[1].weights(8).collect();
            assert!(weights[..32].iter().all(|&w| w == 0.0) && weights[32] > 0.0);
        }
    }

    #[test]
    fn blending_what_agrees_changes_nothing() {
        let x = Tensor::randn(0.0_f32, 1.0, (1, 2, 21, 34), &Device::Cpu).unwrap();
        let tiling = Tiling { above_pixels: 0, tile_px: 8, overlap_px: 2 };
        let tiles = tiling.tiles([21, 34], PIXELS).unwrap();
        let y = tiles.map(&x, Scale { input: 1, output: 1 }, Ok).unwrap();
        let difference = (x - y).unwrap().abs().unwrap().max_all().unwrap();
        assert!(difference.to_scalar::<f32>().unwrap() < 1e-6);
    }

    #[test]
    fn a_larger_output_keeps_the_places() {
        let x = Tensor::arange(0.0_f32, 30.0, &Device::Cpu).unwrap();
        let x = x.reshape((1, 1, 5, 6)).unwrap();
        let tiling = Tiling { above_pixels: 0, tile_px: 4, overlap_px: 2 };
        let tiles = tiling.tiles([5, 6], PIXELS).unwrap();
        let double = |x: Tensor| Ok(crate::ops::upsample_nearest_2x(&x)?);
        let y = tiles.map(&x, Scale { input: 1, output: 2 }, double).unwrap();
        let expected = double(x).unwrap();
        let difference = (expected - y).unwrap().abs().unwrap().max_all().unwrap();
        assert!(difference.to_scalar::<f32>().unwrap() < 1e-5);
    }

    #[test]
    fn odd_options_are_refused() {
        let tiles = |tile_px, overlap_px| {
            let sight = Sight { unit_px: 8, sight_px: 0 };
            Tiling { above_pixels: 0, tile_px, overlap_px }.tiles([9, 9], sight)
        };
        assert!(tiles(0, 0).is_err());
        assert!(tiles(20, 0).is_err());
        assert!(tiles(32, 24).is_err());
        assert!(tiles(32, 12).is_err());
        assert!(tiles(32, 16).is_ok());
    }
}
