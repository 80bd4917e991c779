//! Tests of pixels: rules, limits and equality with Pillow, torch and diffusers.
//!
//! `tests/data/make/pictures.py` makes the files and what the references say about them.

#![expect(
    clippy::cast_possible_truncation,
    clippy::integer_division,
    reason = "the numbers of the tests are small"
)]

mod output;

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use image::{GrayImage, Luma, Rgb, RgbImage, Rgba, RgbaImage};
use pentimento::{
    Error, PictureError,
    pixels::{
        Filter, Format, Limits, Picture, Size, encode_to_vec, read_metadata, resize, resize_gray,
        rgb_from_tensor, tensor_from_rgb,
    },
};
use proptest::prelude::*;
use serde_json::Value;
use sha2::{Digest, Sha256};

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/pictures").join(name)
}

fn expected() -> Value {
    serde_json::from_slice(&fs_err::read(data("expected.json")).unwrap()).unwrap()
}

fn hex(text: &str) -> Vec<u8> {
    let digits = text.as_bytes().chunks_exact(2);
    digits.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn open(name: &str) -> Picture {
    Picture::open(data(name), &Limits::default()).unwrap()
}

/// The message must hold each of `words`.
#[track_caller]
fn assert_message<T>(result: Result<T, Error>, words: &[&str]) -> Error {
    let Err(error) = result else { panic!("no error, expected one about {words:?}") };
    let message = error.to_string();
    for word in words {
        assert!(message.contains(word), "{word:?} is not in: {message}");
    }
    error
}

#[track_caller]
fn refused(bytes: &[u8], words: &[&str]) {
    let error = assert_message(Picture::decode(bytes, "in.png", &Limits::default()), words);
    assert!(matches!(error, Error::Picture(_)), "{error:?}");
    assert!(error.to_string().starts_with("in.png: "), "{error}");
    assert!(error.to_string().contains("\nhint: "), "{error}");
}

// ---- decoding ----

#[test]
fn files_decode_to_what_pillow_shows() {
    let mut faults = Vec::new();
    for (name, case) in expected()["files"].as_object().unwrap() {
        let picture = open(name);
        let size = picture.size();
        let wanted = hex(case["rgb"].as_str().unwrap());
        if serde_json::json!([size.width, size.height]) != case["size"] {
            faults.push(format!("{name}: {size}, expected {}", case["size"]));
            continue;
        }
        let differences = picture.rgb.as_raw().iter().zip(&wanted).map(|(a, b)| a.abs_diff(*b));
        let worst = differences.max().unwrap();
        if u64::from(worst) > case["tolerance"].as_u64().unwrap() {
            faults.push(format!("{name}: differs by {worst}, allowed {}", case["tolerance"]));
        }
        let alpha = case.get("alpha").map(|alpha| hex(alpha.as_str().unwrap()));
        let alpha = alpha.filter(|alpha| alpha.iter().any(|value| *value < 255));
        if picture.alpha.as_ref().map(|alpha| alpha.as_raw().clone()) != alpha {
            faults.push(format!("{name}: another alpha channel"));
        }
        let icc = case.get("icc").and_then(Value::as_u64);
        if picture.icc.as_ref().map(|icc| icc.len() as u64) != icc {
            faults.push(format!("{name}: another ICC profile"));
        }
    }
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

#[test]
fn what_is_done_to_a_picture_is_noted() {
    for (name, word) in [
        ("animated.gif", "several frames; the first frame"),
        ("animated.png", "several frames; the first frame"),
        ("animated.webp", "several frames; the first frame"),
        ("pages.tif", "several pages; the first page"),
        ("rgb16.png", "8 bits"),
        ("grey16.png", "8 bits"),
        ("cmyk.tif", "CMYK"),
        ("cmyk.jpg", "CMYK"),
        ("alpha.png", "over white"),
        ("icc-grey.png", "not one for RGB"),
    ] {
        let notes = open(name).notes;
        assert!(notes.iter().any(|note| note.contains(word)), "{name}: {word:?} not in {notes:?}");
    }
    for name in ["plain.tif", "palette.gif", "icc.jpg", "opaque-alpha.png", "oriented-6.jpg"] {
        assert_eq!(open(name).notes, [""; 0], "{name}");
    }
}

#[test]
fn a_picture_of_one_pixel_works() {
    let picture = open("one-pixel.png");
    assert_eq!(picture.size(), Size::new(1, 1));
    let large = resize(&picture.rgb, 32, 32, Filter::Lanczos3).unwrap();
    assert!(large.pixels().all(|pixel| *pixel == Rgb([12, 200, 90])));
    let size = Size::for_area(1 << 20, picture.size()).unwrap();
    assert_eq!(size, Size::new(1024, 1024));
    let back = resize(&large, 1, 1, Filter::Lanczos3).unwrap();
    assert_eq!(back, picture.rgb);
}

#[test]
fn what_is_no_picture_is_named() {
    refused(b"", &["the file is empty", "download it again"]);
    refused(
        b"version https://git-lfs.github.com/spec/v1\noid",
        &["Git LFS pointer", "git lfs pull"],
    );
    refused(b"  \n<!DOCTYPE html><html>", &["an HTML page"]);
    refused(b"<svg xmlns=\"http://www.w3.org/2000/svg\">", &["SVG", "render it"]);
    refused(b"just some words", &["a text file", "PNG, JPEG"]);
    refused(b"\x01\x02\x03\x04\0\0", &["not known", "PNG, JPEG"]);
    refused(b"\0\0\0\x18ftypheic\0\0\0\0", &["HEIC", "convert it to PNG or JPEG"]);
    refused(b"\0\0\0\x18ftypavif\0\0\0\0", &["AVIF", "convert it to PNG or JPEG"]);
    refused(b"\0\0\0\x18ftypcrx \0\0\0\0", &["raw file", "export it"]);
    refused(b"II*\0\x10\0\0\0CR\x02\0", &["raw file", "export it"]);
    refused(b"\0\0\0\x18ftypisom\0\0\0\0", &["a video"]);
    refused(b"%PDF-1.7", &["PDF"]);
    refused(b"GIF89a\x04\0\x04\0\0\0\0;\0", &["image/gif", "no frame"]);
    refused(b"GGUF\x03\0\0\0", &["model file", "--model"]);
}

#[test]
fn every_truncation_is_an_error_or_a_picture() {
    for name in ["plain.bmp", "plain.qoi", "alpha.png", "alpha.webp", "icc.jpg", "palette.gif"] {
        let bytes = fs_err::read(data(name)).unwrap();
        for end in 0..bytes.len() {
            if let Err(error) = Picture::decode(&bytes[..end], name, &Limits::default()) {
                assert!(matches!(error, Error::Picture(_)), "{name} cut at {end}: {error:?}");
            }
        }
        // Of a JPEG file only the end of the last scan; its headers are what it mostly is.
        let cut = if name.ends_with("jpg") { bytes.len() - 20 } else { bytes.len() * 2 / 3 };
        let cut = Picture::decode(&bytes[..cut], name, &Limits::default());
        if name.ends_with("jpg") {
            // The decoder fills up with grey, as for many a camera's file without an end mark.
            let whole = Picture::decode(&bytes, name, &Limits::default()).unwrap();
            assert!(whole.notes.is_empty(), "{:?}", whole.notes);
            assert!(cut.unwrap().notes[0].contains("ends before the picture"));
        } else {
            assert_message(cut, &[name, "cut off"]);
        }
    }
}

#[test]
fn damaged_files_do_not_panic() {
    let names = ["alpha.png", "alpha.webp", "icc.jpg", "animated.gif", "cmyk.tif", "plain.bmp"];
    let files = names.map(|name| fs_err::read(data(name)).unwrap());
    proptest!(ProptestConfig::with_cases(300), |(
        file in 0..files.len(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    )| {
        let mut bytes = files[file].clone();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        let limits = Limits { memory_bytes_max: 64 << 20, pixels_max: 1 << 20, ..Limits::default() };
        if let Err(error) = Picture::decode(&bytes, "x", &limits) {
            prop_assert!(matches!(error, Error::Picture(_)));
        }
        drop(read_metadata(&bytes, "x", &limits));
    });
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let limits = Limits::default();
    assert_message(
        Picture::open("/nowhere/in.png", &limits),
        &["/nowhere/in.png: ", "no such file"],
    );
    assert_message(Picture::open(data(""), &limits), &["a folder"]);
    let small = Limits { bytes_max: 100, ..limits };
    assert_message(Picture::open(data("cmyk.tif"), &small), &["bytes", "1678", "limit of 100"]);
    #[cfg(target_os = "linux")]
    assert_message(Picture::open("/dev/zero", &small), &["/dev/zero: ", "101", "limit of 100"]);
}

// ---- limits ----

/// A PNG file whose header promises `width` × `height`, with one row of data.
fn promise(width: u32, height: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut writer = png::Encoder::new(&mut bytes, width, height).write_header().unwrap();
    writer.write_chunk(png::chunk::IDAT, b"x\x9c\x03\0\0\0\0\x01").unwrap();
    writer.write_chunk(png::chunk::IEND, b"").unwrap();
    drop(writer);
    bytes
}

#[test]
fn a_side_of_30_000_pixels_is_refused_before_decoding() {
    let words = ["longest side in pixels", "30000", "limit of 16384", "scale the picture down"];
    refused(&promise(30_000, 2), &words);
    refused(&promise(2, 30_000), &words);
    let wide = Limits { side_px_max: 30_000, ..Limits::default() };
    let row = RgbImage::from_pixel(30_000, 2, Rgb([1, 2, 3]));
    let file = encode_to_vec(&Picture::from_rgb(row.clone()), Format::Png, None).unwrap();
    assert_eq!(Picture::decode(&file.bytes, "row.png", &wide).unwrap().rgb, row);
}

#[test]
fn a_decompression_bomb_is_refused_before_decoding() {
    refused(&promise(16_384, 16_384), &["number of pixels", "268435456", "limit of 100000000"]);
    refused(&promise(i32::MAX as u32, i32::MAX as u32), &["longest side"]);
    let limits = Limits { memory_bytes_max: 1000, ..Limits::default() };
    let error = assert_message(
        Picture::open(data("plain.bmp"), &limits),
        &["memory for decoding in bytes", "limit of 1000"],
    );
    assert!(matches!(error, Error::Picture(PictureError::Limit { .. })));
    // A header that promises more than the file holds costs no time and no memory.
    refused(&promise(9_000, 9_000), &["cut off"]);
}

#[test]
fn limits_hold_to_the_pixel() {
    let exact = Limits {
        bytes_max: 1206,
        side_px_max: 24,
        pixels_max: 24 * 16,
        memory_bytes_max: 24 * 16 * 10,
    };
    Picture::open(data("plain.bmp"), &exact).unwrap();
    for limits in [
        Limits { bytes_max: 1205, ..exact },
        Limits { side_px_max: 23, ..exact },
        Limits { pixels_max: 24 * 16 - 1, ..exact },
        Limits { memory_bytes_max: 24 * 16 * 10 - 1, ..exact },
    ] {
        assert_message(Picture::open(data("plain.bmp"), &limits), &["over the limit"]);
    }
}

// ---- transparency ----

#[test]
fn alpha_is_put_back() {
    let mut rgba =
        RgbaImage::from_fn(16, 16, |x, y| Rgba([x as u8 * 16, y as u8 * 16, 77, (x * 17) as u8]));
    let picture = Picture::from_rgba(&rgba);
    assert_eq!(picture.rgb.get_pixel(0, 5), &Rgb([255, 255, 255]));
    assert_eq!(picture.rgb.get_pixel(15, 5).0, [240, 80, 77]);
    for format in [Format::Png, Format::WebP] {
        let file = encode_to_vec(&picture, format, None).unwrap();
        let again = Picture::decode(&file.bytes, "again", &Limits::default()).unwrap();
        assert_eq!(again.alpha, picture.alpha, "{format}");
        assert_eq!(again.rgb, picture.rgb, "{format}: what is seen over white stays");
    }
    let jpeg = encode_to_vec(&picture, Format::Jpeg, None).unwrap();
    assert!(jpeg.notes[0].contains("transparent parts are white"), "{:?}", jpeg.notes);
    let again = Picture::decode(&jpeg.bytes, "again", &Limits::default()).unwrap();
    assert!(again.rgb.get_pixel(0, 8).0.iter().all(|level| *level > 225));

    rgba.pixels_mut().for_each(|pixel| pixel.0[3] = 255);
    assert_eq!(Picture::from_rgba(&rgba).alpha, None);
    let other = Picture { alpha: Some(GrayImage::new(3, 3)), ..picture };
    assert_eq!(other.to_rgba(), None);
    let notes = encode_to_vec(&other, Format::Png, None).unwrap().notes;
    assert!(notes[0].contains("another size"), "{notes:?}");
}

#[test]
fn alpha_loses_at_most_what_8_bits_lose() {
    for alpha in 0..=255_u8 {
        let rgba = RgbaImage::from_fn(16, 16, |x, y| Rgba([(y * 16 + x) as u8, 0, 255, alpha]));
        let picture = Picture::from_rgba(&rgba);
        let Some(back) = picture.to_rgba() else {
            assert_eq!(alpha, 255);
            continue;
        };
        assert_eq!(Picture::from_rgba(&back).rgb, picture.rgb, "alpha {alpha}");
    }
}

// ---- resampling ----

/// The pattern of the same name in pictures.py: noise with hard edges.
fn pattern(width: u32, height: u32) -> RgbImage {
    let value = |x: u32, y: u32, c: u32| {
        let mixed = x
            .wrapping_mul(374_761_393)
            .wrapping_add(y.wrapping_mul(668_265_263))
            .wrapping_add(c.wrapping_mul(2_147_483_647));
        let mixed = (mixed ^ (mixed >> 13)).wrapping_mul(1_274_126_177);
        let value = (mixed >> 16) as u8;
        match (x.div_euclid(7) + y.div_euclid(5)) % 2 {
            0 => value,
            _ if value > 127 => 255,
            _ => 0,
        }
    };
    RgbImage::from_fn(width, height, |x, y| Rgb([0, 1, 2].map(|c| value(x, y, c))))
}

fn red(picture: &RgbImage) -> GrayImage {
    GrayImage::from_fn(picture.width(), picture.height(), |x, y| {
        Luma([picture.get_pixel(x, y).0[0]])
    })
}

#[test]
fn resampling_equals_pillow_and_torch() {
    for case in expected()["resized"].as_array().unwrap() {
        let [w, h] = [0, 1].map(|i| case["from"][i].as_u64().unwrap() as u32);
        let [to_w, to_h] = [0, 1].map(|i| case["to"][i].as_u64().unwrap() as u32);
        let source = pattern(w, h);
        for (key, filter) in [
            ("lanczos", Filter::Lanczos3),
            ("bicubic", Filter::Bicubic),
            ("torch", Filter::BicubicTorch),
        ] {
            let resized = resize(&source, to_w, to_h, filter).unwrap();
            assert_eq!(resized.dimensions(), (to_w, to_h));
            assert_eq!(digest(resized.as_raw()), case[key], "{key} {w}x{h} to {to_w}x{to_h}");
        }
        let grey = resize_gray(&red(&source), to_w, to_h, Filter::Lanczos3).unwrap();
        assert_eq!(digest(grey.as_raw()), case["grey"], "grey {w}x{h} to {to_w}x{to_h}");
    }
}

#[test]
fn resampling_to_the_same_size_is_a_copy() {
    let source = pattern(17, 9);
    assert_eq!(resize(&source, 17, 9, Filter::Lanczos3).unwrap(), source);
    assert_message(resize(&source, 0, 9, Filter::Bicubic), &["size: 0x9"]);
    assert_message(resize(&source, 9, u32::MAX, Filter::Bicubic), &["size: 9x4294967295"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Weights sum to one whatever the sizes are, and nothing overflows.
    #[test]
    fn a_flat_picture_stays_flat(
        w in 1..90_u32, h in 1..90_u32, to_w in 1..90_u32, to_h in 1..90_u32, level: u8,
    ) {
        for filter in [Filter::Lanczos3, Filter::Bicubic, Filter::BicubicTorch] {
            let flat = RgbImage::from_pixel(w, h, Rgb([level, 255, 0]));
            let resized = resize(&flat, to_w, to_h, filter).unwrap();
            prop_assert!(resized.pixels().all(|pixel| pixel.0 == [level, 255, 0]));
            resize(&pattern(w, h), to_w, to_h, filter).unwrap();
        }
    }
}

// ---- sizes ----

#[test]
fn the_size_for_an_area_is_that_of_diffusers() {
    for case in expected()["dimensions"].as_array().unwrap() {
        let [area, w, h, width, height] = [0, 1, 2, 3, 4].map(|i| case[i].as_u64().unwrap());
        let size = Size::for_area(area, Size::new(w as u32, h as u32)).unwrap();
        let expected = (width as u32, height as u32);
        assert_eq!((size.width, size.height), expected, "{w}x{h} at an area of {area}");
    }
}

#[test]
fn extreme_aspect_ratios_keep_one_grid_unit() {
    let wide = Size::for_area(1 << 20, Size::new(16_384, 1)).unwrap();
    assert_eq!(wide, Size::new(32_768, 32));
    assert_eq!(Size::for_area(1 << 20, Size::new(1, 16_384)).unwrap(), Size::new(32, 32_768));
    assert_message(Size::for_area(1 << 20, Size::new(0, 5)), &["picture: 0x5"]);
    assert_message(Size::for_area(1023, Size::new(1, 1)), &["area: 1023", "1024 to"]);
    assert_message(Size::for_area(u64::MAX, Size::new(1, 1)), &["area: "]);
    for (w, h) in [(1, 1), (1, 1_000_000), (u32::MAX, 1), (u32::MAX, u32::MAX)] {
        for area in [1024, 5000, 1 << 20, 1 << 28] {
            let size = Size::for_area(area, Size::new(w, h)).unwrap();
            assert!(size.width >= 32 && size.height >= 32, "{w}x{h} at {area}: {size}");
            assert_eq!((size.width % 32, size.height % 32), (0, 0));
        }
    }
}

#[test]
fn explicit_sides_are_taken_exactly_or_refused() {
    let calculated = Size::new(96, 128);
    let working = |w, h| Size::working(w, h, calculated, 16);
    assert_eq!(working(None, None).unwrap(), calculated);
    assert_eq!(working(Some(64), None).unwrap(), Size::new(64, 128));
    assert_eq!(working(Some(16), Some(48)).unwrap(), Size::new(16, 48));
    assert_message(working(Some(100), None), &["width: 100", "multiple of 16", "96 or 112"]);
    assert_message(working(None, Some(0)), &["height: 0", "such as 16"]);
    assert_message(working(None, Some(15)), &["height: 15", "such as 16"]);
    assert_message(working(Some(u32::MAX), None), &["width: 4294967295", "such as 65536"]);
    assert_eq!(Size::new(64, 32).in_units_of(16).unwrap(), Size::new(4, 2));
    assert_message(Size::new(64, 33).in_units_of(16), &["size: 64x33", "multiples of 16"]);
}

// ---- tensors ----

#[test]
fn tensors_hold_what_diffusers_holds() {
    let facts = &expected()["tensor"];
    let bits = |key: &str| -> Vec<f32> {
        let bits = facts[key].as_array().unwrap().iter();
        bits.map(|bits| f32::from_bits(bits.as_u64().unwrap() as u32)).collect()
    };
    let grey = RgbImage::from_fn(256, 1, |x, _| Rgb([x as u8, 0, 255]));
    let tensor = tensor_from_rgb(&grey, &Device::Cpu).unwrap();
    assert_eq!(tensor.dims(), [1, 3, 1, 256]);
    let rows: Vec<Vec<f32>> = tensor.reshape((3, 256)).unwrap().to_vec2().unwrap(); // (c, h·w)
    assert_eq!(rows[0], bits("there"));
    assert_eq!((&rows[1], &rows[2]), (&vec![-1.0; 256], &vec![1.0; 256]));
    assert_eq!(rgb_from_tensor(&tensor, "test").unwrap(), grey);

    let edges = bits("edges");
    let row = Tensor::from_vec(edges.repeat(3), (3, 1, edges.len()), &Device::Cpu).unwrap();
    let back = rgb_from_tensor(&row, "test").unwrap();
    let levels: Vec<u64> = back.pixels().map(|pixel| pixel.0[1].into()).collect();
    let wanted: Vec<u64> =
        facts["back"].as_array().unwrap().iter().map(|x| x.as_u64().unwrap()).collect();
    assert_eq!(levels, wanted);
}

#[test]
fn rows_and_columns_are_not_exchanged() {
    let source = pattern(5, 3);
    let tensor = tensor_from_rgb(&source, &Device::Cpu).unwrap();
    assert_eq!(tensor.dims(), [1, 3, 3, 5]);
    let at = |c: usize, y: usize, x: usize| -> f32 {
        let value = tensor.get(0).unwrap().get(c).unwrap().get(y).unwrap().get(x).unwrap();
        value.to_scalar().unwrap()
    };
    for (x, y, pixel) in source.enumerate_pixels() {
        for c in 0..3 {
            let wanted = 2.0 * (f32::from(pixel.0[c]) / 255.0) - 1.0;
            assert_eq!(at(c, y as usize, x as usize).to_bits(), wanted.to_bits());
        }
    }
    assert_eq!(rgb_from_tensor(&tensor, "test").unwrap(), source);
}

#[test]
fn a_tensor_that_is_not_finite_is_no_picture() {
    let values = vec![0.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1.0, 0.5];
    let tensor = Tensor::from_vec(values, (1, 3, 1, 2), &Device::Cpu).unwrap();
    let error = assert_message(
        rgb_from_tensor(&tensor, "the autoencoder"),
        &["the autoencoder produced 3 values that are not finite, of 6"],
    );
    assert!(matches!(error, Error::NotFinite { count: 3, total: 6, .. }));
    let four = Tensor::zeros((1, 4, 2, 2), candle_core::DType::F32, &Device::Cpu).unwrap();
    assert_message(rgb_from_tensor(&four, "x"), &["[4, 2, 2]", "[3, height, width]"]);
}
