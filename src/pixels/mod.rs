//! Pictures as files and as numbers: decoding under limits, sizes, resampling, writing.
//!
//! A [`Picture`] is what every file becomes: upright, 8 bits, RGB, with what belongs to the output
//! kept beside it. This room knows no model; callers say which area, filter and multiple they want.
//!
//! ```
//! use pentimento::pixels::{Filter, Format, Limits, Picture, Size, encode_to_vec, resize};
//!
//! let picture = Picture::decode(b"P5 2 2 255 \x00\x40\x80\xff", "in.pgm", &Limits::default())?;
//! let working = Size::for_area(64 * 64, picture.size())?;
//! let large = resize(&picture.rgb, working.width, working.height, Filter::Lanczos3)?;
//! let file = encode_to_vec(&Picture { rgb: large, ..picture }, Format::Png, None)?;
//! assert!(file.bytes.starts_with(b"\x89PNG"));
//! # Ok::<(), pentimento::Error>(())
//! ```
//!
//! # Rules
//!
//! - **Limits.** The file's bytes, sides, pixels and the memory for decoding are checked against
//!   [`Limits`] from the header, before a pixel is decoded. What is no picture is named.
//! - **Orientation.** The EXIF orientation is applied once, while decoding. No EXIF data, and so no
//!   place and no second orientation, reaches the output.
//! - **Transparency.** Models see the picture over white. The alpha channel is kept beside it; an
//!   output of the same size in PNG or WebP gets it back, with the colours which over white give
//!   the edited picture. (The reference drops alpha and shows the model whatever colours are
//!   stored under it, often black.) A channel that is 255 everywhere counts as none.
//! - **Colour profiles.** No colours are converted. An ICC profile for RGB goes into the output, so
//!   that the numbers keep their meaning; one for grey or CMYK would be wrong there and is dropped.
//! - **CMYK** is converted by arithmetic, without a profile, as Pillow does.
//! - **16 bits** are reduced to their high byte, as Pillow reduces RGB. (Pillow clips 16-bit grey,
//!   which this does not imitate.) Floating-point values are clamped to 0..1.
//! - **Grey** and palettes become RGB.
//! - **Animations and pages.** The first one is used.
//! - **Resampling** equals Pillow's bit by bit; see [`Filter`]. The same size is an unchanged copy.
//! - **Sizes.** Derived from an area on a grid of 32 px as diffusers derives them, or taken exactly
//!   as asked for if the model has tokens for it; see [`Size`].
//! - **Writing.** A file appears whole or not at all, under a temporary name beside it until then,
//!   and replaces nothing without [`Overwrite::Replace`].
//!
//! Whenever a rule changes what a person may have expected, [`Picture::notes`] or
//! [`Encoded::notes`] says so.

mod claims;
mod decode;
mod encode;
mod limits;
mod metadata;
mod picture;
mod probe;
mod resize;
mod sizes;
mod tensor;
mod write;

pub use encode::{Encoded, Format, JPEG_QUALITY, encode_to_vec};
pub use limits::Limits;
pub use metadata::{
    EditRecord, LoraRecord, ModelRecord, PARAMETERS_KEYWORD, PictureInfo, RECORD_KEYWORD,
    RECORD_VERSION, TextEntry, read_metadata,
};
pub use picture::{Picture, read_file};
pub use resize::{Filter, resize, resize_gray, resize_unless};
pub(crate) use sizes::check_area;
pub use sizes::{AREA_PX_MAX, GRID_PX, Size, WORKING_SIDE_PX_MAX};
pub use tensor::{rgb_from_tensor, tensor_from_rgb};
pub use write::{Overwrite, check_output, save, write_file};
