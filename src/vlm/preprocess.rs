//! Pictures as the vision tower takes them: resized, normalised, cut into patches.
//!
//! Follows the default (torchvision) backend of
//! <https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/qwen2_vl/image_processing_qwen2_vl.py>.

use candle_core::{Device, Tensor};
use image::RgbImage;
use serde_json::{Map, Value};

use super::{config::VisionConfig, positions::small};
use crate::{
    error::{Error, Result},
    pixels::{self, Filter, Size},
    progress::CancelToken,
    weights::ModelFiles,
};

/// Largest ratio of a picture's sides.
const RATIO_MAX: f64 = 200.0;
const CHANNELS: usize = 3;
/// Mean and standard deviation where a file names none.
const CLIP_MEAN: [f64; CHANNELS] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
const CLIP_STD: [f64; CHANNELS] = [0.268_629_54, 0.261_302_58, 0.275_777_11];

/// A picture's size in patches. A still picture is one frame deep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PatchGrid {
    /// Rows of patches, a multiple of the merge size.
    pub height: usize,
    /// Columns of patches, a multiple of the merge size.
    pub width: usize,
}

impl PatchGrid {
    /// Number of patches.
    #[must_use]
    pub fn patches(self) -> usize {
        self.height * self.width
    }

    /// The grid of tokens: patches merged in squares of `merge_size`.
    #[must_use]
    #[expect(clippy::integer_division, reason = "both sides are multiples of the merge size")]
    pub fn merged(self, merge_size: usize) -> Self {
        Self { height: self.height / merge_size, width: self.width / merge_size }
    }

    /// Row and column of each patch in the order of the patches: token by token in reading order,
    /// and in reading order within a token.
    pub(super) fn places(self, merge_size: usize) -> impl Iterator<Item = (usize, usize)> {
        let (rows, columns) = ((0..self.height), (0..self.width));
        let within = move || reading_order(0..merge_size, 0..merge_size);
        reading_order(rows.step_by(merge_size), columns.step_by(merge_size))
            .flat_map(move |(top, left)| within().map(move |(y, x)| (top + y, left + x)))
    }
}

/// Patches of one or several pictures, one picture after the other.
#[derive(Debug, Clone)]
pub struct Patches {
    /// `[n, channels · frames · patch · patch]`, float32 on the CPU.
    pub pixel_values: Tensor,
    /// The pictures' grids; their patches add up to `n`.
    pub grids: Vec<PatchGrid>,
}

/// How pictures become patches.
#[derive(Debug, Clone, PartialEq)]
pub struct Preprocessor {
    min_pixels: u64,
    max_pixels: u64,
    mean: [f32; CHANNELS],
    std: [f32; CHANNELS],
    patch_size: usize,
    merge_size: usize,
    frames: usize,
}

impl Preprocessor {
    /// Reads `processor_config.json` or the older `preprocessor_config.json` from the first of
    /// `folders` that has one. The patch geometry must be that of `vision`.
    ///
    /// # Errors
    /// No such file, or settings that are not computed here.
    pub fn load(files: &ModelFiles, folders: &[&str], vision: &VisionConfig) -> Result<Self> {
        for folder in folders {
            let newer = format!("{folder}/processor_config.json");
            if files.exists(&newer) {
                let mut root: Map<String, Value> = files.read_json(&newer)?;
                if let Some(Value::Object(settings)) = root.remove("image_processor") {
                    return Settings { files, path: &newer, map: settings }.parse(vision);
                }
            }
            let older = format!("{folder}/preprocessor_config.json");
            if files.exists(&older) {
                let map = files.read_json(&older)?;
                return Settings { files, path: &older, map }.parse(vision);
            }
        }
        let folder = folders.first().copied().unwrap_or("processor");
        Err(files.missing(&format!("{folder}/preprocessor_config.json")))
    }

    /// What is subtracted from each channel of a picture from 0 to 1, and what it is divided by then.
    pub(super) fn channels(&self) -> ([f32; CHANNELS], [f32; CHANNELS]) {
        #[expect(clippy::cast_possible_truncation, reason = "the numbers were f32 before")]
        let of_one = |level: f32| (f64::from(level) / 255.0) as f32;
        (self.mean.map(of_one), self.std.map(of_one))
    }

    /// The size in pixels that a picture is resized to: multiples of the token's side, an area
    /// within the limits, the nearest ratio.
    ///
    /// # Errors
    /// A picture without pixels, or one whose sides are further apart than 200 to 1.
    pub fn resized_size(&self, width_px: u32, height_px: u32) -> Result<(u32, u32)> {
        let (height, width) = (f64::from(height_px), f64::from(width_px));
        let found = || format!("{width_px} × {height_px} px");
        if width_px == 0 || height_px == 0 {
            return Err(Error::field("image", found(), "at least one pixel"));
        }
        if height.max(width) / height.min(width) > RATIO_MAX {
            let expected = format!("sides no further apart than {RATIO_MAX} to 1");
            return Err(Error::field("image", found(), expected));
        }
        let factor = self.token_px();
        let (mut new_height, mut new_width) = (
            (height / factor).round_ties_even() * factor,
            (width / factor).round_ties_even() * factor,
        );
        let (min, max) = (self.min_pixels as f64, self.max_pixels as f64);
        if new_height * new_width > max {
            let beta = (height * width / max).sqrt();
            new_height = ((height / beta / factor).floor() * factor).max(factor);
            new_width = ((width / beta / factor).floor() * factor).max(factor);
        } else if new_height * new_width < min {
            let beta = (min / (height * width)).sqrt();
            new_height = (height * beta / factor).ceil() * factor;
            new_width = (width * beta / factor).ceil() * factor;
        }
        match (whole_px(new_width), whole_px(new_height)) {
            (Some(width), Some(height)) => Ok((width, height)),
            _ => Err(Error::field("image", found(), "a picture of ordinary size")),
        }
    }

    /// The grid of patches that a picture gets.
    ///
    /// # Errors
    /// As [`resized_size`](Self::resized_size).
    #[expect(clippy::integer_division, reason = "resized sides are multiples of the patch")]
    pub fn grid(&self, width_px: u32, height_px: u32) -> Result<PatchGrid> {
        let (width, height) = self.resized_size(width_px, height_px)?;
        Ok(PatchGrid {
            height: height as usize / self.patch_size,
            width: width as usize / self.patch_size,
        })
    }

    /// Patches of `pictures`, in their order; `None` when there is no picture.
    ///
    /// # Errors
    /// As [`resized_size`](Self::resized_size).
    pub fn patches(&self, pictures: &[RgbImage]) -> Result<Option<Patches>> {
        self.patches_unless(pictures, &CancelToken::new())
    }

    /// [`Self::patches`], which stops when `cancel` says so.
    ///
    /// # Errors
    /// As [`Self::patches`], and cancellation.
    pub fn patches_unless(
        &self,
        pictures: &[RgbImage],
        cancel: &CancelToken,
    ) -> Result<Option<Patches>> {
        if pictures.is_empty() {
            return Ok(None);
        }
        let mut values = Vec::new();
        let mut grids = Vec::with_capacity(pictures.len());
        for picture in pictures {
            let grid = self.grid(picture.width(), picture.height())?;
            let (width, height) = self.resized_size(picture.width(), picture.height())?;
            let to = Size { width, height };
            let resized = pixels::resize_unless(picture, to, Filter::BicubicTorch, cancel)?;
            self.cut(resized.as_raw(), grid, &mut values);
            grids.push(grid);
        }
        let count = grids.iter().map(|grid| grid.patches()).sum::<usize>();
        let dim = CHANNELS * self.frames * self.patch_size * self.patch_size;
        let pixel_values = Tensor::from_vec(values, (count, dim), &Device::Cpu)?;
        Ok(Some(Patches { pixel_values, grids }))
    }

    /// Appends the patches of one resized picture: by token row, token column, row and column in
    /// the token; in a patch by channel, frame, row, column.
    fn cut(&self, rgb: &[u8], grid: PatchGrid, values: &mut Vec<f32>) {
        let patch = self.patch_size;
        let tables = self.tables();
        values.reserve(rgb.len() * self.frames);
        for (row, column) in grid.places(self.merge_size) {
            let first = (row * grid.width * patch + column) * patch * CHANNELS;
            for (channel, table) in tables.iter().enumerate() {
                let start = values.len();
                for y in 0..patch {
                    let from = first + y * grid.width * patch * CHANNELS;
                    let line = &rgb[from..from + patch * CHANNELS];
                    let bytes = line.iter().skip(channel).step_by(CHANNELS);
                    values.extend(bytes.map(|&byte| table[usize::from(byte)]));
                }
                for _ in 1..self.frames {
                    values.extend_from_within(start..start + patch * patch);
                }
            }
        }
    }

    /// The normalised value of each byte in each channel. The reference folds the rescaling by
    /// 1 / 255 into mean and standard deviation; so the same roundings happen here.
    fn tables(&self) -> [[f32; 256]; CHANNELS] {
        std::array::from_fn(|channel| {
            let (mean, std) = (self.mean[channel], self.std[channel]);
            std::array::from_fn(|byte| {
                #[expect(clippy::cast_precision_loss, reason = "a byte is exact in f32")]
                let value = byte as f32;
                (value - mean) / std
            })
        })
    }

    /// Side of a token in pixels.
    fn token_px(&self) -> f64 {
        f64::from(small(self.patch_size * self.merge_size))
    }
}

/// A whole number of pixels.
fn whole_px(side: f64) -> Option<u32> {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked")]
    let whole = (1.0..=f64::from(1_u32 << 24)).contains(&side).then_some(side as u32);
    whole
}

/// All pairs of a row and a column, row by row.
pub(super) fn reading_order<R, C>(rows: R, columns: C) -> impl Iterator<Item = (usize, usize)>
where
    R: Iterator<Item = usize>,
    C: Iterator<Item = usize> + Clone,
{
    rows.flat_map(move |row| columns.clone().map(move |column| (row, column)))
}

/// The settings object of a file.
struct Settings<'a> {
    files: &'a ModelFiles,
    path: &'a str,
    map: Map<String, Value>,
}

impl Settings<'_> {
    fn parse(&self, vision: &VisionConfig) -> Result<Preprocessor> {
        for key in ["image_processor_type", "feature_extractor_type"] {
            let known = ["Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast"];
            if self.map.get(key).is_some_and(|kind| !known.iter().any(|name| kind == name)) {
                return Err(self.fault(key, "Qwen2VLImageProcessor"));
            }
        }
        for key in ["do_resize", "do_rescale", "do_normalize"] {
            if self.map.get(key).is_some_and(|flag| flag != true) {
                return Err(self.fault(key, "true"));
            }
        }
        if self.map.get("resample").is_some_and(|filter| filter != 3) {
            return Err(self.fault("resample", "3 (bicubic)"));
        }
        let (patch, merge) = (vision.patch_size, vision.merge_size);
        let frames = vision.temporal_patch_size;
        for (key, value, default) in [
            ("patch_size", patch, 14_u64),
            ("merge_size", merge, 2),
            ("temporal_patch_size", frames, 2),
        ] {
            let found = self.map.get(key).map_or(Some(default), Value::as_u64);
            if found != Some(value as u64) {
                return Err(self.fault(key, format!("{value}, as the vision tower's config says")));
            }
        }
        let scale = self.rescale_factor()?;
        let (min_pixels, max_pixels) = self.area()?;
        Ok(Preprocessor {
            min_pixels,
            max_pixels,
            mean: self.channels("image_mean", CLIP_MEAN, scale)?,
            std: self.channels("image_std", CLIP_STD, scale)?,
            patch_size: patch,
            merge_size: merge,
            frames,
        })
    }

    /// The smallest and largest area in pixels.
    fn area(&self) -> Result<(u64, u64)> {
        let empty = Map::new();
        let (size, given) = match self.map.get("size") {
            Some(Value::Object(size)) => (size, true),
            None | Some(Value::Null) => (&empty, false),
            Some(_) => return Err(self.fault("size", "shortest_edge and longest_edge")),
        };
        let limit = |older: &str, newer: &str, default: u64| -> Result<u64> {
            let top = self.map.get(older).filter(|value| !value.is_null());
            let value = top.or_else(|| size.get(newer)).or_else(|| size.get(older));
            match value {
                None if !given => Ok(default),
                Some(value) if value.as_u64().is_some_and(|area| (1..1 << 40).contains(&area)) => {
                    Ok(value.as_u64().unwrap_or(default))
                }
                _ => Err(self.fault("size", format!("{newer}, an area in pixels"))),
            }
        };
        let min = limit("min_pixels", "shortest_edge", 56 * 56)?;
        let max = limit("max_pixels", "longest_edge", 28 * 28 * 1280)?;
        if min > max {
            return Err(self.fault("size", format!("shortest_edge {min} up to longest_edge {max}")));
        }
        Ok((min, max))
    }

    fn rescale_factor(&self) -> Result<f64> {
        let Some(value) = self.map.get("rescale_factor") else { return Ok(1.0 / 255.0) };
        let factor = value.as_f64().filter(|factor| factor.is_finite() && *factor > 0.0);
        factor.ok_or_else(|| self.fault("rescale_factor", "a number above zero"))
    }

    /// Three numbers over the rescaling factor.
    fn channels(&self, key: &str, default: [f64; CHANNELS], scale: f64) -> Result<[f32; CHANNELS]> {
        #[expect(clippy::cast_possible_truncation, reason = "the reference computes in f32")]
        let narrow = |number: f64| number as f32;
        let numbers = match self.map.get(key) {
            None => default.map(narrow),
            Some(value) => {
                let list: Option<Vec<f32>> = value
                    .as_array()
                    .and_then(|list| list.iter().map(|x| x.as_f64().map(narrow)).collect());
                let numbers = list.and_then(|list| <[f32; CHANNELS]>::try_from(list).ok());
                numbers.ok_or_else(|| self.fault(key, "three numbers"))?
            }
        };
        let numbers = numbers.map(|number| number * narrow(1.0 / scale));
        if key == "image_std" && numbers.iter().any(|std| *std <= 0.0 || std.is_nan()) {
            return Err(self.fault(key, "three numbers above zero"));
        }
        Ok(numbers)
    }

    fn fault(&self, key: &str, expected: impl ToString) -> Error {
        let found = self.map.get(key).map_or_else(|| "nothing".to_owned(), ToString::to_string);
        self.files.config(self.path, key, found, expected)
    }
}
