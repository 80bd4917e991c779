//! Tests of pixels: writing files, and the record of an edit inside them.

use std::{path::Path, process::Command};

use image::RgbImage;
use pentimento::{
    Error, PictureError,
    pixels::{
        EditRecord, Format, Limits, LoraRecord, ModelRecord, Overwrite, PARAMETERS_KEYWORD,
        Picture, RECORD_KEYWORD, Size, TextEntry, check_output, encode_to_vec, read_metadata, save,
        write_file,
    },
};

use super::{assert_message, data, expected, hex, open, pattern};

// ---- writing ----

fn small() -> Picture {
    Picture::from_rgb(pattern(40, 30))
}

fn names_in(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs_err::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn formats_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let icc = open("icc.png").icc;
    let picture = Picture { icc: icc.clone(), ..open("plain.ppm") };
    for name in ["out.png", "out.PNG", "out.webp", "out.jpg", "out.jpeg"] {
        let path = folder.path().join(name);
        assert_eq!(save(&picture, &path, Overwrite::Refuse, None).unwrap(), [""; 0]);
        let again = Picture::open(&path, &Limits::default()).unwrap();
        assert_eq!(again.icc, icc, "{name}");
        let worst = again.rgb.as_raw().iter().zip(picture.rgb.as_raw());
        let worst = worst.map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        assert!(worst <= if name.ends_with('g') && name.contains(".j") { 12 } else { 0 }, "{name}");
    }
    assert_eq!(names_in(folder.path()).len(), 5);
}

#[test]
fn formats_have_names_and_limits() {
    assert_message(
        Format::from_path(Path::new("a.gif")),
        &["a.gif: ", ".gif", ".png, .jpg, .jpeg or .webp"],
    );
    assert_message(Format::from_path(Path::new("a")), &["a: ", "no extension", ".png"]);
    assert_message(Format::from_name("tga"), &["format: tga", "png, jpg"]);
    assert_eq!(Format::from_path(Path::new("x/A.JpEg")).unwrap(), Format::Jpeg);
    let wide = Picture::from_rgb(RgbImage::new(16_384, 1));
    assert_message(encode_to_vec(&wide, Format::WebP, None), &["16384x1", "16383 px in a WebP"]);
    let none = Picture::from_rgb(RgbImage::new(0, 0));
    assert_message(encode_to_vec(&none, Format::Png, None), &["0x0"]);
}

#[test]
fn an_existing_output_is_not_replaced_without_leave() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.png");
    assert_eq!(check_output(&path, Overwrite::Refuse).unwrap(), Format::Png);
    assert_eq!(names_in(folder.path()), [""; 0], "the check leaves nothing");
    fs_err::write(&path, b"mine").unwrap();
    for result in [
        check_output(&path, Overwrite::Refuse).map(drop),
        save(&small(), &path, Overwrite::Refuse, None).map(drop),
        write_file(&path, b"theirs", Overwrite::Refuse),
    ] {
        let error = assert_message(result, &["out.png: already exists", "--force"]);
        assert!(matches!(error, Error::Picture(PictureError::Exists { .. })));
    }
    assert_eq!(fs_err::read(&path).unwrap(), b"mine");
    check_output(&path, Overwrite::Replace).unwrap();
    save(&small(), &path, Overwrite::Replace, None).unwrap();
    assert_eq!(Picture::open(&path, &Limits::default()).unwrap().rgb, small().rgb);
    assert_eq!(names_in(folder.path()), ["out.png"]);
}

#[test]
fn an_output_that_cannot_be_written_is_refused_before_the_work() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let check = |path: &Path, words: &[&str]| {
        for overwrite in [Overwrite::Refuse, Overwrite::Replace] {
            let error = assert_message(check_output(path, overwrite), words);
            assert!(matches!(error, Error::Picture(PictureError::Write { .. })), "{error:?}");
        }
    };
    check(&at("none/out.png"), &["none/out.png: ", "does not exist", "make the folder first"]);
    fs_err::write(at("file.png"), b"x").unwrap();
    check(&at("file.png/out.png"), &["file.png/out.png: ", "not a folder"]);
    fs_err::create_dir(at("folder.png")).unwrap();
    check(&at("folder.png"), &["this is a folder"]);
    check(&at("out.png/"), &["not the name of a file"]);
    #[cfg(target_os = "linux")]
    check(Path::new("/proc/out.png"), &["/proc/out.png: cannot write the picture", "hint: "]);
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("/dev/null", at("null.png")).unwrap();
        let error = check_output(&at("null.png"), Overwrite::Replace);
        assert_message(error, &["not a regular file"]);
    }
}

#[cfg(unix)]
#[test]
fn permissions_and_links_are_as_with_an_ordinary_file() {
    use std::os::unix::fs::PermissionsExt;
    let mode = |path: &Path| fs_err::metadata(path).unwrap().permissions().mode() & 0o777;
    let folder = tempfile::tempdir().unwrap();
    let (ordinary, path) = (folder.path().join("ordinary"), folder.path().join("out.png"));
    fs_err::write(&ordinary, b"").unwrap();
    save(&small(), &path, Overwrite::Refuse, None).unwrap();
    assert_eq!(mode(&path), mode(&ordinary));
    fs_err::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
    save(&small(), &path, Overwrite::Replace, None).unwrap();
    assert_eq!(mode(&path), 0o640);

    let link = folder.path().join("link.png");
    std::os::unix::fs::symlink("out.png", &link).unwrap();
    assert_message(check_output(&link, Overwrite::Refuse), &["already exists"]);
    write_file(&link, b"through", Overwrite::Replace).unwrap();
    assert!(link.is_symlink());
    assert_eq!(fs_err::read(&path).unwrap(), b"through");
    std::os::unix::fs::symlink("nowhere.png", folder.path().join("loose.png")).unwrap();
    let loose = folder.path().join("loose.png");
    assert_message(write_file(&loose, b"x", Overwrite::Refuse), &["already exists"]);
}

const CHILD: &str = "PENTIMENTO_TEST_OUTPUT";

/// The system refuses in the middle of writing: the test starts itself under a limit of one block.
#[cfg(unix)]
#[test]
fn a_write_that_fails_half_way_leaves_nothing_behind() {
    if let Some(path) = std::env::var_os(CHILD) {
        let noise = Picture::from_rgb(pattern(200, 200));
        for overwrite in [Overwrite::Refuse, Overwrite::Replace] {
            let path = match overwrite {
                Overwrite::Refuse => Path::new(&path).join("new.png"),
                Overwrite::Replace => Path::new(&path).join("old.png"),
            };
            check_output(&path, overwrite).unwrap();
            assert_message(save(&noise, &path, overwrite, None), &["cannot write", "ulimit"]);
        }
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    fs_err::write(folder.path().join("old.png"), b"old").unwrap();
    let output = Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 1; exec \"$0\" \"$@\""])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "pixels::output::a_write_that_fails_half_way_leaves_nothing_behind"])
        .env(CHILD, folder.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
    assert_eq!(names_in(folder.path()), ["old.png"]);
    assert_eq!(fs_err::read(folder.path().join("old.png")).unwrap(), b"old");
}

// ---- records ----

fn record(prompt: &str) -> EditRecord {
    EditRecord {
        version: 1,
        program: EditRecord::this_program(),
        prompt: prompt.to_owned(),
        negative_prompt: Some("blurry".to_owned()),
        seed: u64::MAX,
        rng: "cpu".to_owned(),
        steps: 4,
        sampler: "Euler".to_owned(),
        cfg_scale: 4.5,
        strategy: "single".to_owned(),
        sub_requests: vec!["make it night; and\nmore".to_owned()],
        model: ModelRecord {
            name: "tiny, random".to_owned(),
            class: "SomePipeline".to_owned(),
            digest: Some("0123456789abcdef".to_owned()),
        },
        loras: vec![LoraRecord { name: "style".to_owned(), strength: -0.5, modules: 3 }],
        working_size: Size::new(64, 128),
        input_sizes: vec![Size::new(40, 30)],
        timings_ms: [("denoise".to_owned(), 12)].into(),
    }
}

fn text<'a>(texts: &'a [TextEntry], keyword: &str) -> &'a str {
    &texts.iter().find(|entry| entry.keyword == keyword).unwrap().text
}

#[test]
fn the_record_of_an_edit_comes_back() {
    let long = "修改图像 ".repeat(20_000);
    for prompt in ["make the coat red\nand keep: the rest", "café", "修改图像", "", "a\0b", &long]
    {
        let record = record(prompt);
        let file = encode_to_vec(&small(), Format::Png, Some(&record)).unwrap();
        assert_eq!(file.notes, [""; 0]);
        let info = read_metadata(&file.bytes, "x.png", &Limits::default()).unwrap();
        assert_eq!(info.record.as_ref(), Some(&record));
        assert_eq!(info.notes, [""; 0]);
        assert_eq!((info.format, info.size), ("image/png", Size::new(40, 30)));
        let version = env!("CARGO_PKG_VERSION");
        let wanted = format!(
            "{}\nNegative prompt: blurry\nSteps: 4, Sampler: Euler, CFG scale: 4.5, \
             Seed: 18446744073709551615, Size: 40x30, Model hash: 0123456789, \
             Model: \"tiny, random\", Version: pentimento {version}",
            prompt.replace('\0', "\u{fffd}")
        );
        assert_eq!(text(&info.texts, PARAMETERS_KEYWORD), wanted);
        assert_eq!(Picture::decode(&file.bytes, "x", &Limits::default()).unwrap().rgb, small().rgb);
    }
}

#[test]
fn text_goes_into_the_chunk_that_can_hold_it() {
    let kinds = |prompt: &str| {
        let bytes = encode_to_vec(&small(), Format::Png, Some(&record(prompt))).unwrap().bytes;
        let holds = |kind: &[u8], keyword: &str| {
            let start = [kind, keyword.as_bytes(), b"\0"].concat();
            bytes.windows(start.len()).any(|window| window == start)
        };
        [
            holds(b"tEXt", PARAMETERS_KEYWORD),
            holds(b"iTXt", PARAMETERS_KEYWORD),
            holds(b"iTXt", RECORD_KEYWORD),
        ]
    };
    assert_eq!(kinds("café"), [true, false, true]);
    assert_eq!(kinds("修改"), [false, true, true]);
    let plain = encode_to_vec(&small(), Format::Png, None).unwrap().bytes;
    let info = read_metadata(&plain, "x.png", &Limits::default()).unwrap();
    assert_eq!((info.texts, info.record), (vec![], None));
    let notes = encode_to_vec(&small(), Format::WebP, Some(&record("x"))).unwrap().notes;
    assert!(notes[0].contains("PNG only"), "{notes:?}");
}

#[test]
fn the_text_is_written_as_pillow_writes_it() {
    for (prompt, chunk) in expected()["chunks"].as_object().unwrap() {
        let record = EditRecord { program: "pentimento 0".to_owned(), ..record(prompt) };
        let bytes = encode_to_vec(&small(), Format::Png, Some(&record)).unwrap().bytes;
        let chunk = hex(chunk.as_str().unwrap());
        assert!(bytes.windows(chunk.len()).any(|window| window == chunk), "{prompt}");
    }
}

#[test]
fn texts_of_other_programs_are_read_and_bombs_are_not() {
    let bytes = fs_err::read(data("texts.png")).unwrap();
    let info = read_metadata(&bytes, "texts.png", &Limits::default()).unwrap();
    assert_eq!(text(&info.texts, "parameters"), "a café\nSteps: 3");
    assert_eq!(text(&info.texts, "packed"), "x".repeat(3000));
    assert_eq!(text(&info.texts, "Chinese"), "修改图像");
    assert_eq!(text(&info.texts, "packed too"), "修".repeat(2000));
    assert_eq!(text(&info.texts, "late"), "after the pixels");
    assert_eq!(info.texts.len(), 5);
    assert!(info.notes.len() == 1 && info.notes[0].contains("bomb"), "{:?}", info.notes);
}

#[test]
fn what_a_file_says_is_read_without_its_pixels() {
    let info = |name: &str| {
        read_metadata(&fs_err::read(data(name)).unwrap(), name, &Limits::default()).unwrap()
    };
    assert_eq!(info("oriented-6.jpg").orientation, 6);
    assert_eq!(info("oriented-6.jpg").size, Size::new(24, 16));
    assert!(info("animated.webp").several_frames);
    assert!(info("icc.jpg").icc_bytes.is_some());
    let broken = TextEntry { keyword: RECORD_KEYWORD.to_owned(), text: "{}".to_owned() };
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, 1, 1);
    encoder.add_itxt_chunk(broken.keyword.clone(), broken.text.clone()).unwrap();
    encoder.write_header().unwrap().write_image_data(&[0]).unwrap();
    let info = read_metadata(&bytes, "x.png", &Limits::default()).unwrap();
    assert_eq!(info.texts, [broken]);
    assert!(info.record.is_none() && info.notes[0].contains("cannot be read"), "{:?}", info.notes);
}
