//! Sizes in pixels, and the rules that choose them.

use std::fmt;

use image::{ImageBuffer, Pixel};

use crate::error::{Error, Result};

/// The grid that a working size derived from an area lies on, in pixels.
pub const GRID_PX: u32 = 32;
/// The longest side that a working size may have.
pub const WORKING_SIDE_PX_MAX: u32 = 1 << 16;
/// The largest area that may be asked for, in square pixels.
pub const AREA_PX_MAX: u64 = 1 << 28;

/// Width and height in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct Size {
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.width, self.height)
    }
}

impl Size {
    /// `width` × `height` pixels.
    #[must_use]
    pub fn new(width: u32, height: u32) -> Self {
        Self { width, height }
    }

    /// The size of a picture.
    #[must_use]
    pub fn of<P: Pixel>(picture: &ImageBuffer<P, Vec<P::Subpixel>>) -> Self {
        Self { width: picture.width(), height: picture.height() }
    }

    /// How many pixels there are.
    #[must_use]
    pub fn pixels(self) -> u64 {
        u64::from(self.width) * u64::from(self.height)
    }

    /// Both sides in units of `side_px`, for a latent or token grid.
    ///
    /// # Errors
    /// A side that is not a multiple of `side_px`.
    pub fn in_units_of(self, side_px: u32) -> Result<Self> {
        match (self.width.checked_rem(side_px), self.height.checked_rem(side_px)) {
            (Some(0), Some(0)) => Ok(Self {
                width: self.width.checked_div(side_px).unwrap_or(0),
                height: self.height.checked_div(side_px).unwrap_or(0),
            }),
            _ => Err(Error::field("size", self, format!("multiples of {side_px}"))),
        }
    }

    /// The size of about `area_px` square pixels with the aspect ratio of `like`, on a grid of
    /// [`GRID_PX`]: diffusers'
    /// [`calculate_dimensions`](https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/pipelines/qwenimage/pipeline_qwenimage_edit_plus.py#L158).
    ///
    /// Where the reference would make a side of zero (aspect ratios beyond about `area / 256`),
    /// that side is one grid unit here and the other one follows from the area.
    ///
    /// # Errors
    /// A picture without pixels, or an area below one grid unit or above [`AREA_PX_MAX`].
    pub fn for_area(area_px: u64, like: Self) -> Result<Self> {
        check_area("area", area_px)?;
        if like.pixels() == 0 {
            return Err(Error::field("picture", like, "at least one pixel"));
        }
        #[expect(clippy::cast_precision_loss, reason = "at most 2^28")]
        let area = area_px as f64;
        let ratio = f64::from(like.width) / f64::from(like.height);
        let width = (area * ratio).sqrt();
        let height = width / ratio;
        let (width, height) = (on_grid(width), on_grid(height));
        let grid = f64::from(GRID_PX);
        Ok(match (width, height) {
            (0, _) => Self { width: GRID_PX, height: on_grid(area / grid) },
            (_, 0) => Self { width: on_grid(area / grid), height: GRID_PX },
            _ => Self { width, height },
        })
    }

    /// The working size: each side as asked for, else as `calculated`.
    ///
    /// A side that is asked for is taken exactly. It must be a multiple of `multiple_px`, the side
    /// of one token: the model has no smaller unit, and cropping would shift the picture.
    ///
    /// # Errors
    /// A side that is no multiple, zero, or longer than [`WORKING_SIDE_PX_MAX`]; the message names
    /// the nearest sides that are accepted.
    pub fn working(
        width: Option<u32>,
        height: Option<u32>,
        calculated: Self,
        multiple_px: u32,
    ) -> Result<Self> {
        Ok(Self {
            width: side("width", width, calculated.width, multiple_px)?,
            height: side("height", height, calculated.height, multiple_px)?,
        })
    }
}

/// An area that is asked for in `field`, in square pixels.
///
/// # Errors
/// One below one grid unit or above [`AREA_PX_MAX`].
pub(crate) fn check_area(field: &'static str, area_px: u64) -> Result<()> {
    let least = u64::from(GRID_PX * GRID_PX);
    if (least..=AREA_PX_MAX).contains(&area_px) {
        return Ok(());
    }
    Err(Error::field(field, area_px, format!("{least} to {AREA_PX_MAX} square pixels")))
}

fn side(field: &'static str, asked: Option<u32>, calculated: u32, multiple_px: u32) -> Result<u32> {
    let Some(px) = asked else { return Ok(calculated) };
    let multiple = multiple_px.max(1);
    let longest = WORKING_SIDE_PX_MAX - WORKING_SIDE_PX_MAX % multiple;
    if px % multiple == 0 && (multiple..=longest).contains(&px) {
        return Ok(px);
    }
    let below = (px - px % multiple).clamp(multiple, longest);
    let above = (below + multiple).min(longest);
    let nearest = match () {
        () if px < multiple => format!("{multiple}"),
        () if px > longest => format!("{longest}"),
        () => format!("{below} or {above}"),
    };
    let expected =
        format!("a multiple of {multiple} from {multiple} to {longest}, such as {nearest}");
    Err(Error::field(field, px, expected))
}

/// Python's `round(px / 32) * 32`: halves go to the even multiple.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "below 2^32: at most 2^28 square pixels with sides below 2^32 give at most 2^30 px; saturates"
)]
fn on_grid(px: f64) -> u32 {
    ((px / f64::from(GRID_PX)).round_ties_even() * f64::from(GRID_PX)) as u32
}
