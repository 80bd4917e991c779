//! The sizes at which a request's pictures go through the models.

use super::pipeline::{Kind, Pipeline};
use crate::{
    error::{Error, Result},
    pixels::{Size, check_area},
    request::EditRequest,
};

/// Sizes of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sizes {
    /// The size that is denoised.
    pub(super) working: Size,
    /// The size of the result.
    pub(super) output: Size,
    /// What the autoencoder sees of each picture.
    pub(super) latent: Vec<Size>,
    /// What the vision-language model sees of each picture.
    pub(super) vision: Vec<Size>,
}

impl Sizes {
    /// Chooses the sizes; `multiple_px` is the side of one token.
    ///
    /// The first picture is the one that is edited: it gets the working size, so that its token
    /// grid is the output's and nothing shifts. Where a size and an area are asked for, it gets the area,
    /// as in the reference. Further pictures keep their own aspect ratio.
    /// The result has the input's size, or the one that was asked for.
    pub(super) fn plan(
        pipeline: &Pipeline,
        request: &EditRequest,
        multiple_px: u32,
    ) -> Result<Self> {
        let inputs: Vec<Size> =
            request.pictures.iter().map(|picture| Size::of(&picture.rgb)).collect();
        let area = request.area.unwrap_or(pipeline.area);
        let first = inputs[0];
        let asked = (request.width, request.height);
        // First what was given, so that an error does not speak of what only follows from it.
        Size::working(asked.0, asked.1, first, multiple_px)?;
        let calculated = match asked {
            (Some(width), None) => {
                let area = matching_area(width, first.height, first.width);
                of_one_side("width", width, area, first)?
            }
            (None, Some(height)) => {
                let area = matching_area(height, first.width, first.height);
                of_one_side("height", height, area, first)?
            }
            _ => Size::for_area(area, first)?,
        };
        let working = Size::working(asked.0, asked.1, calculated, multiple_px)?;
        let edited = request.area.map_or(Ok(working), |area| Size::for_area(area, first))?;
        let mut latent = vec![edited];
        for &input in &inputs[1..] {
            latent.push(Size::for_area(area, input)?);
        }
        let vision = Self::vision(pipeline, &inputs, request.area, request.vl_area)?;
        let output = if asked == (None, None) { first } else { working };
        Ok(Self { working, output, latent, vision })
    }

    /// What the vision-language model sees of each picture, which does not depend on the editor.
    pub(super) fn vision(
        pipeline: &Pipeline,
        inputs: &[Size],
        area: Option<u64>,
        vl_area: Option<u64>,
    ) -> Result<Vec<Size>> {
        if let Some(area) = vl_area {
            check_area("vl-area", area)?;
        }
        let vl_area = match (vl_area, pipeline.kind) {
            (Some(area), _) => area,
            // The first version shows the vision-language model what the autoencoder sees.
            (None, Kind::Edit) => area.unwrap_or(pipeline.vl_area),
            (None, Kind::Plus) => pipeline.vl_area,
        };
        inputs.iter().map(|&input| Size::for_area(vl_area, input)).collect()
    }
}

/// A size like `like` where only one side, `px`, was asked for; `area` is what follows from it.
fn of_one_side(field: &'static str, px: u32, area: u64, like: Size) -> Result<Size> {
    if check_area("area", area).is_ok() {
        return Size::for_area(area, like);
    }
    let expected = format!(
        "another one, or both sides: beside a picture of {like} it is an area of {area} square pixels"
    );
    Err(Error::field(field, px, expected))
}

/// The area of a picture of which one side is `px`, where the input's sides are as `other` to `same`.
fn matching_area(px: u32, other: u32, same: u32) -> u64 {
    let area = u128::from(px) * u128::from(px) * u128::from(other);
    u64::try_from(area.div_ceil(u128::from(same.max(1)))).unwrap_or(u64::MAX)
}
