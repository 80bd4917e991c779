//! A contact sheet: inputs beside what the engine makes of them.

use image::{Rgb, RgbImage, imageops};

use super::{
    case::Case,
    editing::{Desk, picture},
    measure::Measurement,
    readout::succeeds,
    render::SIDE,
    suites::Part,
};
use crate::{Engine, Error, Observer, Result, Strategy};

/// How much a scene's pixels are enlarged.
const SCALE: u32 = 3;
/// Pairs side by side.
const COLUMNS: u32 = 3;
/// Between input and output, in pixels.
const INNER_GAP_PX: u32 = 6;
/// Between pairs and around them, in pixels.
const OUTER_GAP_PX: u32 = 18;
/// The most pairs on a sheet.
const PAIRS_MAX: u32 = 300;
const PAPER: Rgb<u8> = Rgb([242, 242, 242]);

/// Pairs of input and output, and what was asked for.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ContactSheet {
    /// The pairs, line by line.
    pub picture: RgbImage,
    /// Each pair's request, and whether the output shows exactly the target.
    pub requests: Vec<(String, bool)>,
}

impl Measurement {
    /// Draws inputs and outputs of the first `count` cases, one of each row of the parts in turn;
    /// the parts that are about pictures, that is.
    ///
    /// # Errors
    /// A count above what fits on a sheet, cancellation, and whatever an edit fails with.
    pub fn contact_sheet(
        &self,
        engine: &Engine,
        strategy: Strategy,
        observer: &dyn Observer,
    ) -> Result<ContactSheet> {
        if !(1..=PAIRS_MAX).contains(&self.count) {
            return Err(Error::field("count", self.count, format!("1 to {PAIRS_MAX} pairs")));
        }
        let cases = self.first_cases();
        if cases.is_empty() {
            return Err(Error::field("parts", "none with pictures", "single, wordings or many"));
        }
        let desk = Desk::new(self, engine, observer, cases.len());
        let mut pairs = Vec::new();
        let mut requests = Vec::new();
        for case in cases {
            let input = picture(&case.scene);
            // Where the planner fails there is no output: the input stands in its place.
            let outcome = desk.edit(&case, strategy, None)?;
            let output = outcome.map_or_else(|| input.clone(), |outcome| outcome.picture.rgb);
            requests.push((case.request.clone(), succeeds(&output, &case.target)));
            pairs.push([input, output]);
        }
        Ok(ContactSheet { picture: draw(&pairs), requests })
    }

    fn first_cases(&self) -> Vec<Case> {
        let parts = self.parts.iter().filter(|part| **part != Part::Decomposition);
        let rows: Vec<_> = parts.flat_map(|part| part.rows()).collect();
        let per_row = self.count.div_ceil(u32::try_from(rows.len().max(1)).unwrap_or(u32::MAX));
        let mut columns: Vec<_> = rows.iter().map(|row| row.cases(self.seed, per_row)).collect();
        let in_turn = (0..per_row)
            .flat_map(|_| columns.iter_mut().filter_map(Iterator::next).collect::<Vec<_>>());
        in_turn.take(self.count as usize).collect()
    }
}

fn draw(pairs: &[[RgbImage; 2]]) -> RgbImage {
    let side = u32::try_from(SIDE).expect("a scene is small") * SCALE;
    let step_x = 2 * side + INNER_GAP_PX + OUTER_GAP_PX;
    let step_y = side + OUTER_GAP_PX;
    let count = u32::try_from(pairs.len()).unwrap_or(u32::MAX);
    let (columns, lines) = (COLUMNS.min(count), count.div_ceil(COLUMNS));
    let (width, height) = (columns * step_x + OUTER_GAP_PX, lines * step_y + OUTER_GAP_PX);
    let mut sheet = RgbImage::from_pixel(width, height, PAPER);
    for (index, pair) in (0..).zip(pairs) {
        let line = u32::div_euclid(index, COLUMNS);
        let x = OUTER_GAP_PX + index % COLUMNS * step_x;
        for (x, picture) in [x, x + side + INNER_GAP_PX].into_iter().zip(pair) {
            let large = imageops::resize(picture, side, side, imageops::FilterType::Nearest);
            let y = OUTER_GAP_PX + line * step_y;
            imageops::replace(&mut sheet, &large, i64::from(x), i64::from(y));
        }
    }
    sheet
}
