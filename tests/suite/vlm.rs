//! The vision-language model against the reference, and against itself.

mod adapter;
mod bad_input;
mod tokens;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor};
use image::RgbImage;
use pentimento::{
    CancelToken, Error,
    vlm::{
        ChatTemplate, Finish, GenerateOptions, IMAGE_PLACEHOLDER, Inputs, Message, Sampling,
        VisionLanguageModel,
    },
    weights::{ModelFiles, Precision, Storage},
};
use serde_json::json;

use crate::common::{Reference, Tolerance, assert_close};

const SHARE: Tolerance = Tolerance::Relative(1e-4);
/// References with other patches, merges, heads, names and forms of config; see
/// `tests/data/make/vlm.py`.
const VARIANTS: [&str; 3] = ["../vlm/deep", "../vlm/flat", "../vlm/merge3"];

fn load(folder: &Path, precision: &Precision) -> pentimento::Result<VisionLanguageModel> {
    VisionLanguageModel::load(&ModelFiles::Folder(folder.to_owned()), "text_encoder", precision)
}

fn open(case: &Reference) -> VisionLanguageModel {
    load(&case.folder, &Precision::reference()).unwrap()
}

fn picture(case: &Reference, name: &str) -> RgbImage {
    image::open(case.folder.join("cases").join(name)).unwrap().into_rgb8()
}

fn fact<'a>(case: &'a Reference, name: &str) -> &'a str {
    case.facts[name].as_str().unwrap()
}

fn wide(tokens: &[u32]) -> Vec<i64> {
    tokens.iter().map(|token| i64::from(*token)).collect()
}

#[track_caller]
fn assert_geometry(case: &Reference, prefix: &str, inputs: &Inputs) {
    let name = |what: &str| format!("{prefix}.{what}");
    let label = format!("{} {prefix}", case.name());
    assert_eq!(wide(inputs.tokens()), case.ints(&name("input_ids")), "{label}");
    if !case.has(&name("image_grid_thw")) {
        return;
    }
    let grids = &inputs.patches().unwrap().grids;
    let grids: Vec<i64> =
        grids.iter().flat_map(|grid| [1, grid.height as i64, grid.width as i64]).collect();
    assert_eq!(grids, case.ints(&name("image_grid_thw")), "{label}");
    if !case.has(&name("position_ids")) {
        return;
    }
    let positions = &inputs.positions().tokens;
    let by_axis: Vec<i64> =
        (0..3).flat_map(|axis| positions.iter().map(move |p| i64::from(p[axis]))).collect();
    assert_eq!(by_axis, case.ints(&name("position_ids")), "{label}");
    assert_eq!(vec![inputs.positions().delta()], case.ints(&name("rope_delta")), "{label}");
}

#[test]
fn one_picture_equals_the_reference() {
    for case in Reference::with("vl.input_ids") {
        let (model, cancel) = (open(&case), CancelToken::new());
        let inputs = model.prepare(fact(&case, "vl.text"), &[picture(&case, "vl.png")]).unwrap();
        let name = |what: &str| format!("{} vl.{what}", case.name());
        assert_geometry(&case, "vl", &inputs);
        let pixels = &inputs.patches().unwrap().pixel_values;
        let expected = normalised(case.tensor("vl.pixel_bytes"));
        assert_close(&name("pixel_values"), pixels, &expected, Tolerance::Absolute(1e-5));
        let vision = model.vision_embeddings(&inputs, &cancel).unwrap().unwrap();
        assert_close(&name("vision_embeds"), &vision, case.tensor("vl.vision_embeds"), SHARE);
        let hidden = model.hidden_states(&inputs, &cancel).unwrap();
        assert_close(&name("hidden_last"), &hidden, case.tensor("vl.hidden_last"), SHARE);
        let logits = model.logits(&inputs, &cancel).unwrap();
        assert_close(&name("logits"), &logits, case.tensor("vl.logits"), SHARE);
        let options = GenerateOptions { max_new_tokens: 24, ..model.generate_options() };
        let answer = model.generate(&inputs, &options, &cancel, &mut |_| ()).unwrap();
        assert_eq!(wide(&answer.tokens), case.ints("vl.greedy"), "{}", name("greedy"));
    }
}

#[test]
fn two_pictures_equal_the_reference() {
    for case in Reference::with("vl2.input_ids") {
        let (model, cancel) = (open(&case), CancelToken::new());
        let pictures = [picture(&case, "vl.png"), picture(&case, "vl2.png")];
        let inputs = model.prepare(fact(&case, "vl2.text"), &pictures).unwrap();
        assert_geometry(&case, "vl2", &inputs);
        let hidden = model.hidden_states(&inputs, &cancel).unwrap();
        let name = format!("{} vl2.hidden_last", case.name());
        assert_close(&name, &hidden, case.tensor("vl2.hidden_last"), SHARE);
    }
}

#[test]
fn other_geometries_equal_the_reference() {
    for case in VARIANTS.map(Reference::open) {
        let (model, cancel) = (open(&case), CancelToken::new());
        let pictures: Vec<RgbImage> =
            (0..4).map(|index| picture(&case, &format!("{index}.png"))).collect();
        for prompt in case.facts["prompts"].as_array().unwrap() {
            let prefix = prompt["name"].as_str().unwrap();
            let count = usize::try_from(prompt["pictures"].as_u64().unwrap()).unwrap();
            let text = prompt["text"].as_str().unwrap();
            let inputs = model.prepare(text, &pictures[..count]).unwrap();
            assert_geometry(&case, prefix, &inputs);
            let expected = |what: &str| case.tensor(&format!("{prefix}.{what}"));
            let name = |what: &str| format!("{} {prefix}.{what}", case.name());
            match model.vision_embeddings(&inputs, &cancel).unwrap() {
                Some(vision) => {
                    assert_close(&name("vision"), &vision, expected("vision_embeds"), SHARE)
                }
                None => assert_eq!(count, 0),
            }
            let hidden = model.hidden_states(&inputs, &cancel).unwrap();
            assert_close(&name("hidden"), &hidden, expected("hidden_last"), SHARE);
            let logits = model.logits(&inputs, &cancel).unwrap();
            let last = logits.narrow(1, inputs.tokens().len() - 1, 1).unwrap();
            assert_close(&name("logits"), &last, expected("logits_last"), SHARE);
            let sequential = inputs.clone().with_sequential_positions();
            let hidden = model.hidden_states(&sequential, &cancel).unwrap();
            assert_close(&name("sequential"), &hidden, expected("hidden_sequential"), SHARE);
            for penalty in ["1.0", "1.3"] {
                if !case.has(&format!("{prefix}.greedy.{penalty}")) {
                    continue;
                }
                let options = GenerateOptions {
                    max_new_tokens: 20,
                    sampling: Sampling::Greedy,
                    repetition_penalty: penalty.parse().unwrap(),
                    seed: 0,
                    stop_tokens: model.config().eos_token_ids.clone(),
                };
                let answer = model.generate(&inputs, &options, &cancel, &mut |_| ()).unwrap();
                let greedy = case.ints(&format!("{prefix}.greedy.{penalty}"));
                assert_eq!(wide(&answer.tokens), greedy, "{} {penalty}", name("greedy"));
            }
        }
    }
}

#[derive(serde::Deserialize)]
struct SizeCase {
    settings: HashMap<String, usize>,
    width: u32,
    height: u32,
    grid: [usize; 3],
    sha256: String,
    at: Vec<usize>,
    values: Vec<f32>,
}

#[test]
fn pictures_of_many_sizes_become_the_references_patches() {
    use sha2::Digest;
    let folder = tempfile::tempdir().unwrap();
    fs_err::create_dir(folder.path().join("processor")).unwrap();
    let files = ModelFiles::Folder(folder.path().to_owned());
    let mut vision = open(&Reference::open("tiny-qwen-edit")).config().vision.clone();
    let cases: Vec<SizeCase> = read_json(&data("vlm/sizes.json"));
    assert!(cases.len() > 90);
    for case in cases {
        let setting = |name: &str| case.settings[name];
        let settings = json!({
            "min_pixels": setting("low"), "max_pixels": setting("high"),
            "patch_size": setting("patch"), "merge_size": setting("merge"),
            "temporal_patch_size": setting("frames"),
        });
        let path = folder.path().join("processor/preprocessor_config.json");
        fs_err::write(path, settings.to_string()).unwrap();
        (vision.patch_size, vision.merge_size) = (setting("patch"), setting("merge"));
        vision.temporal_patch_size = setting("frames");
        let preprocessor =
            pentimento::vlm::Preprocessor::load(&files, &["processor"], &vision).unwrap();
        let patches = preprocessor.patches(&[computed_picture(case.width, case.height)]).unwrap();
        let patches = patches.unwrap();
        let label = format!("{} × {} {:?}", case.width, case.height, case.settings);
        assert_eq!([1, patches.grids[0].height, patches.grids[0].width], case.grid, "{label}");
        let values: Vec<f32> = patches.pixel_values.flatten_all().unwrap().to_vec1().unwrap();
        for (at, expected) in case.at.iter().zip(&case.values) {
            assert!((values[*at] - expected).abs() <= 1e-5, "{label}: {} {expected}", values[*at]);
        }
        let per_channel = setting("frames") * setting("patch") * setting("patch");
        let bytes: Vec<u8> = values
            .iter()
            .enumerate()
            .map(|(at, value)| byte(*value, at.checked_div(per_channel).unwrap() % 3))
            .collect();
        let digest = sha2::Sha256::digest(&bytes);
        let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(digest, case.sha256, "{label}");
    }
}

const MEAN: [f64; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
const STD: [f64; 3] = [0.268_629_54, 0.261_302_58, 0.275_777_11];

/// A normalised value brought back to its byte.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a byte's range")]
fn byte(value: f32, channel: usize) -> u8 {
    ((f64::from(value) * STD[channel] + MEAN[channel]) * 255.0).round() as u8
}

/// The pixel values of the reference from the bytes that they were made of, which are recorded once
/// for the two equal frames of a patch: `[n, 3 · 14 · 14]` to `[n, 3 · 2 · 14 · 14]`.
fn normalised(bytes: &Tensor) -> Tensor {
    let channels = |values: [f64; 3]| Tensor::new(&values, &Device::Cpu).unwrap();
    let (mean, std) = (channels(MEAN), channels(STD));
    let column = |values: Tensor| values.reshape((3, 1, 1)).unwrap(); // [channel, frame, pixel]
    let patches = bytes.dim(0).unwrap();
    let levels = bytes.to_dtype(DType::F64).unwrap();
    let levels = levels.reshape((patches, 3, 1, 14 * 14)).unwrap(); // [n, channel, frame, pixel]
    let unit = (levels / 255.0).unwrap();
    let values = unit.broadcast_sub(&column(mean)).unwrap().broadcast_div(&column(std)).unwrap();
    let frames = values.repeat((1, 1, 2, 1)).unwrap();
    frames.flatten_from(1).unwrap().to_dtype(DType::F32).unwrap()
}

/// The picture of `tests/data/make/vlm_sizes.py`.
fn computed_picture(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        let base = 31 * x * x + 17 * y * y + 7 * x * y;
        image::Rgb([0, 1, 2].map(|channel| {
            let value = (base + 101 * channel) >> 3;
            value.to_le_bytes()[0]
        }))
    })
}

fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(path)
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> T {
    serde_json::from_str(&fs_err::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn an_answer_is_the_same_with_and_without_the_cache() {
    for case in ["../vlm/flat", "tiny-qwen-edit"].map(Reference::open) {
        let (model, cancel) = (open(&case), CancelToken::new());
        let prompt = format!("<|vision_start|>{IMAGE_PLACEHOLDER}<|vision_end|>make it red");
        let inputs = model.prepare(&prompt, &[computed_picture(90, 70)]).unwrap();
        let options = GenerateOptions {
            max_new_tokens: 12,
            stop_tokens: Vec::new(),
            sampling: Sampling::Greedy,
            ..model.generate_options()
        };
        let mut pieces = String::new();
        let answer = model
            .generate(&inputs, &options, &cancel, &mut |piece| pieces.push_str(piece))
            .unwrap();
        assert_eq!((answer.tokens.len(), answer.finish), (12, Finish::Length));
        assert_eq!(answer.text, pieces);
        assert_eq!(answer.text, model.tokenizer().decode(&answer.tokens).unwrap());
        let whole = inputs.clone().with_answer(&answer.tokens);
        let logits = model.logits(&whole, &cancel).unwrap();
        let best: Vec<u32> = logits
            .squeeze(0)
            .unwrap()
            .narrow(0, inputs.tokens().len() - 1, 12)
            .unwrap()
            .argmax(1)
            .unwrap()
            .to_vec1()
            .unwrap();
        assert_eq!(best, answer.tokens);
    }
}

#[test]
fn random_answers_follow_the_seed() {
    let case = Reference::open("../vlm/flat");
    let (model, cancel) = (open(&case), CancelToken::new());
    let inputs = model.prepare("make it red", &[]).unwrap();
    let answer = |seed| {
        let sampling = Sampling::Random { temperature: 2.0, top_k: None, top_p: 1.0 };
        let options = GenerateOptions {
            max_new_tokens: 16,
            seed,
            sampling,
            stop_tokens: Vec::new(),
            repetition_penalty: 1.0,
        };
        model.generate(&inputs, &options, &cancel, &mut |_| ()).unwrap().tokens
    };
    assert_eq!(answer(1), answer(1));
    assert_ne!(answer(1), answer(2));
}

#[test]
fn a_generation_config_sets_the_defaults() {
    let options = open(&Reference::open("../vlm/deep")).generate_options();
    let Sampling::Random { temperature, top_k, top_p } = options.sampling else {
        panic!("{options:?}")
    };
    assert_eq!((temperature, top_k, top_p), (0.1, Some(1), 0.001));
    assert_eq!((options.repetition_penalty, options.stop_tokens.len()), (1.05, 2));
}

#[test]
fn an_answer_ends_where_positions_end() {
    let case = Reference::open("../vlm/merge3");
    let (model, cancel) = (open(&case), CancelToken::new());
    let max = model.config().text.max_position_embeddings;
    let inputs = model.prepare(&"1".repeat(max - 3), &[]).unwrap();
    let options = GenerateOptions { stop_tokens: Vec::new(), ..model.generate_options() };
    let answer = model.generate(&inputs, &options, &cancel, &mut |_| ()).unwrap();
    assert_eq!((answer.tokens.len(), answer.finish), (3, Finish::Length));
}

#[test]
fn other_storages_give_nearly_the_same() {
    let case = Reference::open("tiny-qwen-edit");
    let expected = case.tensor("vl.hidden_last");
    for (storage, share) in [(Storage::Plain(DType::BF16), 1e-4), (Storage::Q8_0, 0.1)] {
        let precision = Precision { storage, ..Precision::reference() };
        let model = load(&case.folder, &precision).unwrap();
        let inputs = model.prepare(fact(&case, "vl.text"), &[picture(&case, "vl.png")]).unwrap();
        let hidden = model.hidden_states(&inputs, &CancelToken::new()).unwrap();
        assert_close(&format!("{storage:?}"), &hidden, expected, Tolerance::Relative(share));
    }
}

#[test]
fn a_cancelled_request_stops() {
    let case = Reference::open("../vlm/flat");
    let (model, cancel) = (open(&case), CancelToken::new());
    let inputs = model.prepare("make it red", &[]).unwrap();
    let options = GenerateOptions {
        max_new_tokens: 100,
        stop_tokens: Vec::new(),
        ..model.generate_options()
    };
    let mut heard = 0;
    let result = model.generate(&inputs, &options, &cancel, &mut |_| {
        heard += 1;
        cancel.cancel();
    });
    assert!(matches!(result, Err(Error::Cancelled)), "{result:?}");
    assert_eq!(heard, 1);
    assert!(matches!(model.hidden_states(&inputs, &cancel), Err(Error::Cancelled)));
}

const QWEN_CHAT: &str = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n\
    <|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is this?<|im_end|>\n\
    <|im_start|>assistant\n";

#[test]
fn chats_follow_the_folders_template() {
    let messages = [Message::user(1, "What is this?")];
    // From tokenizer_config.json, from chat_template.jinja, and the built-in one.
    for case in ["../vlm/flat", "../vlm/merge3", "../vlm/deep"].map(Reference::open) {
        assert_eq!(open(&case).chat(&messages).unwrap(), QWEN_CHAT, "{}", case.name());
    }
    let model = open(&Reference::open("../vlm/deep"));
    let chat = [
        Message::text("system", "Be brief."),
        Message::user(2, "Two?\n"),
        Message::text("assistant", " Yes. "),
        Message::text("user", "ok"),
    ];
    let text = model.chat(&chat).unwrap();
    let seen = "<|vision_start|><|image_pad|><|vision_end|>".repeat(2);
    assert_eq!(
        text,
        format!(
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{seen}Two?\n<|im_end|>\n\
             <|im_start|>assistant\n Yes. <|im_end|>\n<|im_start|>user\nok<|im_end|>\n\
             <|im_start|>assistant\n"
        )
    );
    let flat = open(&Reference::open("../vlm/flat"));
    assert_eq!(flat.chat(&chat).unwrap(), text, "the published template and the built-in one");
}

#[test]
fn templates_that_fail_say_why() {
    let folder = tempfile::tempdir().unwrap();
    let files = ModelFiles::Folder(folder.path().to_owned());
    fs_err::create_dir(folder.path().join("processor")).unwrap();
    let render = |template: &str| {
        let path = folder.path().join("processor/chat_template.jinja");
        fs_err::write(path, template).unwrap();
        let template = ChatTemplate::load(&files, &["processor"]);
        template.and_then(|template| template.render(&[Message::text("user", " a b ")]))
    };
    let text = render(
        "{{ messages[0].content.strip().split(' ')|join('-') }}\n{% if true %}\n!{% endif %}",
    );
    assert_eq!(text.unwrap(), "a-b\n!");
    let message = |template| render(template).unwrap_err().to_string();
    assert!(message("{{ raise_exception('no tools here') }}").contains("no tools here"));
    assert!(message("{% for x %}").contains("chat_template.jinja"));
    assert!(
        message("{% for x in range(9999) %}{% for y in range(9999) %}x{% endfor %}{% endfor %}")
            .contains("fuel")
    );
}

proptest::proptest! {
    #[test]
    fn resized_pictures_keep_their_limits(width in 1_u32..3000, height in 1_u32..3000) {
        let (width, height) = (width, height);
        proptest::prop_assume!(width.max(height) <= 200 * width.min(height));
        let preprocessor = PREPROCESSOR.clone();
        let (new_width, new_height) = preprocessor.resized_size(width, height).unwrap();
        proptest::prop_assert!(new_width % 28 == 0 && new_height % 28 == 0);
        let area = u64::from(new_width) * u64::from(new_height);
        // One token at least on each side can push a very long picture over the largest area.
        proptest::prop_assert!(area >= 28 * 28 * 4);
        proptest::prop_assert!(area <= 28 * 28 * 64 || new_width == 28 || new_height == 28);
        let again = preprocessor.resized_size(new_width, new_height).unwrap();
        proptest::prop_assert!(area > 28 * 28 * 64 || again == (new_width, new_height));
    }
}

static PREPROCESSOR: std::sync::LazyLock<pentimento::vlm::Preprocessor> =
    std::sync::LazyLock::new(|| open(&Reference::open("tiny-qwen-edit")).preprocessor().clone());
